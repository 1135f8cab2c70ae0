"""The embedded demo: the shipped bundle is what our exporter makes of the checkpoint, and it does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image as PillowImage

from siglance.engine import Bundle, Engine, Image, Text
from siglance.engine.bundle import demo_folder
from siglance.export.demo.evaluate import evaluate
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

DATA = Path(__file__).parent / "data"
CONTEXT = 2048  # of the shipped bundle


@pytest.fixture(scope="module")
def demo():
    with Engine.open("demo") as engine:
        yield engine


def nodes_of(path: Path) -> list[tuple[str, str, list[str], list[str]]]:
    graph = onnx.load(path, load_external_data=False).graph
    return [(node.op_type, node.name, list(node.input), list(node.output)) for node in graph.node]


def test_the_shipped_bundle_is_the_export_of_the_checkpoint(tmp_path):
    """Up to what depends on the machine and the tools: versions, hashes, the last digit of a cosine."""
    export(DATA / "demo", tmp_path / "demo", ExportOptions(context=CONTEXT))
    shipped, made = demo_folder(), tmp_path / "demo"
    assert {path.name for path in made.iterdir()} == {path.name for path in shipped.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (shipped / name).read_bytes()
    for name in ("vision.onnx", "embed.onnx", "decoder.onnx"):
        assert nodes_of(made / name) == nodes_of(shipped / name)
    weights = [np.fromfile(folder / "weights.bin", np.float32) for folder in (made, shipped)]
    np.testing.assert_allclose(*weights, atol=1e-6)
    manifests = [json.loads((folder / "siglance.json").read_text()) for folder in (made, shipped)]
    files = [manifest.pop("files") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert files[0].keys() == files[1].keys()


def test_the_shipped_bundle_verifies(demo):
    assert demo.verify().result in ("equal", "close")


def test_the_demo_exercises_every_mechanism(demo):
    """So that tests of decoding, caching and stopping run on all of them."""
    kinds = {pair.kind for pair in demo.manifest.state}
    assert kinds == {"global", "window"}
    assert "per_layer_inputs" in demo.runtime.decoder.inputs
    assert "logit_rows:last" in demo.manifest.requires
    config = json.loads((DATA / "demo" / "config.json").read_text())["text_config"]
    assert config["num_kv_shared_layers"] > 0
    assert config["sliding_window"] < 100


def test_it_answers_about_the_picture_of_the_readme(demo):
    picture = demo.encode(DATA / "scene.png")

    def ask(question: str):
        return demo.generate([picture, Text(question)], max_tokens=100)

    assert ask("describe").text == (
        "A red circle, a yellow circle, a blue triangle and a green square. There is a sign."
    )
    assert ask("count").text == "4"
    assert ask("read").text == "BUS"
    assert ask("detect purple square").text == "[]"
    [box] = ask("detect red circle").boxes
    assert box.label == "red circle"
    np.testing.assert_allclose(box.box, (180, 13, 251, 84), atol=10)
    assert [found.label for found in ask("detect all").boxes] == [
        *("red circle", "yellow circle", "blue triangle", "green square")
    ]


def test_a_sample_of_held_out_scenes(demo):
    """30 scenes; the full 500 are scored by benchmarks/demo_accuracy.py. All limits are far below the scores there."""

    def generate(image: PillowImage.Image, question: str, budget: int) -> str:
        return demo.generate([Image(image, budget), Text(question)], max_tokens=200).text

    report = evaluate(generate, count=30)
    assert report.recall[report.default_budget] >= 0.9
    assert report.exact["describe"] >= 0.9
    assert report.exact["count"] >= 0.9


@pytest.mark.parametrize("budget", [9, 16, 25, 36])
def test_predicted_counts_hold_for_every_shape(demo, budget):
    for size in ((1, 1), (640, 480), (3000, 100), (97, 1025)):
        image = Image(PillowImage.new("RGB", size, "white"), budget)
        counted = demo.count_tokens([image])["image"]
        assert counted == len(demo.encode(image)) <= budget


def test_chunks_and_steps_agree_on_the_trained_model(demo):
    """Beyond the window of 64: one chunk, small chunks, token by token."""
    ids = np.random.default_rng(0).integers(110, 700, 150)
    expected = demo.runtime.session().prefill(ids)
    for chunk in (64, 8, 3, 1):
        np.testing.assert_allclose(demo.runtime.session().prefill(ids, chunk=chunk), expected, atol=1e-3)


def test_it_is_small():
    parameters = 0
    from safetensors import safe_open

    with safe_open(DATA / "demo" / "model.safetensors", "numpy") as file:
        parameters = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert 1_000_000 <= parameters <= 6_000_000
    assert sum(path.stat().st_size for path in demo_folder().iterdir()) < 12_000_000
    assert Bundle.open("demo").manifest.context == CONTEXT
