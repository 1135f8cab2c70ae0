"""What a checkpoint says of generating: ids that end a reply, and sampling defaults."""

from __future__ import annotations

import sys
from typing import Any

from ..engine.errors import ExportError
from ..engine.manifest import SamplingFacts
from .checkpoint import Checkpoint

__all__ = ["sampling_facts", "stop_ids"]

_NAME = "generation_config.json"
_MOST = {"temperature": sys.float_info.max, "top_k": 2**31, "top_p": 1, "min_p": 1}


def stop_ids(checkpoint: Checkpoint) -> set[int]:
    """The end-of-sequence ids of config.json, its text part and generation_config.json together.

    Raises ExportError for what is no token id.
    """
    text = checkpoint.config.get("text_config")
    found: set[int] = set()
    for source in (checkpoint.config, text if isinstance(text, dict) else {}, checkpoint.json(_NAME)):
        stop = source.get("eos_token_id")
        listed = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if not all(type(identifier) is int and identifier >= 0 for identifier in listed):
            raise ExportError(f"eos_token_id = {stop!r} must be a token id or a list of them")
        found.update(listed)
    return found


def sampling_facts(checkpoint: Checkpoint) -> SamplingFacts:
    """Sampling defaults of generation_config.json; a checkpoint that does not sample is greedy.

    Raises ExportError for what is no number in its range: NaN and Infinity are none.
    """
    generation = checkpoint.json(_NAME)
    if not generation.get("do_sample", False):
        return SamplingFacts(temperature=0.0, top_k=None, top_p=None, min_p=None)
    values: dict[str, Any] = {key: generation.get(key) for key in _MOST}
    for key, value in values.items():
        kinds = (int,) if key == "top_k" else (int, float)
        if value is not None and not (type(value) in kinds and 0 <= value <= _MOST[key]):
            what = "an integer" if key == "top_k" else "a finite number"
            raise ExportError(f"{_NAME}: {key} = {value!r} must be {what} from 0 to {_MOST[key]:g}")
    if values["temperature"] is None:
        values["temperature"] = 1.0
    return SamplingFacts(**values)
