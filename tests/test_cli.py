"""The command line: what it prints, what it writes, and one line for everything that goes wrong."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from siglance.engine import Engine, Sampling, Text, cli
from siglance.engine.manifest import MANIFEST_NAME
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export
from siglance.export.families import ExportOptions


@pytest.fixture(scope="module")
def seeing(tiny_model):
    """Folder of a tiny bundle with text and pictures."""
    return tiny_model("gemma4").bundle.folder


@pytest.fixture(scope="module")
def reading(tiny_model):
    """Folder of a tiny bundle with text only."""
    return tiny_model("gemma3").bundle.folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(formula_picture(120, 200)).save(path)
    return path


@pytest.fixture
def siglance(monkeypatch, capsys):
    """siglance(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        # The tiny checkpoints sample by default, like the real ones; tests want the same answer twice.
        if arguments[:1] == ("run",) and "--temperature" not in arguments:
            arguments = (*arguments, "--temperature", 0)
        monkeypatch.setattr(sys, "argv", ["siglance", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


# --- run


def test_run_prints_the_answer_alone_on_stdout(siglance, seeing, photo):
    code, out, err = siglance("run", seeing, "-i", photo, "-p", "what?", "--max-tokens", 8)
    with Engine.open(seeing) as engine:
        assert out == engine.generate([photo, "what?"], max_tokens=8, sampling=Sampling(temperature=0)).text + "\n"
    assert code == 0
    assert "prompt tokens" in err
    assert len(err.splitlines()) == 1


def test_run_json(siglance, seeing, photo):
    code, out, err = siglance("run", seeing, "-i", photo, "-p", "what?", "--max-tokens", 8, "--json", "--seed", 3)
    assert (code, err) == (0, "")
    reply = json.loads(out)
    assert list(reply) == [
        *("text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "timings_ms"),
        *("boxes", "truncated", "thought", "thought_finished", "tool_calls", "malformed_calls", "logprobs"),
        *("sampling", "device", "providers"),
    ]
    assert reply["finish_reason"] in ("stop_id", "stop_text", "length", "context")
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(reply["prompt_token_ids"]) == sum(usage["by_modality"].values())
    assert usage["completion_tokens"] == len(reply["token_ids"]) <= 8
    stages = ("decode_file", "resize", "vision", "prefill", "first_token", "per_token", "total")
    assert set(reply["timings_ms"]) == {*stages, "audio"}
    assert reply["timings_ms"]["audio"] == 0
    assert all(reply["timings_ms"][stage] > 0 for stage in stages)
    assert reply["timings_ms"]["total"] >= reply["timings_ms"]["first_token"] >= reply["timings_ms"]["prefill"]
    assert reply["sampling"]["seed"] == 3
    assert reply["device"] == "cpu"
    assert set(reply["providers"]) == {"vision", "embed", "decoder"}


def test_budgets(siglance, seeing, photo, tmp_path):
    """FILE@BUDGET beats --image-tokens, which beats the default; a file whose name ends like a budget is that file."""
    odd = tmp_path / "photo@70"
    shutil.copy(photo, odd)

    def image_tokens(*arguments: object) -> int:
        _, out, _ = siglance("count-tokens", seeing, *arguments, "--json")
        return json.loads(out)["image"]

    small, medium, default = (
        image_tokens("-i", f"{photo}@70"),
        image_tokens("-i", photo, "--image-tokens", 140),
        image_tokens("-i", photo),
    )
    assert small < medium < default
    assert image_tokens("-i", f"{photo}@70", "--image-tokens", 140) == small
    assert image_tokens("-i", odd) == default
    assert image_tokens("-i", f"{photo}@70", "-i", photo) == small + default
    assert image_tokens("-i", f"{odd}@70") == small
    uri = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    assert image_tokens("-i", uri) == default
    assert image_tokens("-i", f"{uri}@70") == small


def test_stop_and_raw_and_system_reach_the_engine(siglance, reading):
    _, plain, _ = siglance("run", reading, "-p", "a", "--max-tokens", 20, "--json")
    text = json.loads(plain)["text"]
    stop = text[2:4]
    _, stopped, _ = siglance("run", reading, "-p", "a", "--max-tokens", 20, "--stop", "never", "--stop", stop, "--json")
    assert json.loads(stopped)["text"] == text[: text.index(stop)]
    assert json.loads(stopped)["finish_reason"] == "stop_text"
    ids = {
        option: json.loads(siglance("run", reading, "-p", "a", *option, "--max-tokens", 1, "--json")[1])[
            "prompt_token_ids"
        ]
        for option in ((), ("--raw",), ("--system", "b"))
    }
    assert len(ids[("--raw",)]) < len(ids[()]) < len(ids[("--system", "b")])


def test_prompt_ids_and_chunks(siglance, reading, tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([2, *range(100, 130)]))
    replies = [
        json.loads(siglance("run", reading, "--prompt-ids", file, "--max-tokens", 6, "--json", *more)[1])
        for more in ((), ("--prefill-chunk", 7), ("--prefill-chunk", 1))
    ]
    assert replies[0]["prompt_token_ids"] == [2, *range(100, 130)]
    assert replies[0]["token_ids"] == replies[1]["token_ids"] == replies[2]["token_ids"]


def test_logits(siglance, seeing, photo, tmp_path):
    file = tmp_path / "logits.npy"
    code, out, _ = siglance("run", seeing, "-i", photo, "-p", "hi", "--max-tokens", 1, "--logits", file, "--json")
    assert code == 0
    rows = np.load(file)
    assert rows.dtype == np.float32
    with Engine.open(seeing) as engine:
        assert rows.shape == (len(json.loads(out)["prompt_token_ids"]), engine.runtime.vocabulary)
        np.testing.assert_allclose(rows, engine.prompt_logits([photo, Text("hi")]), atol=1e-5)
    assert int(rows[-1].argmax()) == json.loads(out)["token_ids"][0]


def test_draw(siglance, seeing, photo, tmp_path):
    file = tmp_path / "boxes.png"
    code, _, _ = siglance("run", seeing, "-i", photo, "-p", "detect", "--max-tokens", 4, "--draw", file)
    assert code == 0
    with Image.open(file) as drawn:
        assert drawn.size == (200, 120)


# --- the other commands


def test_export_then_verify_then_inspect(siglance, tiny_model, tmp_path):
    source = tiny_model("gemma4").checkpoint
    code, out, err = siglance("export", source, "-o", tmp_path / "bundle", "--context", 128)
    assert (code, err) == (0, "")
    assert "vision" in out
    code, out, _ = siglance("verify", tmp_path / "bundle", "--json")
    report = json.loads(out)
    assert (code, report["result"]) == (0, "equal")
    assert report["argmax_agreement"] == 1.0
    assert {case["name"] for case in report["cases"]} == {"text", "image"}
    assert siglance("verify", tmp_path / "bundle")[1].startswith("equal")
    facts = json.loads(siglance("inspect", tmp_path / "bundle", "--json")[1])
    assert facts["context"] == 128
    assert facts["decoder_wires"]["inputs_embeds"] == "embed"
    assert facts["decoder_wires"]["past.0.key"] == "state (window)"
    graph = json.loads(siglance("inspect", tmp_path / "bundle" / "vision.onnx", "--json")[1])
    assert set(graph["inputs"]) == {"patches", "positions"}
    assert "patches: uint8 [patches, 768]" in siglance("inspect", tmp_path / "bundle")[1]


def test_what_an_export_could_not_do_as_asked_is_said_on_stderr(siglance, tiny_model, tmp_path):
    source = tiny_model("gemma4").checkpoint
    code, out, err = siglance("export", source, "-o", tmp_path / "bundle", "--context", 9999)
    assert code == 0
    assert "note" not in out
    assert err == "  note: the context is 1024 tokens, all that the model was made for, and not 9999\n"


def test_verify_says_wrong_and_exits_with_3(siglance, seeing, tmp_path):
    """Weights that are a little off: the self-test notices, whatever the hashes say."""
    import hashlib

    folder = tmp_path / "bundle"
    shutil.copytree(seeing, folder)
    expected = json.loads((folder / "self_test.json").read_text())
    for step in expected["cases"][0]["steps"]:
        step["logits"] = [value + 3 for value in step["logits"]]
    data = json.dumps(expected).encode()
    (folder / "self_test.json").write_bytes(data)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    fact = {"path": "self_test.json", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["self_test"] = fact
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    code, out, _ = siglance("verify", folder, "--json")
    assert code == 3
    assert json.loads(out)["result"] == "wrong"
    assert json.loads(out)["max_logit_difference"] == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--bogus"], ["run", "--bogus"], ["run", "--max-tokens", "many"], ["nope"], ["export"]),
        *(["run", "--feature-cache", ""], ["serve", "--feature-cache", ""], ["export", "x", "-o", ""]),
    ],
)
def test_wrong_use_exits_with_2(siglance, arguments):
    assert siglance(*arguments)[0] == 2


def test_help(siglance):
    code, out, _ = siglance("--help")
    assert code == 0
    for command in ("run", "export", "verify", "inspect", "count-tokens"):
        assert command in out


def test_it_is_also_a_module(seeing):
    done = subprocess.run(
        [sys.executable, "-m", "siglance.engine", "verify", seeing],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("equal")


# --- bad input: one line, exit code 1, nothing written


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, and that has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.fixture
def refused(siglance, tmp_path):
    """refused(bundle, *arguments, named=[...]): the run fails in one line that holds all of `named`."""

    def check(bundle, *arguments, named):
        outputs = tmp_path / "outputs"
        outputs.mkdir()
        more = ["--logits", outputs / "logits.npy", "--max-tokens", 4]
        code, out, err = siglance("run", bundle, *arguments, *more)
        assert code == 1
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("siglance: ")
        for word in named:
            assert str(word) in err, err
        assert list(outputs.iterdir()) == []

    return check


def test_no_such_file(refused, seeing, tmp_path):
    refused(seeing, "-i", tmp_path / "no.png", "-p", "x", named=["image 1", "no.png"])


def test_not_an_image(refused, seeing, photo, tmp_path):
    (tmp_path / "page.jpg").write_text("<html><body>404</body></html>")
    refused(seeing, "-i", photo, "-i", tmp_path / "page.jpg", named=["image 2", "page.jpg"])


def test_a_truncated_image(refused, seeing, photo, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    refused(seeing, "-i", path, named=["image 1", "cut.png"])


def test_a_bomb_of_60_megapixels(refused, seeing, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(10_000, 6_000))
    refused(seeing, "-i", path, named=["bomb.png", "10000", "6000", "50000000"])


def test_an_unknown_budget(refused, seeing, photo):
    refused(seeing, "-i", f"{photo}@300", named=["image 1", "300", "70, 140, 280, 560, 1120"])


def test_an_unknown_budget_for_all(siglance, seeing, photo):
    code, _, err = siglance("run", seeing, "-i", photo, "--image-tokens", 71)
    assert code == 1
    assert "71" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "empty"), (["-p", ""], "empty"), (["--system", "be brief"], "empty"), (["-p", "  "], "text or a medium")],
)
def test_an_empty_prompt_with_no_image(refused, seeing, arguments, named):
    refused(seeing, *arguments, named=[named])


def test_a_text_only_bundle_given_an_image(refused, reading, photo):
    refused(reading, "-i", photo, "-p", "x", named=["image 1", "no vision input", "text"])


def test_an_unknown_manifest_key(refused, seeing, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(seeing, folder)
    values = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**values, "colour": 1}))
    refused(folder, "-p", "x", named=[MANIFEST_NAME, "'colour'"])


