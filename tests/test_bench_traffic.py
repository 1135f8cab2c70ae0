"""What a run reads and computes: against counts by hand, and against onnx-ir's reading of the same files."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siglance.engine import protobuf
from siglance.engine.bench.graph_file import read_graph
from siglance.engine.bench.traffic import Cost, Format, GraphCost, Traffic
from siglance.engine.bundle import Bundle
from siglance.engine.errors import BundleError
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import tiny

FP32, INT8, INT4 = Format(32), Format(8, 32, 4), Format(4, 32, 4)
POSITION = 37


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """(config, bundles by precision) of the tiny Gemma 3."""
    folder = tmp_path_factory.mktemp("bench")
    tiny.write_gemma3(folder / "checkpoint")
    for precision in ("fp32", "int8", "int4"):
        export(folder / "checkpoint", folder / precision, ExportOptions(context=600, precision=precision))
    config = json.loads((folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    return config, {name: Bundle.open(folder / name) for name in ("fp32", "int8", "int4")}


def matrices(config) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(in, out) of the matrices of all layers, and of the head."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layer += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return layer * config["num_hidden_layers"], (hidden, config["vocab_size"])


def vectors(config) -> int:
    """Numbers in the norms of the decoder: four a layer and the last one, and those of queries and keys."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    return layers * (4 * hidden + 2 * config["head_dim"]) + hidden


def state_rows(config, length: int) -> list[int]:
    """Rows of keys that the last row sees, by layer."""
    window = config["sliding_window"]
    return [min(length, window) if kind == "sliding_attention" else length for kind in config["layer_types"]]


