"""What a bundle or a graph file declares, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bundle import Bundle
from .errors import InputError
from .graph import Device, Graph, TensorFacts
from .manifest import GRAPHS
from .sounds import longest_clip

__all__ = ["inspect_bundle", "inspect_graph", "render"]


def inspect_graph(path: Path) -> dict[str, Any]:
    """Declared inputs and outputs of one ONNX file, and its size."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    graph = Graph(path, Device("cpu"), prepack=False)
    return {
        "bytes": path.stat().st_size,
        "inputs": {name: _tensor(facts) for name, facts in graph.inputs.items()},
        "outputs": {name: _tensor(facts) for name, facts in graph.outputs.items()},
    }


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Facts of the manifest, the graphs, and where each decoder input comes from."""
    manifest = bundle.manifest
    graphs = {name: inspect_graph(bundle.path(name)) for name in GRAPHS if name in manifest.files}
    state = {pair.input: pair.kind for pair in manifest.state}
    wires = {}
    for name in graphs["decoder"]["inputs"]:
        wires[name] = (
            f"state ({state[name]})" if name in state else "embed" if name in graphs["embed"]["outputs"] else "engine"
        )
    image, audio = manifest.image, manifest.audio
    return {
        "name": manifest.name,
        "family": manifest.family,
        "source": manifest.source,
        "revision": manifest.revision,
        "target": manifest.target,
        "precision": manifest.precision,
        "requires": list(manifest.requires),
        "modalities": list(manifest.modalities),
        "context": manifest.context,
        "stop_ids": list(manifest.stop_ids),
        "image_budgets": list(image.budgets) if image else [],
        "default_image_budget": image.default_budget if image else None,
        "pan_and_scan": image is not None and image.pan_and_scan is not None,
        "longest_sound_seconds": None if audio is None else longest_clip(audio) / audio.sample_rate,
        "prompt_layout": manifest.prompt.layout,
        "chat_template": "chat_template" in manifest.files,
        "files": {name: fact.size for name, fact in manifest.files.items()},
        "graphs": graphs,
        "decoder_wires": wires,
    }


def render(facts: dict[str, Any], indent: str = "") -> str:
    """Facts as indented lines."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", render(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines)


def _tensor(facts: TensorFacts) -> str:
    return f"{facts.dtype.__name__} [{', '.join(map(str, facts.shape))}]"
