"""Micro-benchmarks. Each checks its result before it measures: a fast wrong answer is no speed.

`make bench` runs them; pytest-benchmark prints minimum, median and spread, `--benchmark-json` saves the machine too.
"""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine.image_policy import resize
from siglance.engine.manifest import SamplingFacts
from siglance.engine.sampling import Sampler, Sampling, resolve
from siglance.kernels import reference, reference_sampling, topk
from siglance.kernels.patches import patchify

VOCABULARY = 262_144
OFF = SamplingFacts(temperature=1.0, top_k=None, top_p=None, min_p=None)


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 4, VOCABULARY).astype(np.float32)


def test_resize_to_280_soft_tokens(benchmark, photo):
    small = photo[:90, :160]
    difference = np.abs(resize(small, 48, 96, "bicubic").astype(int) - reference.resize(small, 48, 96, "bicubic"))
    assert difference.max() <= 1
    benchmark(resize, photo, 576, 1056, "bicubic")


def test_patchify_280_soft_tokens(benchmark, photo):
    pixels = resize(photo, 576, 1056, "bicubic")
    patches = benchmark(patchify, pixels, 16, 3)
    expected = reference.patchify(pixels, 16)
    order = np.lexsort((patches.positions[:, 0], patches.positions[:, 1]))
    np.testing.assert_array_equal(patches.values[order], expected.values)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(seed=1), Sampling(top_k=64, top_p=0.95, seed=1), Sampling(top_p=0.95, seed=1)],
    ids=["greedy", "plain", "top_k 64, top_p 0.95", "top_p 0.95"],
)
def test_sample_from_a_row(benchmark, logits, sampling):
    short = logits[:500]
    allowed = reference_sampling.keep_top_k([*enumerate(short.astype(float))], 64)
    assert sorted(topk.top_k(short, 64).tolist()) == sorted(token for token, _ in allowed)
    token = benchmark(Sampler(resolve(sampling, OFF)), logits)
    assert 0 <= token < VOCABULARY


def test_decode_step_of_the_demo(benchmark, engine):
    """One step after 60 tokens, with the state's growth kept out: a fresh session for every 40 steps."""
    ids = np.arange(200, 260) % engine.runtime.vocabulary
    expected = engine.runtime.session().prefill(np.append(ids, 200))

    def fresh():
        session = engine.runtime.session()
        session.prefill(ids)
        return (session,), {}

    logits = benchmark.pedantic(lambda session: session.step(200), setup=fresh, rounds=40)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_vision_of_the_demo(benchmark, engine, photo):
    encoded = benchmark(engine.encode, photo)
    assert len(encoded) <= engine.manifest.image.default_budget
    assert np.isfinite(encoded.soft_tokens).all()