def test_bytes_and_operations_of_a_step_equal_a_count_by_hand(gemma3):
    config, bundles = gemma3
    blocks, head = matrices(config)
    size, heads, groups = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    found = Traffic(bundles["fp32"]).step(POSITION)
    count = sum(inputs * outputs for inputs, outputs in [*blocks, head])
    weights = 4 * (count + vectors(config))
    # Constants (shapes, axes, factors) are weights too: a few dozen bytes a node, never as much as a row.
    assert weights <= found.weight_bytes <= weights + 64 * 40
    rows = state_rows(config, POSITION + 1)
    assert found.state_bytes == sum(rows) * 2 * groups * size * 4
    # One row of the embedding, and for each layer one of each rotary table, half a head wide.
    assert found.lookup_bytes == 4 * config["hidden_size"] + config["num_hidden_layers"] * 2 * (size // 2) * 4
    assert found.products == {FP32: 2 * count}
    assert found.attention == 4 * heads * size * sum(rows)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_are_counted_with_their_scales(gemma3, precision):
    """A block of b weights of n bits has a scale of 32: whatever blocks the export chose for each matrix."""
    config, bundles = gemma3
    blocks, head = matrices(config)
    found = Traffic(bundles[precision]).step(POSITION)
    assert sum(found.products.values()) == 2 * sum(inputs * outputs for inputs, outputs in [*blocks, head])
    assert all(format.block for format in found.products)
    codes = sum(count // 2 * (format.bits + 32 / format.block) / 8 for format, count in found.products.items())
    weights = codes + 4 * vectors(config)
    assert weights <= found.weight_bytes <= weights + 64 * 40


@pytest.fixture
def two_products(tmp_path):
    """A graph x [1, tokens, 32] -> 64 of all rows -> 16 of the rows asked for, the second matrix in int4 blocks."""
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([1, "tokens", 32]))
    rows = ir.val("logit_rows", ir.DataType.INT64, ir.Shape(["logit_rows"]))
    arrays = {
        "first": np.zeros((32, 64), np.float32),
        "table": np.zeros((100, 64), np.float32),
        "codes": np.zeros((16, 2, 16), np.uint8),
        "scales": np.zeros((16, 2), np.float32),
    }
    weights = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    product = ir.node("MatMul", [x, weights["first"]])
    taken = ir.node("Gather", [product.outputs[0], rows], attributes={"axis": 1})
    looked_up = ir.node("Gather", [weights["table"], rows])
    added = ir.node("Add", [taken.outputs[0], looked_up.outputs[0]])
    last = ir.node(
        "MatMulNBits",
        [added.outputs[0], weights["codes"], weights["scales"]],
        domain="com.microsoft",
        attributes={"K": 64, "N": 16, "bits": 4, "block_size": 32, "accuracy_level": 4},
    )
    nodes = [product, taken, looked_up, added, last]
    versions = {"": 20, "com.microsoft": 1}
    graph = ir.Graph([x, rows], last.outputs, nodes=nodes, initializers=list(weights.values()), opset_imports=versions)
    path = tmp_path / "two.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


@given(tokens=st.integers(1, 1000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_have_the_rows_of_their_inputs(two_products, tokens):
    """All rows before the rows are taken whose logits are wanted, one behind; a table is read by rows."""
    found = GraphCost(read_graph(two_products), tokens=tokens).cost()
    assert found.products == {FP32: 2 * tokens * 32 * 64, INT4: 2 * 64 * 16}
    assert found.weight_bytes == 4 * 32 * 64 + 16 * 2 * (16 + 4)
    assert found.lookup_bytes == 4 * 64
    assert (found.state_bytes, found.attention) == (0, 0)


def test_one_row_and_more_take_their_own_branches(gemma3):
    """States of 8 bits: attention of a step and of a chunk are different nodes, and only one of them runs."""
    _, bundles = gemma3
    exact, int4 = Traffic(bundles["fp32"]), Traffic(bundles["int4"])
    for tokens, past in ((1, 0), (1, 37), (5, 0)):
        expected, found = (traffic.prompt(past + tokens, tokens) for traffic in (exact, int4))
        assert found.attention == expected.attention
        assert found.state_bytes == expected.state_bytes / 4
        assert sum(found.products.values()) == sum(expected.products.values())


def test_a_prompt_reads_the_weights_once_a_chunk_and_sees_what_is_before_each_row(gemma3):
    config, bundles = gemma3
    traffic = Traffic(bundles["fp32"])
    found = traffic.prompt(48, 20)
    assert found.weight_bytes == 3 * traffic.step(0).weight_bytes
    seen = [sum(state_rows(config, position + 1)) for position in range(48)]
    assert found.attention == 4 * config["num_attention_heads"] * config["head_dim"] * sum(seen)
    steps = sum((traffic.step(position) for position in range(48)), Cost())
    assert traffic.prompt(48, 1).products == steps.products
    assert found.operations < steps.operations


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("int8", 4), ("int4", 1)])
def test_a_window_ends_the_growth_of_what_is_read(precision, size, gemma3):
    config, bundles = gemma3
    traffic = Traffic(bundles[precision])
    width = 2 * config["num_key_value_heads"] * config["head_dim"] * size
    window = config["sliding_window"]
    growing = config["layer_types"].count("full_attention")
    assert growing < len(config["layer_types"])
    for position in (window, window + 1, 4 * window):
        assert traffic.step(position + 1).state_bytes - traffic.step(position).state_bytes == growing * width


def test_layers_that_share_a_state_read_it_again(tiny_model):
    """Gemma 4: as many reads as layers, though fewer layers own a state."""
    model = tiny_model("gemma4")
    config = json.loads((model.checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    owners = sum(pair.input.endswith("key") for pair in model.bundle.manifest.state)
    layers = config["num_hidden_layers"]
    assert owners < layers
    # Position 0: every layer sees one row of its own size.
    wider = {int(layer): facts["head_dim"] for layer, facts in config["per_layer_config"].items()}
    sizes = [wider.get(layer, config["head_dim"]) for layer in range(layers)]
    expected = sum(2 * config["num_key_value_heads"] * size * 4 for size in sizes)
    assert Traffic(model.bundle).step(0).state_bytes == expected


def test_the_vision_graph_equals_a_count_by_hand(tiny_model):
    model = tiny_model("gemma4")
    vision = json.loads((model.checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]
    hidden, inner, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patches = 36
    found = Traffic(model.bundle).vision(patches)
    products = layers * (4 * hidden**2 + 3 * hidden * inner) + 3 * vision["patch_size"] ** 2 * hidden
    pooled = patches // model.bundle.manifest.image.pool_size**2
    assert found.operations - found.attention == 2 * (patches * products + pooled * hidden * model.runtime.hidden)
    assert found.attention == layers * 4 * patches**2 * hidden
    assert found.state_bytes == 0


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_graphs_are_read_as_onnx_ir_reads_them(tiny_model, family):
    bundle = tiny_model(family).bundle
    for name in ("vision", "embed", "decoder"):
        if name not in bundle.manifest.files:
            continue
        expected, found = ir.load(bundle.path(name)).graph, read_graph(bundle.path(name))
        assert [(node.op_type, [(value and value.name) or "" for value in node.inputs]) for node in expected] == [
            (node.op_type, list(node.inputs)) for node in found.nodes
        ]
        stored = {name: value.const_value for name, value in expected.initializers.items()}
        assert {name: (weight.shape, weight.nbytes) for name, weight in found.weights.items()} == {
            name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in stored.items()
        }
        for weight in found.weights.values():
            if weight.is_integer and weight.values:
                np.testing.assert_array_equal(weight.values, stored[weight.name].numpy().ravel())
        for node, other in zip(found.nodes, expected, strict=True):
            for key, value in node.attributes.items():
                assert value == other.attributes[key].value
        shapes = {value.name: [str(size) for size in value.shape] for value in expected.inputs}
        assert {name: [str(size) for size in shape] for name, shape in found.inputs.items()} == shapes


def test_experts_are_read_as_many_times_as_rows_choose_them(tiny_model):
    """Gemma 4 26B: one row reads its k experts of E; enough rows read all of them, and none of them twice."""
    model = tiny_model("gemma4_experts")
    config = json.loads((model.checkpoint / "config.json").read_text(encoding="utf-8"))["text_config"]
    count, used, hidden = config["num_experts"], config["top_k_experts"], config["hidden_size"]
    layers, expert = config["num_hidden_layers"], 3 * config["moe_intermediate_size"] * hidden
    graph = read_graph(model.bundle.path("decoder"))
    one, many = (GraphCost(graph, tokens=tokens).cost() for tokens in (1, 100))
    narrow = layers * config["head_dim"] * 4 * 2 * 2  # more than a row of the rotary tables
    assert used < count
    assert 0 <= one.lookup_bytes - 4 * layers * used * expert <= narrow
    # The last layer is for the last row alone.
    assert 0 <= many.lookup_bytes - 4 * ((layers - 1) * count + used) * expert <= 100 * narrow
    # The operations are those of every row's own experts, however they are gathered.
    gate_up = (hidden, 2 * config["moe_intermediate_size"])
    assert one.shapes[FP32][gate_up] >= 2 * used * gate_up[0] * gate_up[1] * layers


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=300))))
def test_written_messages_are_read_again(values):
    found = [
        (number, protobuf.signed(value) if isinstance(value, int) else bytes(value))
        for number, value in protobuf.fields(memoryview(protobuf.message(*values)))
    ]
    assert found == values


@given(st.binary(max_size=200))
def test_files_that_are_no_graphs_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "no.onnx"
    path.write_bytes(data)
    with contextlib.suppress(BundleError):  # and nothing else; some bytes are an empty graph
        assert not read_graph(path).nodes or data


def test_costs_add_up():
    a, b = Cost(weight_bytes=1, attention=2), Cost(state_bytes=4, lookup_bytes=8)
    a.product(INT4, (2, 3), 12)
    b.product(INT4, (2, 3), 24)
    b.product(INT8, (4, 5), 40)
    both = a + b
    assert (both.nbytes, both.operations) == (13, 78)
    assert both.products == {INT4: 36, INT8: 40}
    assert both.main_shape(INT4) == (2, 3)
    assert str(INT4) == "int4 block 32 level 4"
