"""The built-in configurations of official models have the sizes that are published, and random bundles run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from siglance.engine.engine import Engine
from siglance.engine.errors import ExportError
from siglance.engine.sampling import Sampling
from siglance.export import official
from siglance.export.builder import GraphBuilder, WeightsFile
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, find_family
from siglance.export.random_checkpoint import RandomCheckpoint, RandomWeights

# Millions of parameters: decoder (with the final norm and what makes per-layer inputs), embedding table (also the
# head), per-layer table, vision tower with its projection; then, if it has ears, those with their projection.
SIZES = {
    "google/paligemma-3b-pt-224": (1981.9, 526.8, 0, 412.4 + 2.36),
    "google/paligemma-3b-pt-448": (1981.9, 526.8, 0, 413.3 + 2.36),
    "google/paligemma-3b-pt-896": (1981.9, 526.8, 0, 416.9 + 2.36),
    "google/paligemma2-3b-pt-448": (2024.5, 592.6, 0, 413.3 + 2.66),
    "google/paligemma2-10b-pt-448": (8324.2, 921.9, 0, 413.3 + 4.13),
    "google/paligemma2-28b-pt-448": (26047.5, 1185.3, 0, 413.3 + 5.31),
    "google/gemma-3-270m-it": (100.3, 167.8, 0, 0),
    "google/gemma-3-1b-it": (697.9, 302.0, 0, 0),
    "google/gemma-3-4b-it": (3209.0, 671.3, 0, 416.9 + 2.95),
    "google/gemma-3-12b-it": (10759.2, 1006.9, 0, 416.9 + 4.42),
    "google/gemma-3-27b-it": (25599.7, 1409.6, 0, 416.9 + 6.19),
    "google/gemma-4-E2B-it": (1877.1, 402.7, 2348.8, 167.4 + 1.18, 304.8 + 2.36),
    "google/gemma-4-E4B-it": (3973.4, 671.1, 2818.6, 167.4 + 1.97, 304.8 + 3.93),
    "google/gemma-4-12B-it": (10900.7, 1006.6, 0, 49.9, 2.46),
    "google/gemma-4-26B-A4B-it": (1657.0 + 22838.0, 738.2, 0, 569.6 + 3.24),
    "google/gemma-4-31B-it": (29288.1, 1409.3, 0, 569.6 + 6.19),
}


class CountingFile(WeightsFile):
    """Counts the elements of what would be stored; nothing is read and nothing is written."""

    def __init__(self) -> None:
        self.elements: dict[str, int] = {}
        self.small = {}
        self.recorded = {}

    def put(
        self, key: str, shape: Sequence[int], dtype: ir.DataType, chunks: Iterable[np.ndarray]
    ) -> ir.ExternalTensor:
        self.elements[key] = int(np.prod(shape, dtype=np.int64))
        return ir.ExternalTensor("weights.bin", 0, 0, dtype, shape=ir.Shape(shape), name=key)


def count(name: str) -> dict[str, int]:
    """Elements of all weights of the official model `name`, by key."""
    checkpoint = RandomCheckpoint(name)
    family = find_family(checkpoint.config)
    config = family.read(checkpoint.config)
    file, weights = CountingFile(), RandomWeights(checkpoint)
    for graph_name, build in family.graphs(config).items():
        build(GraphBuilder(graph_name, file), weights, config, ExportOptions(context=16))
    return file.elements | {key: array.size for key, array in file.small.items()}


def millions(elements: dict[str, int], pattern: str) -> float:
    return sum(size for key, size in elements.items() if re.match(pattern, key)) / 1e6


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    elements = {key: size for key, size in count(name).items() if not re.match(r"rope\.|ones\.|empty\.", key)}
    decoder, embedding, per_layer, vision, *audio = SIZES[name]
    assert millions(elements, r"embed_tokens\.") == pytest.approx(embedding, abs=0.06)
    assert millions(elements, r"embed_tokens_per_layer\.") == pytest.approx(per_layer, abs=0.06)
    assert millions(elements, r"vision|embed_vision|projector|embedder|projection") == pytest.approx(vision, abs=0.11)
    assert millions(elements, r"text\.") == pytest.approx(decoder, abs=0.11)
    # Of the keys of relative positions, the twelve that attention reads are stored instead of a matrix in each layer.
    folded = 12 * (1024 * 1024 - 12 * 1024) / 1e6 if sum(audio) > 300 else 0
    constants = millions(elements, r"audio\.(fourier|mel)$")
    heard = millions(elements, r"audio\.|embed_audio\.") - constants
    assert heard == pytest.approx(sum(audio) - folded, abs=0.11)


def test_every_official_model_is_counted_or_a_variant_of_one():
    uncounted = {re.sub(r"-(mix|pt)-\d+$", "", name) for name in official.OFFICIAL} - {
        re.sub(r"-(mix|pt)-\d+$", "", name) for name in SIZES
    }
    assert uncounted == set()


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(ExportError, match=r"gemma-9.*google/gemma-4-E2B-it"):
        export("google/gemma-9", tmp_path / "bundle", random=True)
    with pytest.raises(ExportError, match="revision"):
        export("google/gemma-3-270m-it", tmp_path / "bundle", random=True, revision="main")
    assert list(tmp_path.iterdir()) == []


def small(config: official.Config) -> official.Config:
    """The configuration with few layers and narrow: the official special tokens stay."""
    text = dict(config.get("text_config", config))
    text |= {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return config | text if "text_config" not in config else config | {"text_config": text}


def test_a_random_model_answers_and_is_the_same_every_time(tmp_path, monkeypatch):
    name = "google/gemma-3-270m-it"
    monkeypatch.setitem(official.OFFICIAL, name, small(official.OFFICIAL[name]) | {"vocab_size": 262144})
    for attempt in ("a", "b"):
        export(name, tmp_path / attempt, ExportOptions(precision="int4", context=256), random=True)
    assert (tmp_path / "a" / "weights.bin").read_bytes() == (tmp_path / "b" / "weights.bin").read_bytes()
    with Engine.open(tmp_path / "a") as engine:
        assert engine.manifest.source == f"random:{name}"
        assert engine.verify().result == "equal"
        reply = engine.generate("What is this?", max_tokens=8, sampling=Sampling(temperature=0))
    assert len(reply.token_ids) == 8 or reply.finish_reason == "stop_id"
