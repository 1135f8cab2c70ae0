"""The tokenizer of a GGUF file, rebuilt as a tokenizer.json: SentencePiece BPE with byte fallback.

A SentencePiece model joins, of all neighbours that together are a piece, the pair with the best score. A tokenizer.json
lists the pairs themselves, best first. So every way to split a piece into two pieces becomes a merge, in the order of
the scores of what they make. User-defined pieces are matched before anything is joined, which is what added tokens are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import TokenType

from ..engine.errors import ExportError

__all__ = ["SPACE", "Vocabulary"]

SPACE = "\u2581"  # how SentencePiece spells a space
_ADVICE = "give a tokenizer.json with --tokenizer"
# Converters have marked some of these as user-defined; what opens and closes turns and images is never user text.
_CONTROL = re.compile(r"<(start|end)_of_[a-z]+>")


class Vocabulary:
    """The metadata `tokenizer.ggml.*` of the GGUF file at `path`. Raises ExportError for what cannot be rebuilt."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self._path = path
        self._metadata = metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "llama":
            raise self._error(f"its tokenizer is of the kind {kind!r}, only 'llama' (SentencePiece) can be rebuilt")
        if metadata.get("tokenizer.ggml.add_space_prefix", True) is not False:
            raise self._error("its tokenizer puts a space in front of every text")
        if metadata.get("tokenizer.ggml.add_eos_token", False) is not False:
            raise self._error("its tokenizer puts an end-of-sequence token behind every text")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise self._error("it has no vocabulary (tokenizer.ggml.tokens)")
        self._types = self._numbers("token_type", len(tokens)).astype(np.int64).tolist()
        self._scores = self._numbers("scores", len(tokens)).astype(np.float64).tolist()
        unknown = sorted(set(self._types) - set(TokenType))
        if unknown:
            raise self._error(f"its vocabulary has tokens of type {unknown[0]}, which is not known")
        # Converters spell the spaces of user-defined pieces as spaces.
        self.tokens = [
            token.replace(" ", SPACE) if kind == TokenType.USER_DEFINED else token
            for token, kind in zip(tokens, self._types, strict=True)
        ]
        self._ids = {token: identifier for identifier, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            twice = next(token for identifier, token in enumerate(self.tokens) if self._ids[token] != identifier)
            raise self._error(f"its vocabulary has token {twice!r} twice")

    def identifier(self, name: str) -> int | None:
        """The id under the metadata key `tokenizer.ggml.<name>_token_id`, or None without that key."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self._error(f"tokenizer.ggml.{name}_token_id = {value!r} is no id of its {len(self.tokens)} tokens")
        return value

    def token(self, name: str) -> str | None:
        """The token with the id under the metadata key `tokenizer.ggml.<name>_token_id`, or None without that key."""
        identifier = self.identifier(name)
        return None if identifier is None else self.tokens[identifier]

    def write(self, path: Path) -> None:
        """Write the tokenizer.json."""
        unknown = self.token("unknown")
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": TokenType.BYTE in self._types,
            "ignore_merges": False,
            "vocab": self._ids,
            "merges": list(self._merges()),
        }
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added_tokens()),
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            "pre_tokenizer": None,
            "post_processor": self._post_processor(),
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": model,
        }
        path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

    def _merges(self) -> Iterator[tuple[str, str]]:
        """All pairs of pieces that make a piece; pairs of a better score first, then of the lower id."""
        pieces = {
            token: identifier for token, identifier in self._ids.items() if self._types[identifier] == TokenType.NORMAL
        }
        for token in sorted(pieces, key=lambda token: (-self._scores[pieces[token]], pieces[token])):
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in pieces and right in pieces:
                    yield left, right

    def _added_tokens(self) -> Iterator[dict[str, Any]]:
        """Control tokens are special and matched in the text as it is; user-defined ones after spaces are replaced."""
        for identifier, (token, kind) in enumerate(zip(self.tokens, self._types, strict=True)):
            special = kind in (TokenType.CONTROL, TokenType.UNKNOWN) or _CONTROL.fullmatch(token) is not None
            if special or kind == TokenType.USER_DEFINED:
                yield {
                    "id": identifier,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": not special,
                    "special": special,
                }

    def _post_processor(self) -> dict[str, Any] | None:
        """Puts the beginning-of-sequence token in front, if the file says so."""
        add = self._metadata.get("tokenizer.ggml.add_bos_token", True)
        identifier = self.identifier("bos")
        if add is not True or identifier is None:
            return None
        begin = self.tokens[identifier]
        single = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second = [{"SpecialToken": {"id": begin, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {begin: {"id": begin, "ids": [identifier], "tokens": [begin]}},
        }

    def _numbers(self, name: str, count: int) -> np.ndarray:
        values = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, np.ndarray) or len(values) != count:
            found = (
                "none" if values is None else len(values) if isinstance(values, (list, np.ndarray)) else repr(values)
            )
            raise self._error(f"its {count} tokens need as many tokenizer.ggml.{name}, it has {found}")
        if not np.isfinite(values).all():
            raise self._error(f"tokenizer.ggml.{name} are not all finite")
        return values

    def _error(self, what: str) -> ExportError:
        return ExportError(f"{self._path}: {what}; {_ADVICE}")
