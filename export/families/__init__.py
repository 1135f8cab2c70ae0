"""Model families: one module here is one family, found from `model_type` in a checkpoint's config.json.

Modules whose names begin with an underscore are parts of a family.

A family module defines `FAMILY`. Everything a family must say is in the `Family` dataclass below; everything else is
composed from `export/blocks.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.errors import ExportError
from ...engine.manifest import (
    AudioFacts,
    FramesFacts,
    ImageFacts,
    PlaceholderFacts,
    ReplyFacts,
    StatePair,
    VideoFacts,
)
from ..builder import GraphBuilder
from ..checkpoint import Checkpoint, Weights

__all__ = ["ConfigReader", "ExportOptions", "Facts", "Family", "families", "find_family", "full_state_note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the caller chose. `context` is the number of tokens that prompt and reply may have together.

    `precision` None is the default of the source: "keep" for a file whose matrices are quantised, else "auto".
    `accept_loss` writes a bundle even if it has little to do with the model any more.
    """

    precision: str | None = None
    target: str = "cpu"
    context: int = 32768
    accept_loss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a family tells the manifest."""

    requires: tuple[str, ...]
    state: tuple[StatePair, ...]
    image: ImageFacts | None
    image_prompt: PlaceholderFacts | None
    reply: ReplyFacts
    turn_ends: tuple[str, ...]  # tokens that end a model turn, beside the checkpoint's own end-of-sequence ids
    video: VideoFacts | None = None
    video_prompt: FramesFacts | None = None
    audio: AudioFacts | None = None
    audio_prompt: PlaceholderFacts | None = None
    context: int | None = None  # tokens the model was made for, if config.json leaves that to the class's default
    layout: str = "inline"  # see PromptFacts; "media_first" bundles have no chat template
    prompt_end: str = ""
    left_out: tuple[str, ...] = ()  # parts of the checkpoint that the bundle does not have, in words
    notes: tuple[str, ...] = ()  # what the user of the bundle should know, in words


def full_state_note(values: Sequence[int], windowed: Sequence[bool], window: int, why: str) -> str:
    """The note of a model whose layers all keep every token, for layers of `values` numbers of state a token each."""
    total, avoidable = sum(values), sum(value for value, flag in zip(values, windowed, strict=True) if flag)
    note = f"every layer keeps keys and values of all tokens: {4 * total} bytes a token in float32, half in float16"
    if not avoidable:
        return note
    return (
        f"{note}; {4 * avoidable} of them in {sum(windowed)} layers whose window of {window} tokens could be a buffer "
        f"if {why}"
    )


GraphFunction = Callable[[GraphBuilder, Weights, Any, ExportOptions], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    `read` turns config.json into the family's own frozen configuration and raises ExportError for anything it does not
    support, before a weight is read. `graphs` maps graph names to the functions that build them. `finish` marks the
    tensors that checkpoints carry for nothing and returns what the manifest needs to know.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: dict[str, tuple[str, ...]]
    read: Callable[[dict[str, Any]], Any]
    graphs: Callable[[Any], dict[str, GraphFunction]]
    finish: Callable[[Checkpoint, Weights, Any, ExportOptions], Facts]


def families() -> list[Family]:
    """All families, by module name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules]


def find_family(config: dict[str, Any]) -> Family:
    """The family for a config.json. Raises ExportError listing what is supported."""
    _refuse_quantised(config)
    model_type = config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in families() for name in family.model_types))
    raise ExportError(f"model_type {model_type!r} is not supported; supported: {supported}")


def _refuse_quantised(config: dict[str, Any]) -> None:
    """Raise ExportError for matrices that some other library has quantised.

    Plain numbers may come with a `quantization_config` too, which says what they were trained for; it names no method.
    """
    for section in (config, config.get("text_config"), config.get("vision_config")):
        facts = section.get("quantization_config") if isinstance(section, dict) else None
        method = facts.get("quant_method") if isinstance(facts, dict) else None
        if method is None and isinstance(section, dict) and isinstance(section.get("quantization"), dict):
            method = "mlx"
        if method is not None:
            raise ExportError(
                f"config.json: the matrices are quantised by {method!r}, which is not supported: name the original "
                "checkpoint, or a GGUF file; if the tensors are plain numbers, take quantization_config away"
            )


_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to one object of config.json; `where` names it in errors."""

    values: dict[str, Any]
    where: str = "config.json"

    def integer(self, key: str, default: Any = _MISSING) -> int:
        return self._get(key, default, int)

    def number(self, key: str, default: Any = _MISSING) -> float:
        value = self._get(key, default, (int, float))
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise ExportError(f"{self.where}: {key} = {value!r} must be finite")
        return float(value)

    def positive(self, key: str, default: Any = _MISSING) -> float:
        """A number above zero."""
        value = self.number(key, default)
        if value <= 0:
            raise ExportError(f"{self.where}: {key} = {value!r} must be above 0")
        return value

    def count(self, key: str, default: Any = _MISSING) -> int:
        """An integer from 1 on."""
        value = self.integer(key, default)
        if value < 1:
            raise ExportError(f"{self.where}: {key} = {value!r} must be at least 1")
        return value

    def cap(self, key: str, default: float | None = None) -> float | None:
        """A soft cap, which is above zero; absent means the default, null means none."""
        return self.positive(key, default) if self.values.get(key, default) is not None else None

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        return self._get(key, default, bool)

    def strings(self, key: str, default: Any = _MISSING) -> list[str]:
        return self._get(key, default, list)

    def section(self, key: str) -> ConfigReader:
        return ConfigReader(self._get(key, _MISSING, dict), f"{self.where}: {key}")

    def optional(self, key: str) -> Any:
        """The value of `key`, or None when it is absent or null."""
        return self.values.get(key)

    def expect(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a value that would need mathematics this family's graphs do not have; absent counts as null."""
        value = self.values.get(key)
        if value not in allowed:
            raise ExportError(
                f"{self.where}: {key} = {value!r} is not supported (supported: {', '.join(map(repr, allowed))})"
            )

    def expect_epsilon(self, expected: float) -> None:
        value = self.values.get("rms_norm_eps", expected)
        if not isinstance(value, (int, float)) or abs(value - expected) > 1e-3 * expected:
            raise ExportError(f"{self.where}: rms_norm_eps = {value!r} is not supported (supported: {expected})")

    def _get(self, key: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ExportError(f"{self.where} has no {key!r}")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ExportError(f"{self.where}: {key} = {value!r} has the wrong type")
        return value
