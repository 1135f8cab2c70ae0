"""Work of the exporter that runs in a child process: the tokenizer (hundreds of megabytes while it is loaded) and the
first run of the new bundle. Functions here take and return values that JSON has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..engine.bundle import Bundle
from ..engine.errors import ExportError
from ..engine.manifest import read_manifest
from ..engine.self_test import record

__all__ = ["record_self_test", "special_tokens", "tokenizer_ids"]


def tokenizer_ids(path: str, tokens: list[str]) -> dict[str, int]:
    """The ids of those `tokens` that the tokenizer file at `path` has."""
    from tokenizers import Tokenizer  # not at module level: only this function's process should pay for it

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(f"{Path(path).name} cannot be read: {error}") from None
    found = {token: tokenizer.token_to_id(token) for token in tokens}
    return {token: identifier for token, identifier in found.items() if identifier is not None}


def special_tokens(path: str) -> list[str]:
    """The special tokens of the tokenizer file at `path`."""
    from tokenizers import Tokenizer

    try:
        added = Tokenizer.from_file(path).get_added_tokens_decoder().values()
    except Exception as error:
        raise ExportError(f"{Path(path).name} cannot be read: {error}") from None
    return sorted(token.content for token in added if token.special)


def record_self_test(folder: str, manifest: str, prepack: bool, request: dict[str, Any] | None) -> dict[str, Any]:
    """Run the bundle in `folder`, whose manifest has this text: the text of its self_test.json, and with a request to
    compare it with the float32 model what each of its graphs loses."""
    bundle = Bundle(Path(folder), read_manifest(manifest))
    losses = {}
    if request is not None:  # the machinery of calibration is 40 MB, which the other work here has no use for
        from .calibration_run import Request
        from .graph_losses import measure_losses

        losses = measure_losses(bundle, Request(**request), prepack)
    return {"self_test": json.dumps(record(bundle, prepack=prepack), indent=1) + "\n", "graphs": losses}
