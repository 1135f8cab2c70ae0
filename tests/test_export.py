"""Export: what cannot be exported is one clear error, and nothing that looks like a bundle is ever left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.manifest import MANIFEST_NAME
from siglance.engine.runtime import Runtime
from siglance.engine.self_test import replay
from siglance.export import builder, exporter
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, families, find_family

from . import tiny


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.write_gemma3(folder / "gemma3")
    tiny.write_gemma4(folder / "gemma4")
    return folder


@pytest.fixture(params=["gemma3", "gemma4"])
def source(request, checkpoints, tmp_path):
    """A checkpoint that a test may damage."""
    folder = tmp_path / "source" / request.param
    shutil.copytree(checkpoints / request.param, folder)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def refused(source: Path, tmp_path: Path, options: ExportOptions | None = None) -> str:
    """Export must fail, leave nothing behind and not touch the source; returns the message."""
    before = fingerprint(source) if source.is_dir() else {}
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError) as error:
        export(source, out / "bundle", options)
    assert list(out.iterdir()) == []
    assert (fingerprint(source) if source.is_dir() else {}) == before
    message = str(error.value)
    assert "\n" not in message
    return message


def change_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def some_tensor(source: Path) -> str:
    names = load_file(source / "model.safetensors")
    return next(name for name in sorted(names) if name.endswith("layers.1.self_attn.o_proj.weight"))


# --- what cannot be exported


def test_a_missing_tensor_is_named(source, tmp_path):
    name = some_tensor(source)
    change_tensors(source, lambda tensors: tensors.pop(name))
    assert name in refused(source, tmp_path)


def test_a_left_over_tensor_is_named(source, tmp_path):
    change_tensors(source, lambda tensors: tensors.update({"model.extra.weight": np.zeros((2, 2), np.float32)}))
    assert "model.extra.weight" in refused(source, tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(source, tmp_path):
    name = some_tensor(source)
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    message = refused(source, tmp_path)
    assert name in message
    assert "the configuration needs" in message


def test_a_tensor_of_integers_is_named(source, tmp_path):
    name = some_tensor(source)
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    message = refused(source, tmp_path)
    assert name in message
    assert "I8" in message


def test_a_checkpoint_cut_short_is_named(source, tmp_path):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in refused(source, tmp_path)


def test_an_unknown_model_lists_what_is_supported_before_any_weight_is_read(source, tmp_path):
    change_json(source / "config.json", model_type="llama")
    (source / "model.safetensors").write_bytes(b"not even a header")
    message = refused(source, tmp_path)
    assert "'llama'" in message
    for name in ("gemma3_text", "gemma4"):
        assert name in message


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}}, "rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_configuration_of_gemma3_that_is_not_supported(checkpoints, tmp_path, values, named):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    change_json(source / "config.json", **values)
    assert named in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"enable_moe_block": True}, "num_experts"),
        ({"attention_k_eq_v": True}, "v_proj"),
        ({"use_bidirectional_attention": "vision"}, "use_bidirectional_attention"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers"),
    ],
)
def test_configuration_of_gemma4_that_is_not_supported(checkpoints, tmp_path, values, named):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma4", source)
    text = json.loads((source / "config.json").read_text())["text_config"]
    change_json(source / "config.json", text_config={**text, **values})
    assert named in refused(source, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(source, tmp_path, name):
    (source / name).unlink()
    assert name.replace("model", "*") in refused(source, tmp_path).replace("model.safetensors", "*.safetensors")


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_json_object(source, tmp_path, content):
    (source / "config.json").write_text(content)
    assert "config.json" in refused(source, tmp_path)


def test_a_tokenizer_without_the_tokens_of_the_prompt(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma4", source)
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace('"<image|>"', '"<picture|>"'))
    assert "'<image|>'" in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ExportOptions(precision="int3"), "int3"),
        (ExportOptions(precision="fp16"), "--target cuda"),
        (ExportOptions(precision="fp32", target="cuda"), "precision 'fp32' is for --target cpu"),
        (ExportOptions(target="tpu"), "tpu"),
        (ExportOptions(context=0), "context"),
    ],
)
def test_options_that_are_not_supported(source, tmp_path, options, named):
    assert named in refused(source, tmp_path, options)


def test_no_such_source(tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("weight_map", [7, ["model.safetensors"], {"a": 7}, {"a": "../model.safetensors"}, {"a": "no"}])
def test_an_index_of_shards_that_is_none(source, tmp_path, weight_map):
    (source / "model.safetensors").rename(source / "other.safetensors")  # a single file would go before the index
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index" in refused(source, tmp_path)


def test_a_tokenizer_that_cannot_be_read(source, tmp_path):
    (source / "tokenizer.json").write_text("{}")
    assert re.match(r"tokenizer\.json cannot be read", refused(source, tmp_path))


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("config.json", {"eos_token_id": "<eos>"}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [1, None]}, "eos_token_id"),
        ("tokenizer_config.json", {"bos_token": {"text": "<bos>"}}, "bos_token"),
        ("tokenizer_config.json", {"bos_token": 2}, "bos_token"),
        ("generation_config.json", {"do_sample": True, "temperature": "hot"}, "temperature = 'hot'"),
        ("generation_config.json", {"do_sample": True, "top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_facts_of_the_wrong_type_are_named(checkpoints, tmp_path, file, values, named):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    change_json(source / file, **values)
    assert named in refused(source, tmp_path)


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "min_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_sampling_that_is_not_finite_is_refused_before_a_weight_is_read(checkpoints, tmp_path, key, value):
    """json.loads takes NaN and Infinity; the manifest does not, and would say so when all weights are written."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    (source / "model.safetensors").write_bytes(b"not even a header")
    change_json(source / "generation_config.json", **{"do_sample": True, key: value})
    assert f"generation_config.json: {key} = " in refused(source, tmp_path)


