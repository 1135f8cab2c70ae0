"""What a bundle's graphs lose by the format of their matrices, each compared with its float32 original on its own.

The originals are run piece by piece, so that they need no more memory than the bundle. Inputs are some calibration
text, and the picture and the sound of self-tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.bundle import Bundle
from ..engine.device_memory import DeviceMemory, HostMemory
from ..engine.errors import ExportError
from ..engine.graph import Device, Graph, has_device, resolve_device, tensor
from ..engine.image_policy import POLICIES
from ..engine.manifest import Manifest
from ..engine.self_test import formula_picture, formula_sound
from ..engine.state import DecoderState
from .calibration_inputs import embedded, exact_logits, sequence_length
from .calibration_run import Request
from .piecewise import LazyGraph, Piecewise, Values

__all__ = ["check_losses", "measure_losses"]

_TOKENS = 128  # of a text
_ROWS = 64  # of logits that are compared, at least
# Below these a bundle is refused: its replies would have little to do with the model.
LEAST_COSINE = 0.7
LEAST_AGREEMENT = 0.25

Losses = dict[str, dict[str, float]]


def measure_losses(bundle: Bundle, request: Request, prepack: bool) -> Losses:
    """By graph: the mean cosine between outputs and exact outputs, of logits around their means; for the decoder also
    the share of rows with the same best token."""
    builds = request.graphs()
    here = has_device(bundle.manifest.target)
    device = resolve_device("auto" if here else "cpu", bundle.manifest.target, foreign=not here)
    found: Losses = {}
    for name, inputs in _media_inputs(bundle.manifest).items():
        exact = LazyGraph(name)
        builds[name](exact)
        values = dict(inputs)
        Piecewise(exact, [values]).advance()
        rounded = Graph(bundle.path(name), device, prepack=prepack).run(inputs)
        found[name] = {"cosine": _cosine(values["soft_tokens"], rounded["soft_tokens"])}
    return found | _text_losses(bundle, request, builds, device, prepack)


def _media_inputs(manifest: Manifest) -> dict[str, Values]:
    """Inputs of the graphs of pictures and sounds, by name of the graph: the smallest picture, half a second."""
    found: dict[str, Values] = {}
    picture, sound = manifest.image, manifest.audio
    if picture is not None:
        patches = POLICIES[picture.policy].prepare(formula_picture(120, 168), picture, picture.budgets[0])
        found["vision"] = {"patches": patches.values, "positions": patches.positions}
    if sound is not None:
        longest = sound.frame_step * sound.frames_per_token * sound.max_tokens
        found["audio"] = {"waveform": formula_sound(min(sound.sample_rate // 2, longest))}
    return found


def _text_losses(bundle: Bundle, request: Request, builds: Any, device: Device, prepack: bool) -> Losses:
    decoder = LazyGraph("decoder")
    builds["decoder"](decoder)
    length = min(_TOKENS, request.context, sequence_length(decoder))
    texts = request.sequences(2 * _ROWS, length)
    embed = LazyGraph("embed", np.unique(np.concatenate([[0], *texts])))
    builds["embed"](embed)
    sequences = embedded(embed, decoder, texts)
    for values in sequences:
        # The second half of each: the first tokens have next to nothing before them.
        values["logit_rows"] = values["logit_rows"][len(values["logit_rows"]) // 2 :]
    inputs = [dict(values) for values in sequences]
    graph = Graph(bundle.path("embed"), Device("cpu"), prepack=prepack)
    cosines = [
        _cosine(each[name], rounded)
        for ids, each in zip(texts, inputs, strict=True)
        for name, rounded in graph.run({"input_ids": np.array([ids], np.int64)}).items()
        if name in each
    ]
    exact = np.concatenate(exact_logits(decoder, sequences))
    graph = Graph(bundle.path("decoder"), device, prepack=prepack)
    logits = np.concatenate([_logits(graph, bundle.manifest, each) for each in inputs])
    agreement = float((exact.argmax(1) == logits.argmax(1)).mean())
    centred = [each - each.mean(1, keepdims=True) for each in (exact, logits)]
    return {
        "embed": {"cosine": min(cosines)},
        "decoder": {"cosine": _cosine(*centred), "argmax_agreement": round(agreement, 4)},
    }


def _logits(graph: Graph, manifest: Manifest, inputs: Values) -> np.ndarray:
    """The logits of a prompt, run as the engine runs it: CUDA's kernel of window buffers refuses a present that is not
    the past's own memory."""
    memory = HostMemory() if graph.device.kind == "cpu" else DeviceMemory(graph.device)
    state = DecoderState(graph, manifest.state, manifest.context, memory)
    state.reserve(int(inputs["total_sequence_length"]))
    binding = graph.bind()
    state.bind(binding)
    past = {pair.input for pair in manifest.state}
    for name in graph.inputs.keys() - past:
        binding.bind_cpu_input(name, inputs[name])
    logits = np.empty((len(inputs["logit_rows"]), int(graph.outputs["logits"].shape[-1])), np.float32)
    binding.bind_ortvalue_output("logits", tensor(logits))
    graph.run_bound(binding)
    return logits


def _cosine(exact: np.ndarray, found: np.ndarray) -> float:
    """Mean cosine of the rows."""
    first, second = (each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (exact, found))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = np.einsum("ij,ij->i", first, second)
    return round(float(np.where(lengths > 0, products / np.maximum(lengths, 1e-300), 1.0).mean()), 6)


def check_losses(losses: Losses) -> None:
    """Raise ExportError if the outputs of a graph have little to do with the exact ones."""
    for name, facts in losses.items():
        for key, least in (("cosine", LEAST_COSINE), ("argmax_agreement", LEAST_AGREEMENT)):
            if key in facts and not facts[key] >= least:
                raise ExportError(
                    f"the graph {name!r} would be too inexact: {key.replace('_', ' ')} {facts[key]:.3f} with float32, "
                    f"at least {least} is expected; choose another precision, or accept the loss"
                )
