"""Pictures before the vision tower: the views of each, the whole and perhaps crops, and the size of each view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels import geometry
from ..kernels.patches import Patches, patchify
from .errors import ImageError, PromptError
from .image_policy import POLICIES, Layout, resize
from .manifest import ImageFacts
from .media import PictureSource
from .prompt import Media, Prompt, Span
from .reply import EncodedImage, EncodedVideo
from .sounds import PreparedSound
from .video import clock

__all__ = ["PreparedPicture", "View", "assign_spans", "lay_out"]


@dataclass(frozen=True, slots=True)
class View:
    """What the vision tower sees at once: `box` is (top, left, bottom, right) in units of the proportions."""

    box: tuple[int, int, int, int]
    layout: Layout


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPicture:
    """A picture with its views (the whole, then crops), a video with a view for each frame, or a picture that is
    encoded already and has none. `resample` is the filter that views are resized with."""

    source: PictureSource | None = None
    views: tuple[View, ...] = ()
    encoded: EncodedImage | EncodedVideo | None = None
    resample: str = "bicubic"

    @property
    def soft_tokens(self) -> tuple[int, ...]:
        """Number of soft tokens of each view."""
        if isinstance(self.encoded, EncodedVideo):
            return tuple(map(len, self.encoded.frames))
        if self.encoded is not None:
            return (len(self.encoded),)
        return tuple(view.layout.soft_tokens for view in self.views)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that boxes are measured in."""
        if self.encoded is not None:
            return self.encoded.size
        assert self.source is not None
        return self.source.size

    @property
    def modality(self) -> str:
        """What the soft tokens count as: "image", "document" or "video"."""
        if self.encoded is not None:
            return self.encoded.modality
        assert self.source is not None
        return self.source.modality

    @property
    def times(self) -> tuple[float, ...]:
        """When each frame of a video is shown, in seconds; () for anything else."""
        if isinstance(self.encoded, EncodedVideo):
            return self.encoded.times
        return () if self.source is None or self.source.clip is None else self.source.clip.times

    @property
    def medium(self) -> Media:
        """What a prompt needs to know."""
        if self.times:
            frames = tuple(zip(map(clock, self.times), self.soft_tokens, strict=True))
            return Media(kind="video", soft_tokens=sum(self.soft_tokens), frames=frames)
        whole, *crops = self.soft_tokens
        return Media(soft_tokens=whole, crops=tuple(crops))

    def pixels(self, view: int) -> npt.NDArray[np.uint8]:
        """The pixels of one view, uint8 [H, W, 3], not resized yet. A page is drawn large enough for it now; frames of
        videos come in the size of the layout."""
        assert self.source is not None
        if self.source.clip is not None:
            layout = self.views[view].layout
            return self.source.clip.pixels(view, layout.height, layout.width, self.resample)
        (height, width), (top, left, bottom, right) = self.source.proportions, self.views[view].box
        layout = self.views[view].layout
        whole = self.source.pixels(
            -(-layout.height * height // (bottom - top)), -(-layout.width * width // (right - left))
        )
        # Images have the size of their proportions; pages may have been drawn in another one.
        rows, columns = whole.shape[0], whole.shape[1]
        return whole[
            top * rows // height : -(-bottom * rows // height), left * columns // width : -(-right * columns // width)
        ]

    def patches(self, view: int, pixels: npt.NDArray[np.uint8], facts: ImageFacts) -> Patches:
        """Resize the pixels of one view and cut them into patches."""
        layout = self.views[view].layout
        return patchify(resize(pixels, layout.height, layout.width, facts.resample), facts.patch_size, facts.pool_size)


def lay_out(
    source: PictureSource, facts: ImageFacts, budget: int | None, *, pan_and_scan: bool = False
) -> PreparedPicture:
    """Choose the views of a picture and their sizes; `budget` is the number of soft tokens of each view.

    All frames of a video have the layout of the first, and are never shown in crops.

    Raises ImageError, naming the picture, for a budget or a size that is not possible, or for `pan_and_scan` with a
    model that does not have it.
    """
    height, width = source.proportions
    boxes = [(0, 0, height, width)]
    if pan_and_scan:
        crops = facts.pan_and_scan
        if crops is None:
            raise ImageError(f"{source.name}: this model does not see pictures in crops, pan and scan is not possible")
        boxes += geometry.pan_and_scan_crops(
            height, width, min_crop=crops.min_crop, max_crops=crops.max_crops, min_ratio=crops.min_ratio
        )
    layout = POLICIES[facts.policy].layout
    try:
        views = [View(box, layout(box[2] - box[0], box[3] - box[1], facts, budget)) for box in boxes]
    except ImageError as error:
        raise ImageError(f"{source.name}: {error}") from None
    return PreparedPicture(source, tuple(views) * source.frames, resample=facts.resample)


def assign_spans(prompt: Prompt, media: Sequence[PreparedPicture | PreparedSound]) -> Prompt:
    """A prompt given as ids, with its runs of soft tokens dealt out to the views of the media in order.

    Media of one kind without a token between them are one run. Raises PromptError if the runs do not fit the media.
    """
    wanted = [
        (index, view, length, prepared.medium.kind)
        for index, prepared in enumerate(media)
        for view, length in enumerate(prepared.soft_tokens)
    ]
    spans: list[Span] = []
    fits = True
    for run in prompt.spans:
        start, end = run.start, run.start + run.length
        while start < end and len(spans) < len(wanted):
            index, view, length, kind = wanted[len(spans)]
            spans.append(Span(start, length, index, view, kind))
            start += length
            fits = fits and kind == run.kind
        fits = fits and start == end
    if not fits or len(spans) != len(wanted):
        found, expected = [run.length for run in prompt.spans], [length for _, _, length, _ in wanted]
        what = "pictures"
        if any(kind != "image" for kind in (*(run.kind for run in prompt.spans), *(kind for *_, kind in wanted))):
            found, expected = [f"{run.length} {run.kind}" for run in prompt.spans], [f"{n} {k}" for *_, n, k in wanted]
            what = "media"
        raise PromptError(f"the prompt ids have runs of {found} soft tokens, the {what} give {expected}")
    return Prompt(prompt.ids, tuple(spans), prompt.text)
