"""The text that calibration runs the model over: written for it, in the folder `calibration_text`.

Prose, several languages, code, data and conversations. It is never a text that a model is scored on.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from ..engine.errors import ExportError, SiglanceError
from ..engine.template import ChatTemplate

__all__ = ["SEQUENCE", "calibration_ids"]

_FOLDER = Path(__file__).parent / "calibration_text"
SEQUENCE = 512  # tokens
_FEWEST = 16  # a shorter rest says little


def calibration_ids(tokenizer: Path, template: Path | None, begin: str, length: int, tokens: int) -> list[list[int]]:
    """Sequences of at most `length` ids, each with the token `begin` in front, of about `tokens` ids in all.

    `tokenizer` and `template` are the paths of tokenizer.json and of the chat template, in which the conversations are
    laid out; without a template, or with one that refuses them, they are paragraphs. Raises ExportError when the
    tokenizer cannot be used.
    """
    from tokenizers import Tokenizer  # not at module level: it is hundreds of megabytes in the process that calls this

    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises plain Exception
        raise ExportError(f"{tokenizer.name} cannot be read: {error}") from None
    first = encoder.token_to_id(begin)
    if first is None:
        raise ExportError(f"tokenizer.json has no token {begin!r}")
    step = length - 1
    kinds = []
    for texts in _texts(template, begin):
        ids = [encoder.encode(text, add_special_tokens=False).ids for text in texts]
        cut = (part[start : start + step] for part in ids for start in range(0, len(part), step))
        kinds.append([[first, *part] for part in cut if len(part) >= min(_FEWEST, step)])
    # In turn, so that a part of the text is of all kinds too.
    sequences, total = [], 0
    for sequence in itertools.chain.from_iterable(itertools.zip_longest(*kinds)):
        if sequence is not None and total < tokens:
            sequences.append(sequence)
            total += len(sequence)
    return sequences


def _texts(template: Path | None, begin: str) -> list[list[str]]:
    """The texts of each kind."""
    kinds = [[path.read_text(encoding="utf-8")] for path in sorted(_FOLDER.glob("*.txt"))]
    conversations = json.loads((_FOLDER / "dialogues.json").read_text(encoding="utf-8"))
    plain = "\n\n".join(turn["content"] for conversation in conversations for turn in conversation)
    source = None if template is None else template.read_text(encoding="utf-8")
    # A template that reads the clock would give another bundle tomorrow.
    if source is None or "strftime_now" in source:
        return [*kinds, [plain]]
    try:
        chat = ChatTemplate(source)
        # The token in front is added later, as for all texts.
        rendered = [chat.render(messages, bos_token=begin).removeprefix(begin) for messages in conversations]
    except SiglanceError:  # made for other conversations; the words are what matters
        rendered = [plain]
    return [*kinds, rendered]
