"""Mutated input at length: typed errors only, no crash, no hang. `make fuzz`; SIGLANCE_FUZZ_INPUTS sets the number."""

from __future__ import annotations

import io
import json
import os
import resource
import time

import numpy as np
import pytest
from PIL import Image

from siglance.engine.boxes import parse_boxes
from siglance.engine.errors import BundleError, ImageError
from siglance.engine.image import load_image
from siglance.engine.manifest import read_manifest, write_manifest
from siglance.engine.self_test import formula_picture

pytestmark = pytest.mark.fuzz

INPUTS = int(os.environ.get("SIGLANCE_FUZZ_INPUTS", "5000"))
SEED = 20_261_125
SLOWEST = 5.0  # seconds for one input
MOST_MEMORY = 600_000  # kilobytes of growth: 50 megapixels are decoded at most


def originals() -> list[bytes]:
    """One small picture in every format, grey, with transparency and with a palette too."""
    picture = Image.fromarray(formula_picture(37, 53))
    files = []
    for kind, modes in {
        "PNG": ("RGB", "RGBA", "P", "L", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P",),
        "BMP": ("RGB", "P"),
        "TIFF": ("RGB", "L", "CMYK"),
        "PPM": ("RGB",),
    }.items():
        for mode in modes:
            file = io.BytesIO()
            (picture.convert("L") if mode == "I;16" else picture).convert(mode).save(file, kind)
            files.append(file.getvalue())
    return files


def mutated(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """Flip bits, overwrite a run, cut, or join the halves of two files."""
    data = bytearray(files[rng.integers(len(files))])
    kind = rng.integers(4)
    if kind == 0:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 1:
        # Headers hold the sizes, so half of the runs begin there.
        start = int(rng.integers(64 if rng.random() < 0.5 else len(data)))
        run = rng.bytes(int(rng.integers(1, 9)))
        data[start : start + len(run)] = run
    elif kind == 2:
        del data[int(rng.integers(len(data))) :]
    else:
        other = files[rng.integers(len(files))]
        data = data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]
    return bytes(data)


def test_mutated_images():
    rng, files = np.random.default_rng(SEED), originals()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = 0
    refused: list[str] = []
    slowest = 0.0
    for _ in range(INPUTS):
        data = mutated(rng, files)
        begin = time.perf_counter()
        try:
            pixels = load_image(data)
        except ImageError as error:
            refused.append(str(error))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            read += 1
        slowest = max(slowest, time.perf_counter() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{INPUTS} images (seed {SEED}): {read} read, {len(refused)} refused, slowest {slowest:.2f} s, peak +{grown} kB"
    )
    assert not any("\n" in message for message in refused)
    assert slowest < SLOWEST
    assert grown < MOST_MEMORY


def test_mutated_manifests(tiny_model):
    rng = np.random.default_rng(SEED)
    text = write_manifest(tiny_model("gemma4").bundle.manifest)
    pieces = ["{", "}", "[", "]", '"', ",", ":", "null", "-1", "1e999", "true", "\\", "\x00", "Ω", " " * 50]
    refused: list[str] = []
    for _ in range(INPUTS // 10):
        where = int(rng.integers(len(text)))
        damaged = text[:where] + pieces[rng.integers(len(pieces))] + text[where + int(rng.integers(4)) :]
        try:
            read_manifest(damaged)
        except BundleError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    print(f"{INPUTS // 10} manifests: {len(refused)} refused")


def test_mutated_replies():
    rng = np.random.default_rng(SEED)
    text = "```json\n" + json.dumps([{"box_2d": [1, 2, 300, 400], "label": "a ] b"}] * 3) + "\n```"
    pieces = ["{", "}", "[", "]", '"', ",", "box_2d", "NaN", "1e400", "\\u", "```", "\ud800", "0" * 400]
    for _ in range(INPUTS // 10):
        damaged = text
        for _ in range(rng.integers(1, 6)):
            where = int(rng.integers(len(damaged)))
            damaged = damaged[:where] + pieces[rng.integers(len(pieces))] + damaged[where + int(rng.integers(4)) :]
        for box in parse_boxes(damaged, "box_2d", [(480, 640)]).boxes:
            x_min, y_min, x_max, y_max = box.box
            assert 0 <= x_min <= x_max <= 640
            assert 0 <= y_min <= y_max <= 480
