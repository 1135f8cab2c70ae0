"""Bundles are untrusted input: a strict manifest, files that stay inside the folder, hashes that are checked."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import bundle as bundle_module
from siglance.engine.bundle import Bundle, find_bundle
from siglance.engine.errors import BundleError, DeviceError, SiglanceError, UnsupportedBundle
from siglance.engine.graph import resolve_device
from siglance.engine.manifest import MANIFEST_NAME, read_manifest, write_manifest
from siglance.engine.runtime import Runtime
from siglance.engine.self_test import replay


@pytest.fixture(scope="module")
def original(tiny_model):
    return tiny_model("gemma4")


@pytest.fixture
def copy(original, tmp_path):
    """A copy of a bundle that a test may damage."""
    folder = tmp_path / "bundle"
    shutil.copytree(original.bundle.folder, folder)
    return folder


def edit(folder, change) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- the manifest

CROPS = {"min_crop": 1, "max_crops": 4, "min_ratio": 1.2, "before_full": "", "before_crops": "", "between_crops": ""}


def test_writing_and_reading_is_the_identity(original):
    manifest = original.bundle.manifest
    assert read_manifest(write_manifest(manifest)) == manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda values: values.update(colour="red"), "colour"),
        (lambda values: values["image"].update(patchsize=1), "image.patchsize"),
        (lambda values: values["files"]["decoder"].update(url="x"), "files.decoder.url"),
        (lambda values: values["state"][0].update(size=1), "state[0].size"),
        (lambda values: values.pop("context"), "context"),
        (lambda values: values["prompt"].pop("begin"), "prompt.begin"),
        (lambda values: values.update(context="many"), "context"),
        (lambda values: values.update(context=True), "context"),
        (lambda values: values.update(stop_ids=7), "stop_ids"),
        (lambda values: values.update(stop_ids=[1, -1]), "stop_ids"),
        (lambda values: values["sampling"].update(temperature="hot"), "sampling.temperature"),
        (lambda values: values["image"].update(default_budget=71), "image.default_budget"),
        (lambda values: values["image"].update(budgets=[10**12], default_budget=10**12), "'image'"),
        (lambda values: values["image"].update(pool_size=10**6), "'image'"),
        (lambda values: values["video"].update(budgets=[10**9], default_budget=10**9), "'image'"),
        (lambda values: values["image"].update(pan_and_scan=CROPS | {"max_crops": 10**6}), "image.pan_and_scan"),
        (lambda values: values["prompt"]["image"].update(item=""), "prompt.image.item"),
        (lambda values: values.update(target="tpu"), "target"),
        (lambda values: values["files"].pop("decoder"), "files"),
        (lambda values: values["files"].pop("vision"), "vision"),  # it says that it sees (case 73)
        (lambda values: values.update(modalities=["text"]), "image"),
        (lambda values: values["image"].update(policy="squash"), "image:squash"),
        (lambda values: values["files"].update(chat_templat=values["files"].pop("chat_template")), "chat_templat"),
        (lambda values: values["modalities"].append("smell"), "modalities"),
        (lambda values: values["sampling"].update(temperature=-1), "sampling.temperature"),
        (lambda values: values["sampling"].update(temperature=10**400), "sampling.temperature"),
        (lambda values: values["sampling"].update(temperature=float("nan")), "sampling.temperature"),
        (lambda values: values["sampling"].update(top_p=1.5), "sampling.top_p"),
        (lambda values: values["sampling"].update(top_k=-1), "sampling.top_k"),
        (lambda values: values["files"]["weights"].update(path="x" * 300), "files.weights"),
        (lambda values: values["files"]["weights"].update(path="a\0b"), "files.weights"),
        (lambda values: values["files"]["weights"].update(path="\ud800"), "files.weights"),
    ],
)
def test_a_wrong_manifest_is_refused_by_the_name_of_the_key(copy, change, named):
    edit(copy, change)
    with pytest.raises(BundleError) as error:
        Bundle.open(copy)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_not_supported(copy, version):
    edit(copy, lambda values: values.update(format=version))
    with pytest.raises(UnsupportedBundle, match="format"):
        Bundle.open(copy)


def test_an_unknown_mechanism_is_refused_by_name(copy):
    edit(copy, lambda values: values["requires"].append("state:ring"))
    with pytest.raises(UnsupportedBundle, match="'state:ring'"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"format": 1}', "[" * 100_000, '{"format": ' + "1" * 5000 + "}"]
)
def test_text_that_is_no_manifest(text):
    with pytest.raises(BundleError):
        read_manifest(text)


def test_a_key_that_occurs_twice_is_named(original):
    text = write_manifest(original.bundle.manifest)
    with pytest.raises(BundleError, match="'context' occurs twice"):
        read_manifest(text.replace('"context"', '"context": 7,\n "context"'))


def test_a_manifest_of_megabytes_is_not_read(copy):
    (copy / MANIFEST_NAME).write_text(" " * (2 << 20))
    with pytest.raises(BundleError, match="at most"):
        Bundle.open(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_replaced_value_is_read_or_refused(original, data):
    """No other exception, whatever stands where."""
    values = json.loads(write_manifest(original.bundle.manifest))
    where = values
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        inner = where[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        where = inner
    where[key] = data.draw(json_values)
    try:
        read_manifest(json.dumps(values))
    except BundleError:
        return


# --- files


def test_names_are_found_in_the_cache_and_nowhere_else(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGLANCE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    copy.rename(tmp_path / "home" / "mine")
    assert find_bundle("mine") == tmp_path / "home" / "mine"
    for name in ("other", "../bundle", "", ".", "..", "mine/x"):
        with pytest.raises(BundleError, match="no bundle"):
            find_bundle(name)


@pytest.mark.parametrize("name", [None, 3, b"demo", ["demo"]])
def test_what_is_no_name_is_refused_by_its_type(name):
    """None is what a variable of the environment gives that is not set."""
    with pytest.raises(BundleError, match=f"not by {type(name).__name__}$"):
        Bundle.open(name)


def test_what_is_no_bundle_yet_says_how_it_becomes_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("checkpoint/config.json", "model.gguf", "photo.png"):
        (tmp_path / name).write_bytes(b"{}")
    for name, hint in {
        "checkpoint": "it is a checkpoint, which becomes a bundle by: siglance export 'checkpoint' -o FOLDER",
        "model.gguf": "it is a GGUF file, which becomes a bundle by: siglance export 'model.gguf' -o FOLDER",
        "photo.png": "it is a file, and a bundle is a folder (pictures are given with -i)",
        "google/gemma-3-4b-it": "if it is an id on the Hugging Face hub, it becomes a bundle by: "
        "siglance export 'google/gemma-3-4b-it' -o FOLDER",
    }.items():
        with pytest.raises(BundleError, match=re.escape(f"; {hint}") + "$"):
            find_bundle(name)
    for name in ("empty", "nothing", "../x", "a/b/c"):
        with pytest.raises(BundleError, match=r"^no bundle [^;]*$"):
            find_bundle(name)


@pytest.mark.parametrize("path", ["../weights.bin", "/etc/hostname", "sub/weights.bin", "..", "", "a\\b"])
def test_paths_stay_inside_the_folder(copy, path):
    edit(copy, lambda values: values["files"]["weights"].update(path=path))
    with pytest.raises(BundleError, match=r"files\.weights"):
        Bundle.open(copy)


def test_a_link_is_not_followed(copy, tmp_path):
    (copy / "weights.bin").rename(tmp_path / "elsewhere")
    (copy / "weights.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"symbolic link to .*elsewhere, and a bundle is a folder of regular files"):
        Bundle.open(copy)


def test_a_file_that_may_not_be_read_is_named(copy, monkeypatch):
    def refuse(file, algorithm):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(bundle_module.hashlib, "file_digest", refuse)
    with pytest.raises(BundleError, match=r"files\..*cannot be read: Permission denied"):
        Bundle.open(copy)


@pytest.mark.parametrize("key", ["vision", "embed", "decoder", "weights", "tokenizer", "chat_template", "self_test"])
def test_a_changed_byte_is_found(copy, original, key):
    path = copy / original.bundle.manifest.files[key].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=rf"files\.{key}.*SHA-256"):
        Bundle.open(copy)


def test_a_file_cut_short_names_both_sizes(copy):
    path = copy / "weights.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match=rf"{size - 100} bytes, the manifest says {size}"):
        Bundle.open(copy)


@pytest.mark.parametrize("key", ["vision", "weights"])
def test_a_missing_file_is_named(copy, original, key):
    (copy / original.bundle.manifest.files[key].path).unlink()
    with pytest.raises(BundleError, match=rf"files\.{key}.*missing"):
        Bundle.open(copy)


def test_large_files_are_hashed_once_until_they_change(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGLANCE_HOME", str(tmp_path / "home"))
    hashed = []

    def counting(file, algorithm):
        hashed.append(file.name)
        return hashlib.new(algorithm, file.read())

    monkeypatch.setattr(bundle_module.hashlib, "file_digest", counting)
    weights = str(copy / "weights.bin")
    Bundle.open(copy)
    Bundle.open(copy)
    assert hashed.count(weights) == 1
    data = bytearray((copy / "weights.bin").read_bytes())
    data[-1] ^= 1
    (copy / "weights.bin").write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(copy)


def test_a_user_without_a_home_opens_bundles_by_path(copy, monkeypatch):
    """As in a container whose user is only a number."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIGLANCE_HOME")
    monkeypatch.setattr(Path, "home", home)
    Bundle.open(copy)
    Bundle.open("demo")
    with pytest.raises(BundleError, match="SIGLANCE_HOME, which is not set"):
        Bundle.open("some-name")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_damaged_stamp_file_only_costs_time(copy, monkeypatch, tmp_path, content):
    monkeypatch.setenv("SIGLANCE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "verified.json").write_text(content)
    Bundle.open(copy)


# --- graphs


def test_the_engine_does_not_read_family_and_name(copy, original):
    edit(copy, lambda values: values.update(family="nonsense", name="Ωmega / 7"))
    ids = np.arange(100, 120)
    found = Runtime(Bundle.open(copy)).session().prefill(ids)
    np.testing.assert_array_equal(found, original.runtime.session().prefill(ids))


def test_odd_folder_names_and_relative_paths(copy, tmp_path, monkeypatch):
    odd = tmp_path / "with space äöü 像"
    copy.rename(odd)
    monkeypatch.chdir(tmp_path)
    opened = Bundle.open(odd.name)
    assert replay(opened, Runtime(opened)).result == "equal"


def test_a_decoder_input_without_a_source_is_named(copy, original):
    """An embed graph that lacks an output the decoder wants."""
    manifest = original.bundle.manifest
    swapped = {**manifest.files, "embed": manifest.files["vision"]}
    with pytest.raises(BundleError, match="inputs_embeds"):
        Runtime(Bundle(original.bundle.folder, dataclasses.replace(manifest, files=swapped)))


def test_state_that_the_graph_does_not_have_is_named(original):
    pair = dataclasses.replace(original.bundle.manifest.state[0], input="past.99.key")
    manifest = dataclasses.replace(original.bundle.manifest, state=(pair, *original.bundle.manifest.state[1:]))
    with pytest.raises(BundleError, match=r"past\.99\.key"):
        Runtime(Bundle(original.bundle.folder, manifest))


def test_a_device_that_is_not_there_is_an_error(original):
    """Case 56: no silent fallback."""
    for device, reason in (
        ("cuda", "onnxruntime"),
        ("cuda:1", "onnxruntime"),
        ("tpu", "unknown"),
        ("cuda:x", "unknown"),
    ):
        with pytest.raises(DeviceError, match=reason):
            Runtime(original.bundle, device=device)
    assert str(resolve_device("auto", "cpu")) == "cpu"
    assert original.runtime.providers["decoder"][0] == "CPUExecutionProvider"


def test_a_patch_size_that_the_graph_does_not_have(original):
    """Pictures would be cut, and memory taken, by the manifest's word alone."""
    image = dataclasses.replace(original.bundle.manifest.image, patch_size=4096)
    with pytest.raises(BundleError, match="4096 pixels a side"):
        Runtime(Bundle(original.bundle.folder, dataclasses.replace(original.bundle.manifest, image=image)))


def first_step(values) -> dict:
    return values["cases"][0]["steps"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.clear(),
        lambda values: values.update(cases=[]),
        lambda values: values.update(format=2),
        lambda values: values["cases"][0].update(steps=[]),
        lambda values: values["cases"][0].update(ids=[]),
        lambda values: first_step(values).update(ids=[10**9] * 10),
        lambda values: first_step(values).update(logits=[float("nan")] * 10),
        lambda values: first_step(values).update(logits=["a"] * 10),
        lambda values: first_step(values).update(logits=[]),
        lambda values: values["cases"][1]["picture"].update(budget=71),
        lambda values: values["cases"][1]["picture"].update(height=-1),
        lambda values: values["cases"][1]["picture"].update(height=2**40),
        lambda values: values["cases"][1]["picture"].update(height=2**14, width=2**14),
    ],
)
def test_a_self_test_that_is_none_is_an_error_and_never_equal(copy, original, change):
    values = json.loads((copy / "self_test.json").read_text())
    change(values)
    (copy / "self_test.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"self_test\.json"):
        replay(Bundle(copy, original.bundle.manifest), original.runtime)


def test_every_error_is_one_of_ours():
    assert issubclass(BundleError, SiglanceError)
    assert issubclass(UnsupportedBundle, BundleError)


# --- bundles in the cache of huggingface-hub: a snapshot is a folder of links to the repository's blobs

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def snapshot(original, tmp_path):
    """The bundle as `snapshot_download` leaves it."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    blobs, folder = repository / "blobs", repository / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in original.bundle.folder.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blobs / name)
        (folder / path.name).symlink_to(Path("../../blobs") / name)
    return folder


def test_a_bundle_in_the_cache_of_the_hub_opens(snapshot):
    opened = Bundle.open(snapshot)
    assert replay(opened, Runtime(opened)).result == "equal"


def test_a_bundle_in_a_folder_of_a_snapshot_opens(snapshot):
    inside = snapshot / "int4"
    inside.mkdir()
    for path in list(snapshot.iterdir()):
        if path != inside:
            (inside / path.name).symlink_to(path.resolve())
    assert Bundle.open(inside).folder == inside.resolve()


@pytest.mark.parametrize("place", ["outside", "other repository", "below blobs", "snapshots"])
def test_links_of_a_snapshot_lead_to_its_own_blobs_only(snapshot, tmp_path, place):
    weights = snapshot / "weights.bin"
    target = {
        "outside": tmp_path / "weights",
        "other repository": tmp_path / "hub" / "models--acme--other" / "blobs" / "weights",
        "below blobs": snapshot.parent.parent / "blobs" / "deeper" / "weights",
        "snapshots": snapshot.parent / "weights",
    }[place]
    target.parent.mkdir(parents=True, exist_ok=True)
    weights.resolve().rename(target)
    weights.unlink()
    weights.symlink_to(target)
    with pytest.raises(BundleError, match=r"files\.weights.*symbolic link to"):
        Bundle.open(snapshot)


def test_a_folder_that_only_looks_like_a_snapshot_is_not_one(snapshot, tmp_path):
    """Without a commit's name there is no cache, and a link out of it stays refused."""
    renamed = snapshot.rename(snapshot.parent / "main")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(renamed)
