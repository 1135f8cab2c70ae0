"""A prompt with its pictures as the vision tower is given them, and what the tower says about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.patches import Patches
from .feature_cache import content_key
from .known_files import NOTHING_KNOWN, KnownFiles
from .manifest import ImageFacts
from .pictures import PreparedPicture
from .prefix_cache import SoftRows, row_keys
from .prompt import Prompt
from .reply import EncodedVideo, StageClock

__all__ = ["SeenPrompt", "SeenView", "see", "see_all"]


@dataclass(slots=True, eq=False)
class SeenView:
    """A view as the vision tower is given it; `soft_tokens` float32 [length, D] once they are known.

    `content` is the key of what is seen: equal for equal patches, whatever file they came from. `look` gives them.
    """

    length: int
    content: bytes
    look: Callable[[], Patches] | None = None
    soft_tokens: np.ndarray | None = None

    def resolve(self, soft_tokens: np.ndarray) -> np.ndarray:
        """Remember the answer; the patches are not needed any more."""
        self.soft_tokens, self.look = soft_tokens, None
        return soft_tokens


@dataclass(frozen=True, slots=True, eq=False)
class SeenPrompt:
    """A prompt, its pictures, and the view of each of its spans."""

    prompt: Prompt
    pictures: Sequence[PreparedPicture]
    views: Sequence[SeenView]

    @property
    def soft_runs(self) -> list[tuple[int, int]]:
        """First row and end of each longest run of soft tokens."""
        runs: list[tuple[int, int]] = []
        for span in self.prompt.spans:
            first = runs.pop()[0] if runs and runs[-1][1] == span.start else span.start
            runs.append((first, span.start + span.length))
        return runs

    def row_keys(self) -> np.ndarray:
        """What the rows are known by in the cache: int64 [L]."""
        spans = zip(self.prompt.spans, self.views, strict=True)
        return row_keys(self.prompt.ids, [SoftRows(span.start, span.length, view.content) for span, view in spans])


def see(
    picture: PreparedPicture, view: int, facts: ImageFacts | None, clock: StageClock, known: KnownFiles = NOTHING_KNOWN
) -> SeenView:
    """Draw a page or decode a frame, resize and cut into patches: at once, or when asked for if the file is known.

    What is encoded already is its soft tokens.
    """
    if picture.encoded is not None:
        encoded = picture.encoded.frames[view] if isinstance(picture.encoded, EncodedVideo) else picture.encoded
        values = encoded.soft_tokens
        # Made by hand it may have no key: then its values are what it is known by.
        content = encoded.content or hashlib.blake2b(values.tobytes(), digest_size=32).digest()
        return SeenView(len(values), content, soft_tokens=values)
    assert facts is not None
    assert picture.source is not None

    def look() -> Patches:
        with clock.stage("decode_file"):
            pixels = picture.pixels(view)
        with clock.stage("resize"):
            return picture.patches(view, pixels, facts)

    file, length = picture.source.file, picture.soft_tokens[view]
    content = None if file is None else known.get(bytes, file, picture.views[view])
    if content is not None:
        return SeenView(length, content, look)
    patches = look()
    with clock.stage("resize"):
        content = content_key(patches)
    if file is not None:
        known.put(content, file, picture.views[view])
    return SeenView(length, content, lambda: patches)


def see_all(
    prompt: Prompt,
    pictures: Sequence[PreparedPicture],
    facts: ImageFacts | None,
    clock: StageClock,
    known: KnownFiles = NOTHING_KNOWN,
) -> SeenPrompt:
    """The prompt with all its views."""
    views = [see(pictures[span.media_index], span.view, facts, clock, known) for span in prompt.spans]
    return SeenPrompt(prompt, pictures, views)
