"""Which files an ONNX graph takes weights from.

ONNX Runtime opens whatever file beside a graph the graph names, so a check of the files that a manifest lists says
nothing about weights in others. The names stand in the graph file, which is a Protocol Buffers message: it is walked
along the few fields that lead to tensors, without a package and without loading the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import BundleError
from .protobuf import fields

__all__ = ["external_files"]

_Schema = Mapping[int, str]
# Field numbers of onnx.proto, for each message that can hold tensors: the kind of what is in them.
_MESSAGES: dict[str, _Schema] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MOST_DEPTH = 64  # messages in one another; onnxruntime itself stops at 100


def external_files(path: Path) -> set[str]:
    """The names of all files that the tensors of a graph file are said to lie in, as they are written there.

    Raises BundleError for a file that is no ONNX graph.
    """
    data = path.read_bytes()
    found: set[str] = set()
    try:
        waiting = [("model", memoryview(data), 0)]
        while waiting:
            kind, message, depth = waiting.pop()
            if depth > _MOST_DEPTH:
                raise ValueError("messages nested too deep")
            if kind == "entry":
                found |= _locations(message)
                continue
            inside = _MESSAGES[kind]
            waiting += [(inside[number], value, depth + 1) for number, value in _parts(message) if number in inside]
    except ValueError as error:
        raise BundleError(f"{path.name} cannot be read as an ONNX graph: {error}") from None
    return found


def _locations(entry: memoryview) -> set[str]:
    """The values of an entry of external data, if its key is "location"."""
    texts = list(_parts(entry))
    if not any(number == 1 and bytes(value) == b"location" for number, value in texts):
        return set()
    return {bytes(value).decode() for number, value in texts if number == 2}


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of the fields of a message that are no integers."""
    for number, value in fields(message):
        if isinstance(value, memoryview):
            yield number, value
