"""Official models with random weights: the sizes, load times and speed of a model whose weights are not at hand.

Configuration and shapes are the official ones; every tensor is drawn, and matrices are drawn in the format they will be
stored in, so that an export takes no longer than writing the file. Tokens are made up, except the special ones, which
have the official ids and spellings.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import ExportError
from ..kernels.quantize import Blocks
from .checkpoint import SLICE_BYTES, Weights
from .official import official_config
from .plan import Storage
from .random_tokenizer import chat_template, tokenizer

__all__ = ["RandomCheckpoint", "RandomWeights"]

_BOUND = 64.0  # of clipped linear layers: far outside of what the random activations reach


class RandomCheckpoint:
    """The checkpoint protocol over the built-in configuration of an official model.

    It has no list of tensors: `RandomWeights` gives a family whatever tensor it asks for. Raises ExportError for an
    unknown name.
    """

    def __init__(self, name: str):
        self.folder: Path | None = None
        self.revision: str | None = None
        self.quantised = False
        self.source = f"random:{name}"
        self.config = official_config(name)

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        return {}

    def names(self) -> set[str]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        raise ExportError(f"a random model has no stored tensor {name!r}")

    def read(self, name: str) -> np.ndarray:
        raise ExportError(f"a random model has no stored tensor {name!r}")

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        raise ExportError(f"a random model has no stored tensor {name!r}")

    def blocks(self, name: str) -> Blocks | None:
        return None

    def widened(self) -> dict[str, int]:
        return {}

    def write_texts(self, folder: Path) -> dict[str, str]:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(self.config), ensure_ascii=False), encoding="utf-8")
        template = chat_template(self.config)
        if template is None:
            return {"tokenizer": "tokenizer.json"}
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}


class RandomWeights(Weights):
    """Draws any tensor by name and shape; the same name always gives the same numbers.

    Scales keep activations near one: matrices have entries of standard deviation columns^-0.5, norm weights lie between
    0.1 and 0.9 (which serves both kinds of norm, w and 1 + w), clip bounds cut nothing.
    """

    random = True

    def __init__(self, checkpoint: RandomCheckpoint):
        super().__init__(checkpoint, {})

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        if re.search(r"(input|output)_(min|max)$", name):
            return np.array(-_BOUND if name.endswith("min") else _BOUND, np.float32)
        if shape is None:
            raise ExportError(f"a random model needs the shape of {name!r}")
        generator = self._generator(name)
        if len(shape) == 1:
            return generator.uniform(0.1, 0.9, shape).astype(np.float32)
        values = generator.random(shape, np.float32)
        values -= 0.5
        values *= (12.0 / shape[-1]) ** 0.5  # a uniform number has the standard deviation 12^-0.5
        return values

    def read_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        step = max(1, SLICE_BYTES // (4 * int(np.prod(shape[1:], dtype=np.int64))))
        for start in range(0, shape[0], step):
            yield self.read(f"{name}[{start}:]", (min(step, shape[0] - start), *shape[1:]))

    def random_blocks(self, name: str, shape: tuple[int, int], storage: Storage) -> Blocks | None:
        generator = self._generator(name)
        rows, columns = shape
        codes = np.frombuffer(generator.bytes(rows * columns * storage.bits // 8), np.uint8).reshape(rows, -1)
        deviation = 2**storage.bits / 12**0.5  # of uniform codes
        scales = generator.uniform(0.8, 1.2, (rows, columns // storage.block)) / (deviation * columns**0.5)
        return Blocks(storage.bits, storage.block, codes, scales.astype(np.float32))

    def check_all_used(self) -> None:
        """Nothing is stored, so nothing can be left over."""

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(name.encode()))
