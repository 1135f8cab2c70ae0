"""Whether the graphs of a bundle fit each other, its manifest and what the engine makes: checked when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import BundleError
from .graph import Graph, TensorFacts
from .manifest import ImageFacts, Manifest
from .state import check_state

__all__ = ["BLOCK_ENDS", "check_audio", "check_wiring"]

BLOCK_ENDS = "block_ends"
_MADE_BY_ENGINE = ("seqlens_k", "total_sequence_length", "logit_rows")
# Mechanisms with which the decoder declares `block_ends`; without one of them attention is causal.
_BLOCKS = frozenset({"attention:image_blocks", "attention:prefix"})


def check_wiring(manifest: Manifest, embed: Graph, decoder: Graph, vision: Graph | None) -> None:
    """Raise BundleError unless every input has a source of its width, and the state is what the manifest says."""
    state_inputs = {pair.input for pair in manifest.state}
    for graph, outputs in ((embed, ("inputs_embeds",)), (decoder, ("logits",))):
        for name in outputs:
            if name not in graph.outputs or not _has_width(graph.outputs[name]):
                raise BundleError(f"graph {graph.name!r} has no output {name!r} of known width")
    check_state(decoder, manifest.state)
    for name, facts in decoder.inputs.items():
        if name in state_inputs or name in _MADE_BY_ENGINE or name == BLOCK_ENDS:
            continue
        source = embed.outputs.get(name)
        if source is None:
            raise BundleError(f"decoder input {name!r} has no source: neither a graph nor the engine makes it")
        if source.dtype != facts.dtype or source.shape[-1:] != facts.shape[-1:]:
            raise BundleError(f"decoder input {name!r} is {facts}, the embed graph makes {source}")
    missing = [name for name in _MADE_BY_ENGINE if name not in decoder.inputs]
    if missing:
        raise BundleError(f"the decoder graph does not declare {', '.join(missing)}")
    _check_block_ends(decoder, manifest.requires)
    if "input_ids" not in embed.inputs:
        raise BundleError("the embed graph has no input 'input_ids'")
    if vision is not None and manifest.image is not None:
        _check_vision(vision, manifest.image, embed.outputs["inputs_embeds"])


def _has_width(facts: TensorFacts) -> bool:
    return bool(facts.shape) and isinstance(facts.shape[-1], int)


def _check_block_ends(decoder: Graph, requires: Sequence[str]) -> None:
    """Raise BundleError unless the graph declares `block_ends` if, and only if, the manifest names what blocks are."""
    facts = decoder.inputs.get(BLOCK_ENDS)
    if facts is None and not _BLOCKS.isdisjoint(requires):
        raise BundleError(
            f"the manifest requires {min(_BLOCKS.intersection(requires))!r}, but the decoder graph has no input "
            f"{BLOCK_ENDS!r}"
        )
    if facts is not None and _BLOCKS.isdisjoint(requires):
        raise BundleError(
            f"the decoder graph has the input {BLOCK_ENDS!r}, but the manifest requires none of "
            f"{', '.join(map(repr, sorted(_BLOCKS)))}"
        )
    if facts is not None and (facts.dtype is not np.int64 or len(facts.shape) != 1):
        raise BundleError(f"decoder input {BLOCK_ENDS!r} is {facts}, expected int64 [tokens]")


def _check_vision(vision: Graph, image: ImageFacts, embeddings: TensorFacts) -> None:
    """Raise BundleError unless the graph takes the patches that the manifest describes and fits the embeddings."""
    patches, soft = vision.inputs.get("patches"), vision.outputs.get("soft_tokens")
    if patches is None or "positions" not in vision.inputs:
        raise BundleError("the vision graph does not declare 'patches' and 'positions'")
    if patches.shape[-1:] != (3 * image.patch_size**2,):
        raise BundleError(
            f"the vision graph takes patches {patches}, the manifest says {image.patch_size} pixels a side"
        )
    if soft is None or soft.shape[-1:] != embeddings.shape[-1:]:
        raise BundleError("the vision graph has no output 'soft_tokens' as wide as the embeddings")


def check_audio(audio: Graph, embeddings: TensorFacts) -> None:
    """Raise BundleError unless the graph takes samples and fits the embeddings."""
    waveform, soft = audio.inputs.get("waveform"), audio.outputs.get("soft_tokens")
    if waveform is None or waveform.dtype is not np.float32 or len(waveform.shape) != 1:
        raise BundleError(f"the audio graph takes 'waveform' {waveform}, expected float32 [samples]")
    if soft is None or soft.shape[-1:] != embeddings.shape[-1:]:
        raise BundleError("the audio graph has no output 'soft_tokens' as wide as the embeddings")
