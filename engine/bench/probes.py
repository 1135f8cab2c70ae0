"""How fast this machine reads memory and multiplies matrices, measured through onnxruntime.

Each probe is a graph of one operator on the threads that the bundle runs on: what the machine gives to the best code
that is there, not what its data sheet says. A rate is the best of several runs, because everything that disturbs a run
makes it slower.

Bandwidth: the maximum of a float32 array that no cache holds. Neighbours on the machine change it from one second to
the next, so it is measured beside each round of what it is compared with, and the median counts. GEMV: one row times a
matrix in the format of the bundle, of the sizes that caches hold, the best of them: what the processor can compute when
memory does not bind it. GEMM: as many rows as a chunk of a prompt or a picture has.

The runtime's own work: a chain of additions of single numbers, which is little else. How much longer a long chain takes
than a short one is the cost of a node, an upper bound because it has the addition in it; the rest is that of a run.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..graph import Device, Graph, tensor
from ..protobuf import message
from .traffic import Format

__all__ = ["Probes", "chain_model"]

_READ_BYTES = 256 << 20
_READ_ROWS = 64  # rows of that array: onnxruntime gives each thread some
_GEMV_BYTES = (256 << 10, 1 << 20, 4 << 20)  # of a matrix
_GEMM_OUTPUTS = 2048
_SECONDS = 0.15  # of a probe, after its first run
_MOST_RUNS = 200
_CHAINS = (2, 402)  # nodes
_FLOAT, _UINT8, _INT64, _HALF = 1, 2, 7, 10  # TensorProto.DataType


class Probes:
    """Measured rates of this machine with so many threads.

    Products are measured once, when they are asked for, bandwidth as often as `read` is called.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter):
        self._threads = threads
        self._clock = clock
        self._reads: list[float] = []
        self._products: dict[tuple[Format, int, int], float] = {}

    def read(self) -> None:
        """Measure the bandwidth once more."""
        self._reads.append(self._measure_bandwidth())

    def bandwidths(self) -> list[float]:
        """Bytes read a second, each time that it was measured: once at least."""
        if not self._reads:
            self.read()
        return list(self._reads)

    def bandwidth(self) -> float:
        """Bytes read a second: the median."""
        return statistics.median(self.bandwidths())

    def product(self, format: Format, inputs: int, rows: int) -> float:
        """Operations a second of products with matrices of a format, [., inputs], on so many rows."""
        if (format, inputs, rows) not in self._products:
            if rows == 1:
                sizes = [max(64, size * 8 // (format.bits * inputs) // 64 * 64) for size in _GEMV_BYTES]
            else:
                sizes = [_GEMM_OUTPUTS]
            rates = [self._measure_product(format, inputs, outputs, rows) for outputs in sizes]
            self._products[format, inputs, rows] = max(rates)
        return self._products[format, inputs, rows]

    def products(self) -> dict[tuple[Format, int, int], float]:
        """What `product` has measured so far, by format, inputs and rows."""
        return dict(self._products)

    def runtime(self) -> tuple[float, float]:
        """Seconds that onnxruntime spends around the kernels: for each run of a graph, and for each of its nodes."""
        one = np.ones(1, np.float32)
        short, long = (self._best(chain_model(length), one, np.empty(1, np.float32)) for length in _CHAINS)
        node = max(long - short, 0.0) / (_CHAINS[1] - _CHAINS[0])
        return max(short - _CHAINS[0] * node, 0.0), node

    def _measure_bandwidth(self) -> float:
        # Not zeros: those would be one page of memory, mapped many times.
        values = np.ones((_READ_ROWS, _READ_BYTES // 4 // _READ_ROWS), np.float32)
        axes = _tensor("axes", _INT64, (1,), np.array([1], np.int64))
        node = _node("ReduceMax", ("x", "axes"), "", {"keepdims": 0})
        model = _model([node], [axes], [_READ_ROWS, values.shape[1]], [_READ_ROWS])
        return values.nbytes / self._best(model, values, np.empty(_READ_ROWS, np.float32))

    def _measure_product(self, format: Format, inputs: int, outputs: int, rows: int) -> float:
        generator = np.random.default_rng(0)
        if format.block:
            blocks = inputs // format.block
            shape = (outputs, blocks, format.block * format.bits // 8)
            codes = generator.integers(0, 256, shape, np.uint8)
            scales = generator.uniform(0.5, 1.5, (outputs, blocks)).astype(np.float32)
            weights = [
                _tensor("codes", _UINT8, shape, codes),
                _tensor("scales", _FLOAT, (outputs, blocks), scales),
            ]
            attributes = {"K": inputs, "N": outputs, "bits": format.bits, "block_size": format.block}
            attributes["accuracy_level"] = format.level
            node = _node("MatMulNBits", ("x", "codes", "scales"), "com.microsoft", attributes)
        else:
            dtype, kind = (np.float16, _HALF) if format.bits == 16 else (np.float32, _FLOAT)
            matrix = generator.normal(0, 1, (inputs, outputs)).astype(dtype)
            weights = [_tensor("w", kind, (inputs, outputs), matrix)]
            node = _node("MatMul", ("x", "w"), "", {})
        half = format.bits == 16 and not format.block
        kind, dtype = (_HALF, np.float16) if half else (_FLOAT, np.float32)
        model = _model([node], weights, [rows, inputs], [rows, outputs], kind)
        x = generator.normal(0, 1, (rows, inputs)).astype(dtype)
        return 2 * rows * inputs * outputs / self._best(model, x, np.empty((rows, outputs), dtype))

    def _best(self, model: bytes, x: np.ndarray, y: np.ndarray) -> float:
        """Seconds of the fastest run."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.onnx"
            path.write_bytes(model)
            graph = Graph(path, Device("cpu"), threads=self._threads)
        binding = graph.bind()
        binding.bind_cpu_input("x", x)
        binding.bind_ortvalue_output("y", tensor(y))
        graph.run_bound(binding)
        best, spent = float("inf"), 0.0
        for _ in range(_MOST_RUNS):
            begin = self._clock()
            graph.run_bound(binding)
            took = self._clock() - begin
            best, spent = min(best, took), spent + took
            if spent > _SECONDS:
                break
        return best


def chain_model(length: int) -> bytes:
    """A model of so many additions of a constant to one number, each of the result of the one before."""
    names = ["x", *(f"sum.{index}" for index in range(1, length)), "y"]
    nodes = [_node("Add", (before, "w"), "", {}, after) for before, after in itertools.pairwise(names)]
    return _model(nodes, [_tensor("w", _FLOAT, (1,), np.ones(1, np.float32))], [1], [1])


def _model(nodes: list[bytes], weights: list[bytes], given: list[int], made: list[int], kind: int = _FLOAT) -> bytes:
    """A model `x` -> `y`."""
    graph = message(
        *((1, node) for node in nodes),
        (2, "probe"),
        *((5, weight) for weight in weights),
        (11, _declaration("x", kind, given)),
        (12, _declaration("y", kind, made)),
    )
    versions = [message((1, domain), (2, version)) for domain, version in (("", 20), ("com.microsoft", 1))]
    return message((1, 10), (7, graph), *((8, version) for version in versions))


def _node(operator: str, inputs: tuple[str, ...], domain: str, attributes: dict[str, int], output: str = "y") -> bytes:
    integer = 2  # AttributeProto.AttributeType
    return message(
        *((1, name) for name in inputs),
        (2, output),
        (4, operator),
        *((5, message((1, name), (3, value), (20, integer))) for name, value in attributes.items()),
        (7, domain),
    )


def _tensor(name: str, kind: int, shape: tuple[int, ...], values: np.ndarray) -> bytes:
    return message(*((1, size) for size in shape), (2, kind), (8, name), (9, values.tobytes()))


def _declaration(name: str, kind: int, shape: list[int]) -> bytes:
    dimensions = message(*((1, message((1, size))) for size in shape))
    return message((1, name), (2, message((1, message((1, kind), (2, dimensions))))))