def test_a_file_with_a_wrong_hash(refused, seeing, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(seeing, folder)
    data = bytearray((folder / "decoder.onnx").read_bytes())
    data[100] ^= 1
    (folder / "decoder.onnx").write_bytes(data)
    refused(folder, "-p", "x", named=["decoder.onnx", "SHA-256"])


def test_a_weights_file_cut_short(refused, seeing, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(seeing, folder)
    size = (folder / "weights.bin").stat().st_size
    with (folder / "weights.bin").open("r+b") as file:
        file.truncate(size - 1)
    refused(folder, "-p", "x", named=["weights.bin", size, size - 1])


def test_a_prompt_over_the_context(refused, tiny_model, tmp_path):
    export(tiny_model("gemma3").checkpoint, tmp_path / "short", ExportOptions(context=32))
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([2] * 33))
    refused(tmp_path / "short", "--prompt-ids", ids, named=["33", "32"])


def test_no_such_bundle(refused, tmp_path):
    refused(tmp_path / "nowhere", "-p", "x", named=["nowhere", MANIFEST_NAME])


@pytest.mark.parametrize("content", ["", "{}", "[1, 2.5]", '["a"]', "[99999999]", "[]", "[" * 100_000])
def test_prompt_ids_that_are_none(refused, reading, tmp_path, content):
    (tmp_path / "ids.json").write_text(content)
    refused(reading, "--prompt-ids", tmp_path / "ids.json", named=["id"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-p", "1.5"),
        ("--temperature", "-1"),
        ("--top-k", "-3"),
        ("--min-p", "2"),
        ("--seed", "-1"),
        ("--stop", ""),
    ],
)
def test_values_out_of_range_name_the_range(refused, reading, option, value):
    refused(
        reading, "-p", "x", option, value, named=[option.strip("-").replace("-", "_") if option != "--stop" else "stop"]
    )


def test_drawing_needs_one_picture(siglance, seeing, photo, tmp_path):
    out = tmp_path / "out.png"
    for images in ([], ["-i", photo, "-i", photo]):
        code, _, err = siglance("run", seeing, "-p", "x", *images, "--draw", out)
        assert code == 1
        assert "exactly one" in err
    assert not out.exists()


@pytest.mark.parametrize("name", ["out.nope", "out", "no/out.png", ""])
def test_a_drawing_that_cannot_be_written(refused, seeing, photo, tmp_path, name):
    refused(seeing, "-i", photo, "--draw", tmp_path / name, named=["--draw", tmp_path / name])


def test_a_file_that_is_there_survives_a_failed_drawing(refused, seeing, photo, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    refused(seeing, "-i", photo, "--draw", tmp_path / "notes.txt", named=["notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_a_full_disk_leaves_no_half_a_file(siglance, seeing, photo, tmp_path, monkeypatch):
    def full(file, rows):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    code, _, err = siglance("run", seeing, "-i", photo, "--max-tokens", 2, "--logits", tmp_path / "x.npy")
    assert code == 1
    assert "--logits" in err.splitlines()[-1]
    assert "No space left" in err.splitlines()[-1]
    assert not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("name", ["no/x.npy", ""])
def test_a_place_that_cannot_be_written_to(siglance, seeing, photo, tmp_path, name):
    code, out, err = siglance("run", seeing, "-i", photo, "--max-tokens", 2, "--logits", tmp_path / name)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert f"--logits {tmp_path / name}" in err


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x" * 5000 + "@70"])
def test_names_that_no_file_can_have(refused, seeing, name):
    refused(seeing, "-i", name, "-p", "x", named=["image 1"])


def test_a_bundle_name_that_no_folder_can_have(siglance):
    for name in ("x" * 300, "x/" * 3000, "a\0b"):
        code, out, err = siglance("run", name, "-p", "x")
        assert (code, out) == (1, "")
        assert err.startswith("siglance: no bundle")


def test_an_error_about_the_demo_is_one_line_too(refused, photo):
    refused("demo", "-i", f"{photo}@7", named=["image 1", "7"])
