"""What a run of a bundle has to read and to compute, from the structure of its graphs.

Bytes: every weight that a run uses is read once, whole; of tables that are looked up (embeddings, rotary tables) only
the rows; of the state every row that attention may see, once for each layer that reads it. Activations stay in the
processor's caches and are not counted, nor are the rows that are written.

Operations: two for each weight of a matrix product and each of its rows; four for each pair of query and visible key
and each number of a head. Norms, activations and the like are not counted.

So both are lower bounds of the work, and the time that they take on a machine is a lower bound of the time of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..bundle import Bundle
from ..runtime import chunk_spans
from .graph_file import GraphFile, Node, Weight, read_graph

__all__ = ["Cost", "Format", "GraphCost", "Traffic"]

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Min", "Max", "Equal", "And", "Or"})
_LOOKUPS = {"Gather": 1, "GatherBlockQuantized": 1}  # the input that holds the indices
_ROTARY = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}  # inputs that are tables with a row per position
_FLOATS = {32: "fp32", 16: "fp16"}


@dataclass(frozen=True, slots=True)
class Format:
    """How the matrix of a product is stored. `block` is 0 for floats; `level` is MatMulNBits' accuracy_level."""

    bits: int
    block: int = 0
    level: int = 0

    def __str__(self) -> str:
        if not self.block:
            return _FLOATS.get(self.bits, f"{self.bits} bits")
        return f"int{self.bits} block {self.block}" + (f" level {self.level}" if self.level else "")


@dataclass(slots=True)
class Cost:
    """Bytes and operations of a run, or of several."""

    weight_bytes: int = 0
    lookup_bytes: int = 0
    state_bytes: int = 0
    products: dict[Format, int] = field(default_factory=dict)
    attention: int = 0  # operations
    shapes: dict[Format, dict[tuple[int, int], int]] = field(default_factory=dict)  # (in, out) -> operations

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.lookup_bytes + self.state_bytes

    @property
    def operations(self) -> int:
        return sum(self.products.values()) + self.attention

    def product(self, format: Format, shape: tuple[int, int], operations: int) -> None:
        self.products[format] = self.products.get(format, 0) + operations
        sizes = self.shapes.setdefault(format, {})
        sizes[shape] = sizes.get(shape, 0) + operations

    def __add__(self, other: Cost) -> Cost:
        total = Cost(
            self.weight_bytes + other.weight_bytes,
            self.lookup_bytes + other.lookup_bytes,
            self.state_bytes + other.state_bytes,
            attention=self.attention + other.attention,
        )
        for part in (self, other):
            for format, sizes in part.shapes.items():
                for shape, operations in sizes.items():
                    total.product(format, shape, operations)
        return total

    def main_shape(self, format: Format) -> tuple[int, int]:
        """The (in, out) that most operations of a format are done with."""
        sizes = self.shapes[format]
        return max(sizes, key=lambda shape: sizes[shape])


class Traffic:
    """The costs of a bundle's graphs."""

    def __init__(self, bundle: Bundle):
        names = [name for name in ("vision", "embed", "decoder") if name in bundle.manifest.files]
        self._graphs = {name: read_graph(bundle.path(name)) for name in names}

    def step(self, position: int) -> Cost:
        """One decode step of a sequence that has `position` tokens already."""
        return self._tokens(1, position)

    def prompt(self, tokens: int, chunk: int) -> Cost:
        """A prompt that runs in chunks."""
        total = Cost()
        for start, stop in chunk_spans(tokens, chunk, ()):
            total += self._tokens(stop - start, start)
        return total

    def vision(self, patches: int) -> Cost:
        """The vision graph on a picture of so many patches."""
        return GraphCost(self._graphs["vision"], patches=patches).cost()

    def _tokens(self, tokens: int, past: int) -> Cost:
        return (
            GraphCost(self._graphs["embed"], tokens=tokens).cost()
            + GraphCost(self._graphs["decoder"], tokens=tokens, past=past).cost()
        )


