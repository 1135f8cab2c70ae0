"""The vision graph of a bundle of ours, on patches of noise."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
from serve import serve

from siglance.engine.bundle import Bundle
from siglance.engine.graph import Device, Graph
from siglance.kernels.patches import patchify


class Siglance:
    def __init__(self, path: str, threads: int, height: int, width: int):
        bundle = Bundle.open(path)
        facts = bundle.manifest.image
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        patches = patchify(pixels, facts.patch_size, facts.pool_size)
        self._feeds = {"patches": patches.values, "positions": patches.positions}
        self._graph = Graph(bundle.path("vision"), Device("cpu"), threads=threads)

    def see(self) -> np.ndarray:
        return self._graph.run(self._feeds)["soft_tokens"]


def load(facts: dict[str, Any]) -> tuple[Siglance, dict[str, str]]:
    model = Siglance(facts["path"], facts["threads"], facts["height"], facts["width"])
    return model, {"siglance": metadata.version("siglance"), "onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    serve(load)
