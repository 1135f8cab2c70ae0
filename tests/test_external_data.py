"""Weights lie in files that the manifest lists, because only those are checked: whatever a graph file says."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import external_data
from siglance.engine.bundle import Bundle
from siglance.engine.errors import BundleError
from siglance.engine.external_data import external_files
from siglance.engine.runtime import Runtime

from .test_bundle import copy as copy  # a fixture
from .test_bundle import edit
from .test_bundle import original as original  # a fixture


def edit_graph(path: Path, change: Callable[[Any], None]) -> None:
    """Rewrite a graph file, and what the manifest beside it says of it."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    facts = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit(path.parent, lambda values: values["files"][path.stem].update(facts))


def relocated(location: str) -> Callable[[Any], None]:
    """A change of a graph: all weights lie in another file."""

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


@pytest.mark.parametrize("location", ["../outside.bin", "{outside}", "link.bin", "absent.bin", "unlisted.bin"])
def test_weights_outside_the_manifest_are_refused(copy, original, tmp_path, location):
    """Case 57: the location inside the graph file is as untrusted as the manifest, and files without a hash are too."""
    outside = tmp_path / "outside.bin"
    shutil.copy(copy / "weights.bin", outside)
    shutil.copy(copy / "weights.bin", copy / "unlisted.bin")
    (copy / "link.bin").symlink_to(outside)
    location = location.format(outside=outside)
    edit_graph(copy / "decoder.onnx", relocated(location))
    with pytest.raises(BundleError, match=rf"decoder\.onnx takes weights from {re.escape(repr(location))}"):
        Bundle.open(copy)
    if location != "unlisted.bin":  # onnxruntime itself stays in the folder
        with pytest.raises(BundleError, match=r"decoder\.onnx cannot be loaded"):
            Runtime(Bundle(copy, original.bundle.manifest))


def hidden_tensor() -> Any:
    """A tensor whose values lie in `hidden.bin`; the parts of the entry in an unusual order."""
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    entry = b"\x12\x0ahidden.bin\x0a\x08location"
    tensor.MergeFromString(b"\x6a" + bytes([len(entry)]) + entry)
    assert (tensor.external_data[0].key, tensor.external_data[0].value) == ("location", "hidden.bin")
    return tensor


def places_of_tensors() -> dict[str, Callable[[Any], Any]]:
    """Everywhere a graph file can hold a tensor: from a model to the message that the tensor is put into."""

    def attribute(model: Any) -> Any:
        return model.graph.node[0].attribute.add(name="extra")

    return {
        "initializer": lambda model: model.graph.initializer.add(),
        "sparse values": lambda model: model.graph.sparse_initializer.add().values,
        "sparse indices": lambda model: model.graph.sparse_initializer.add().indices,
        "attribute": lambda model: attribute(model).t,
        "attributes": lambda model: attribute(model).tensors.add(),
        "sparse attribute": lambda model: attribute(model).sparse_tensor.values,
        "branch": lambda model: attribute(model).g.initializer.add(),
        "branches": lambda model: attribute(model).graphs.add().node.add().attribute.add().t,
        "function": lambda model: model.functions.add().node.add().attribute.add().t,
        "default of a function": lambda model: model.functions.add().attribute_proto.add().t,
        "training": lambda model: model.training_info.add().algorithm.initializer.add(),
    }


@pytest.mark.parametrize("place", places_of_tensors())
def test_tensors_are_found_wherever_they_are(copy, place):
    assert external_files(copy / "decoder.onnx") == {"weights.bin"}
    edit_graph(copy / "decoder.onnx", lambda model: places_of_tensors()[place](model).CopyFrom(hidden_tensor()))
    assert external_files(copy / "decoder.onnx") == {"weights.bin", "hidden.bin"}


def test_every_message_that_holds_tensors_is_walked():
    """Against the definition of the format: no way from a model to a tensor is left out."""
    found: dict[str, dict[int, str]] = {}

    def holds_tensors(message: Any, above: tuple[Any, ...] = ()) -> bool:
        if message.name == "TensorProto":
            return True
        fields = [field for field in message.fields if field.message_type and field.message_type not in above]
        inside = {field.number: field for field in fields if holds_tensors(field.message_type, (*above, message))}
        return bool(inside)

    def collect(message: Any) -> None:
        if message.full_name in found:
            return
        inside = {field.number: field.message_type for field in message.fields if field.message_type}
        if message.name == "TensorProto":
            inside = {13: message.fields_by_name["external_data"].message_type}
        else:
            inside = {number: kind for number, kind in inside.items() if holds_tensors(kind)}
        found[message.full_name] = {number: kind.full_name for number, kind in inside.items()}
        for kind in inside.values():
            if kind.name != "StringStringEntryProto":
                collect(kind)

    collect(onnx.ModelProto.DESCRIPTOR)
    names = {"model": "Model", "training": "TrainingInfo", "function": "Function", "graph": "Graph", "node": "Node"}
    names |= {"attribute": "Attribute", "sparse": "SparseTensor", "tensor": "Tensor", "entry": "StringStringEntry"}
    ours = {
        f"onnx.{names[kind]}Proto": {number: f"onnx.{names[inner]}Proto" for number, inner in inside.items()}
        for kind, inside in external_data._MESSAGES.items()
    }
    assert found == ours


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"\xff" * 64, lambda data: b"\x3b" + data])
def test_a_graph_that_is_none_says_so(copy, damage):
    path = copy / "embed.onnx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"embed\.onnx cannot be read as an ONNX graph"):
        external_files(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_graphs_are_read_or_refused(original, tmp_path_factory, data):
    graph = (original.bundle.folder / "embed.onnx").read_bytes()
    at = data.draw(st.integers(0, len(graph) - 1))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(graph[:at] + data.draw(st.binary(max_size=12)) + graph[at + data.draw(st.integers(0, 12)) :])
    with contextlib.suppress(BundleError):
        assert all(isinstance(name, str) for name in external_files(path))


def test_a_graph_of_another_format_is_refused(copy):
    (copy / "embed.onnx").rename(copy / "embed.ort")
    edit(copy, lambda values: values["files"]["embed"].update(path="embed.ort"))
    with pytest.raises(BundleError, match=r"embed\.ort must be an ONNX graph"):
        Bundle.open(copy)