class GraphCost:
    """The cost of one run of a graph with given sizes of its inputs.

    `tokens` of the chunk behind `past` ones; one row of logits; `patches` of a picture.
    """

    def __init__(self, graph: GraphFile, *, tokens: int = 1, past: int = 0, patches: int = 0):
        self._graph = graph
        self._tokens, self._past = tokens, past
        self._sizes = {"logit_rows": 1, "patches": patches, "positions": patches}
        self._makers: dict[str, Node] = {}
        self._rows: dict[str, int] = {}
        self._loops: dict[str, tuple[int, int]] = {}  # output of a node in a loop -> (iterations, rows of each)
        self._index(graph, ())

    def cost(self) -> Cost:
        total, used = Cost(), set[str]()
        for node, iterations in self._walk(self._graph.nodes, 1):
            self._add_weights(node, iterations, total, used)
            self._add_operations(node, iterations, total)
        return total

    def _index(self, graph: GraphFile, outer: tuple[Node, ...]) -> None:
        for node in graph.nodes:
            if node.op_type == "If":
                body = self._taken(node)
                self._index(body, outer)
                for output, made in zip(node.outputs, body.outputs, strict=True):
                    self._makers[output] = self._makers[made]
                continue
            for output in node.outputs:
                self._makers[output] = node
            if outer:
                self._loops.update(dict.fromkeys(node.outputs, self._loop(outer[-1])))
            for body in node.bodies.values():
                self._index(body, (*outer, node))

    def _walk(self, nodes: Iterable[Node], iterations: int) -> Iterable[tuple[Node, int]]:
        for node in nodes:
            if node.op_type == "If":
                yield from self._walk(self._taken(node).nodes, iterations)
                continue
            yield node, iterations
            for body in node.bodies.values():
                yield from self._walk(body.nodes, iterations * self._loop(node)[0])

    def _taken(self, node: Node) -> GraphFile:
        """The branch of an If whose condition is that a value has so many rows; any other is taken not to hold."""
        shape = self._behind(node.inputs[0], ("Equal",))
        counted = None if shape is None else self._behind(shape, ("Shape",))
        wanted = self._weight(self._makers[node.inputs[0]].inputs[1]).values if counted is not None else ()
        holds = counted is not None and wanted == (self.rows(counted),)
        return node.bodies["then_branch" if holds else "else_branch"]

    def _loop(self, node: Node) -> tuple[int, int]:
        """Iterations of a loop and the rows that each has: over the experts that the rows of a chunk chose.

        Its count is the number of different ones among the k best of each row, at most as many as there are; anything
        else is taken to run once. Different rows are taken to choose different experts.
        """
        chosen = self._behind(node.inputs[0], ("Size", "Unique")) if node.op_type == "Loop" else None
        best = None if chosen is None else self._makers.get(chosen)
        if best is None or best.op_type != "TopK":
            return 1, self._tokens
        [k] = self._weight(best.inputs[1], Weight("", (1,), 64, True, (1,))).values
        picks = k * self.rows(best.inputs[0])
        iterations = min(picks, self.width(best.inputs[0]))
        return iterations, -(-picks // iterations)

    def _behind(self, value: str, operators: Iterable[str]) -> str | None:
        for operator in operators:
            maker = self._makers.get(value)
            if maker is None or maker.op_type != operator:
                return None
            value = maker.inputs[0]
        return value

    # --- sizes of values

    def rows(self, value: str) -> int:
        """How many rows (tokens, patches, indices) a value has: what precedes its last axis, heads left out."""
        if value not in self._rows:
            self._rows[value] = self._find_rows(value)
        return self._rows[value]

    def _find_rows(self, value: str) -> int:
        weight = self._graph.weights.get(value)
        if weight is not None:
            return max(weight.count, 1) if weight.is_integer else 1
        if value in self._graph.inputs:
            if all(isinstance(size, int) for size in self._graph.inputs[value]):
                return 1
            return self._sizes.get(value, self._tokens)
        node = self._makers.get(value)
        if node is None or not node.inputs:
            return 1
        if node.op_type in ("Shape", "Size", "Range"):
            return 1
        if node.op_type == "NonZero":
            return self._loops.get(value, (1, self.rows(node.inputs[0])))[1]
        if node.op_type in _ELEMENTWISE:
            return max(self.rows(name) for name in node.inputs if name)
        if node.op_type in _LOOKUPS:
            data, indices = node.inputs[0], node.inputs[1]
            picks_columns = data not in self._graph.weights and indices in self._graph.weights
            return self.rows(data if picks_columns else indices)
        rows = self.rows(node.inputs[0])
        return -(-rows // self._pooled(node)) if node.op_type == "ReduceMean" else rows

    def _pooled(self, node: Node) -> int:
        """How many rows a mean joins: of values in the shape [-1, n, D] the n."""
        source = self._makers.get(node.inputs[0])
        if source is None or source.op_type != "Reshape":
            return 1
        shape = self._weight(source.inputs[1]).values
        return shape[1] if len(shape) == 3 and shape[0] == -1 and shape[1] > 0 else 1

    def width(self, value: str) -> int:
        """The size of the last axis of a value that matrix products and what follows them made."""
        weight = self._graph.weights.get(value)
        if weight is not None:
            return weight.shape[-1] if weight.shape else 1
        if value in self._graph.inputs:
            shape = self._graph.inputs[value]
            return int(shape[-1]) if shape and isinstance(shape[-1], int) else 1
        node = self._makers.get(value)
        if node is None or not node.inputs:
            return 1
        product = self._product(node)
        if product is not None:
            return product[1][1]
        if node.op_type == "Split":
            return self.width(node.inputs[0]) // len(node.outputs)
        if node.op_type == "Reshape":
            shape = self._weight(node.inputs[1]).values
            if shape and shape[-1] > 0:
                return shape[-1]
        return self.width(node.inputs[0])

    def _weight(self, name: str, default: Weight | None = None) -> Weight:
        return self._graph.weights.get(name, default or Weight(name, (), 0, True))

    # --- what nodes read

    def _add_weights(self, node: Node, iterations: int, total: Cost, used: set[str]) -> None:
        for index, name in enumerate(node.inputs):
            weight = self._graph.weights.get(name)
            if weight is None:
                continue
            rows = self._looked_up(node, index)
            if rows is not None:
                total.lookup_bytes += iterations * rows * (weight.nbytes // max(weight.shape[0], 1))
            elif name not in used:
                used.add(name)
                total.weight_bytes += weight.nbytes

    def _looked_up(self, node: Node, index: int) -> int | None:
        """How many rows of the table at an input are read; None for what is no table."""
        if node.op_type in _LOOKUPS and index != _LOOKUPS[node.op_type]:
            axis = node.attributes.get("gather_axis", node.attributes.get("axis", 0))
            shape = self._weight(node.inputs[index]).shape
            return min(self.rows(node.inputs[1]), shape[0]) if shape and axis == 0 else None
        if index in _ROTARY.get(node.op_type, ()):
            return min(self.rows(node.inputs[0]), self._weight(node.inputs[index]).shape[0])
        return None

    # --- what nodes compute

    def _product(self, node: Node) -> tuple[Format, tuple[int, int]] | None:
        """Format and (in, out) of the matrix of a product; None for other nodes."""
        if node.op_type == "MatMulNBits":
            facts = node.attributes
            format = Format(facts.get("bits", 4), facts["block_size"], facts.get("accuracy_level", 0))
            return format, (facts["K"], facts["N"])
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        matrix = self._graph.weights.get(node.inputs[1])
        transposed = bool(node.attributes.get("transB", 0))
        if matrix is not None and len(matrix.shape) == 2:
            first, second = matrix.shape
            return Format(matrix.bits), (second, first) if transposed else (first, second)
        if matrix is None and transposed:  # a matrix that was looked up: its rows are the outputs
            return Format(32), (self.width(node.inputs[0]), self.rows(node.inputs[1]))
        return None

    def _add_operations(self, node: Node, iterations: int, total: Cost) -> None:
        product = self._product(node)
        if product is not None:
            format, (inputs, outputs) = product
            rows = self.rows(node.inputs[0])
            total.product(format, (inputs, outputs), 2 * iterations * rows * inputs * outputs)
        elif node.op_type == "GroupQueryAttention":
            self._add_decoder_attention(node, total)
        elif node.op_type == "MultiHeadAttention":
            rows, width = self.rows(node.inputs[0]), self.width(node.inputs[0])
            packed = len([name for name in node.inputs[:3] if name]) == 1
            total.attention += 4 * rows * rows * (width // 3 if packed else width)

    def _add_decoder_attention(self, node: Node, total: Cost) -> None:
        owner, past = node, node.inputs[3]
        while past not in self._graph.inputs:
            maker = self._makers[past]
            if maker.op_type == "DequantizeLinear":
                past = maker.inputs[0]
            else:  # reads what another layer has written
                owner, past = maker, maker.inputs[3]
        head_size = self._graph.inputs[past][3]
        assert isinstance(head_size, int)
        window = owner.attributes.get("local_window_size", -1)
        rows, length = self.rows(node.inputs[0]), self._past + self._tokens
        seen = [min(place + 1, window) if window > 0 else place + 1 for place in range(length - rows, length)]
        total.attention += 4 * node.attributes["num_heads"] * head_size * sum(seen)
        first = seen[0] + rows - 1  # of the first row; later rows see further
        kept = min(length, first) if window > 0 else length
        width = node.attributes["kv_num_heads"] * head_size * self._graph.input_bits[past] // 8
        total.state_bytes += 2 * width * kept
