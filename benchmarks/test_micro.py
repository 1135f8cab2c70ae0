"""Micro-benchmarks. Each checks its result before it measures: a fast wrong answer is no speed.

`make bench` runs them; pytest-benchmark prints minimum, median and spread, `--benchmark-json` saves the machine too.
"""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine.graph import Device, Graph
from siglance.engine.image_policy import resize
from siglance.engine.manifest import SamplingFacts
from siglance.engine.sampling import Sampler, Sampling, resolve
from siglance.export.builder import FLOAT, GraphBuilder, WeightsFile
from siglance.kernels import logits as rows
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


def test_pool_2520_patches(benchmark, tmp_path):
    """Blocks of 3 x 3 patches, contiguous in memory, to 280 means: how the vision graphs pool."""
    width, pool = 768, 3
    with WeightsFile(tmp_path / "weights.bin") as weights:
        builder = GraphBuilder("pool", weights)
        x = builder.input("x", FLOAT, ["patches", width])
        shape = builder.constant(np.array([-1, pool**2, width], np.int64), "shape")
        axis = builder.constant(np.array([1], np.int64), "axis")
        pooled = builder.op("ReduceMean", builder.op("Reshape", x, shape), axis, keepdims=0)
        builder.output(pooled, "y", FLOAT, ["soft_tokens", width])
        builder.save(tmp_path / "pool.onnx", "benchmark")
    positions = patchify(np.zeros((672, 960, 3), np.uint8), 16, pool).positions  # 42 x 60 patches
    features = np.random.default_rng(0).normal(0, 1, (len(positions), width)).astype(np.float32)
    found = benchmark(Graph(tmp_path / "pool.onnx", Device("cpu")).run, {"x": features})["y"]
    np.testing.assert_allclose(found, reference.pool(features, positions, pool), atol=1e-5)


PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}


STEPS = {
    "greedy": {"temperature": 0},
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 64, top_p 0.95": {"top_k": 64, "top_p": 0.95},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 64, penalties": {"top_k": 64, **PENALTIES},
    "top_k 64, bias": {"top_k": 64, "logit_bias": dict.fromkeys(range(300), -2.0)},
    "top_k 64, mask": {"top_k": 64, "mask": 0.5},
    "all": {"top_k": 64, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7, "mask": 0.5, **PENALTIES},
}


@pytest.mark.parametrize("values", STEPS.values(), ids=STEPS)
def test_sample_from_a_row(benchmark, logits, values):
    """One draw; the penalties count a prompt and a reply of 1,000 different tokens."""
    short = logits[:500]
    allowed = reference_sampling.keep_top_k([*enumerate(short.astype(float))], 64)
    assert sorted(topk.top_k(short, 64).tolist()) == sorted(token for token, _ in allowed)
    generator = np.random.default_rng(0)
    share = values.get("mask")
    bits = None if share is None else np.packbits(generator.random(VOCABULARY) < share, bitorder="little")
    sampling = Sampling(seed=1, **{name: value for name, value in values.items() if name != "mask"})
    sampler = Sampler(resolve(sampling, OFF), range(500))
    for token in range(400, 1000):
        sampler.add(token)
    token = benchmark(sampler, logits, bits)
    assert 0 <= token < VOCABULARY
    assert bits is None or bits[token // 8] >> token % 8 & 1


def test_log_probabilities_of_a_row(benchmark, logits):
    ids = topk.top_k(logits, 20)
    found = benchmark(rows.log_probabilities, logits, ids)
    expected = reference_sampling.log_probabilities(logits.astype(float).tolist())
    np.testing.assert_allclose(found, [expected[id] for id in ids], atol=1e-4)


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