@pytest.mark.usefixtures("child_processes")
def test_weights_that_give_no_numbers(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    change_tensors(source, lambda tensors: tensors.update({"model.norm.weight": np.full(64, np.nan, np.float32)}))
    assert "not finite" in refused(source, tmp_path)


def test_a_context_without_room_for_the_self_test_names_both_numbers(source, tmp_path):
    message = refused(source, tmp_path, ExportOptions(context=8))
    assert "12 tokens" in message
    assert "holds 8" in message


def test_the_source_is_not_written_to(source):
    """Not even where the caller asks for it."""
    before = fingerprint(source)
    with pytest.raises(ExportError, match="inside the checkpoint's folder"):
        export(source, source / "bundle")
    assert fingerprint(source) == before


def test_new_folders_go_again_with_a_failed_export(source, tmp_path):
    (source / "tokenizer.json").unlink()
    with pytest.raises(ExportError):
        export(source, tmp_path / "new" / "deep" / "bundle")
    assert not (tmp_path / "new").exists()


def test_a_place_that_is_no_folder(source, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ExportError, match="file"):
        export(source, tmp_path / "file" / "bundle")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_output_that_is_a_link_to_nowhere_is_left_alone(source, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="exists already"):
        export(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_stays_the_folder_it_is(source, tmp_path):
    """Somebody has made it, with their rights; it may be the place of a mounted disk."""
    place = tmp_path / "mine"
    place.mkdir(mode=0o750)
    before = place.stat()
    export(source, place)
    assert (place.stat().st_ino, place.stat().st_mode) == (before.st_ino, before.st_mode)
    bundle = Bundle.open(place)
    assert bundle.manifest.name == "mine"
    assert {path.name for path in place.iterdir()} == {
        MANIFEST_NAME,
        *(fact.path for fact in bundle.manifest.files.values()),
    }


def test_an_empty_folder_is_empty_again_after_a_failure(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (source / "tokenizer.json").unlink()
    with pytest.raises(ExportError):
        export(source, tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_files_that_come_into_an_empty_folder_meanwhile_are_left_alone(source, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()

    def interfere(stage: str) -> None:
        if stage == "self-test":
            (place / "tokenizer.json").write_text("precious")

    with pytest.raises(ExportError, match=r"somebody else has put tokenizer\.json"):
        export(source, place, progress=interfere)
    assert [path.name for path in place.iterdir()] == ["tokenizer.json"]
    assert (place / "tokenizer.json").read_text() == "precious"


def test_the_working_directory_as_output_gives_the_bundle_its_name(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(source, Path())
    assert Bundle.open(Path()).manifest.name == "here"


def test_a_graph_that_cuda_cannot_run_is_not_written(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "broken_rules", lambda graph: ["a: one", "b: two", "c: three", "d: four"])
    message = refused(checkpoints / "gemma3", tmp_path, ExportOptions(precision="fp16", target="cuda"))
    assert "the graph 'decoder' does not suit --target cuda: a: one; b: two; c: three and 1 more" in message


def test_an_existing_output_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        export(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


# --- interrupted


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder.WeightsFile, "_write", full)
    assert "No space left" in refused(source, tmp_path)


def test_control_c_leaves_nothing(source, tmp_path):
    def interrupt(stage: str) -> None:
        if stage == "decoder":
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out" / "bundle", progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from siglance.export.exporter import export

def stage(name):
    if name == "self-test":
        os.kill(os.getpid(), signal.SIGKILL)

export(Path(sys.argv[1]), Path(sys.argv[2]), progress=stage)
"""


def test_a_killed_export_leaves_nothing_that_looks_like_a_bundle(source, tmp_path):
    """Killed at the last moment: all graphs and weights are written."""
    out = tmp_path / "out" / "bundle"
    done = subprocess.run([sys.executable, "-c", KILLED, source, out], cwd="/", check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.rglob("*.onnx")), "the export was killed too early for this test to say anything"
    assert not list(tmp_path.rglob(MANIFEST_NAME))


# --- what comes out


def test_nothing_but_provenance_differs_between_two_exports(source, tmp_path):
    for name in ("one", "two"):
        export(source, tmp_path / name / "bundle")
    one, two = fingerprint(tmp_path / "one" / "bundle"), fingerprint(tmp_path / "two" / "bundle")
    assert one == two


@pytest.mark.usefixtures("child_processes")
def test_a_new_bundle_verifies(source, tmp_path):
    export(source, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    report = replay(bundle, Runtime(bundle))
    assert report.result == "equal"
    assert {path.name for path in bundle.folder.iterdir()} == {
        MANIFEST_NAME,
        *(fact.path for fact in bundle.manifest.files.values()),
    }


@pytest.mark.usefixtures("child_processes")
def test_no_path_of_this_machine_gets_into_the_bundle(source, tmp_path):
    export(source, tmp_path / "bundle")
    for path in (tmp_path / "bundle").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": 7}, {1, 7}), ({"eos_token_id": [1, 9]}, {1, 9}), ({"eos_token_id": None}, {1}), ({}, {1})],
)
def test_stop_ids_are_the_union_of_all_that_say_one(checkpoints, tmp_path, generation, expected):
    """Case 26: config, generation_config and the token that ends a turn."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    (source / "generation_config.json").write_text(json.dumps(generation))
    change_json(source / "config.json", eos_token_id=1)
    export(source, tmp_path / "bundle")
    turn_end = next(
        token["id"]
        for token in json.loads((source / "tokenizer.json").read_text())["added_tokens"]
        if token["content"] == "<end_of_turn>"
    )
    assert set(Bundle.open(tmp_path / "bundle").manifest.stop_ids) == {turn_end, *expected}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95}, (0.7, 64, 0.95)),
        ({"do_sample": True}, (1.0, None, None)),
        ({"do_sample": True, "temperature": 0}, (0.0, None, None)),
        ({"temperature": 0.7, "top_k": 64}, (0.0, None, None)),
    ],
)
def test_sampling_defaults_are_the_checkpoints(checkpoints, tmp_path, generation, expected):
    """Case 63: a checkpoint that does not sample is greedy."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    (source / "generation_config.json").write_text(json.dumps(generation))
    export(source, tmp_path / "bundle")
    facts = Bundle.open(tmp_path / "bundle").manifest.sampling
    assert (facts.temperature, facts.top_k, facts.top_p) == expected


def test_the_template_may_stand_in_the_tokenizer_configuration(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "gemma3", source)
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    change_json(source / "tokenizer_config.json", chat_template=template)
    export(source, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").path("chat_template").read_text() == template


def test_context_is_the_smaller_of_what_is_asked_and_what_the_model_has(checkpoints, tmp_path):
    """As in llama.cpp it is not an error, and not silent either."""
    for asked, expected in ((32, 32), (10**6, None)):
        report = export(checkpoints / "gemma3", tmp_path / str(asked), ExportOptions(context=asked))
        found = Bundle.open(tmp_path / str(asked)).manifest.context
        trained = json.loads((checkpoints / "gemma3" / "config.json").read_text())["max_position_embeddings"]
        assert found == (expected or trained)
        said = f"the context is {trained} tokens, all that the model was made for, and not 1000000"
        assert report.notes == (() if expected else (said,))
        assert json.loads((tmp_path / str(asked) / "export.json").read_text())["notes"] == list(report.notes)


def test_weights_lie_outside_of_the_graphs_whatever_their_size(source, tmp_path):
    """Cases 57 and 58: no graph file grows with the model, and no location leaves the bundle."""
    import onnx

    export(source, tmp_path / "bundle")
    for path in (tmp_path / "bundle").glob("*.onnx"):
        outside = 0
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            if facts:
                assert facts["location"] == "weights.bin"
                assert int(facts["offset"]) % builder.ALIGNMENT == 0
                outside += 1
            else:
                assert tensor.ByteSize() < builder.INLINE_BYTES + 1000 or "rope" in tensor.name, tensor.name
        assert outside, path.name


def test_families_do_not_share_a_model_type():
    names = [name for family in families() for name in family.model_types]
    assert len(names) == len(set(names))
    assert find_family({"model_type": "gemma4"}).name == "gemma4"


def test_the_source_is_opened_for_reading_only(source, tmp_path):
    """A checkpoint in a folder that cannot be written to exports all the same."""
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    try:
        before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
        export(source, tmp_path / "bundle")
        assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
    finally:
        os.chmod(source, 0o755)
