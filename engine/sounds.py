"""Sounds before the audio graph: how many soft tokens a clip has, and long sounds cut into clips."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.audio import FRAME_COUNTS, soft_token_count
from .audio import Sound
from .errors import AudioError
from .manifest import AudioFacts
from .messages import Media
from .reply import EncodedSound

__all__ = ["PreparedSound", "count_soft_tokens", "longest_clip", "prepare"]


def count_soft_tokens(samples: int, facts: AudioFacts) -> int:
    """Number of soft tokens that the audio graph gives for a clip."""
    return soft_token_count(FRAME_COUNTS[facts.policy](samples, facts.frame_step), facts.frames_per_token)


def longest_clip(facts: AudioFacts) -> int:
    """Samples of the longest clip that the model was made for."""
    return facts.max_tokens * facts.frames_per_token * facts.frame_step


@dataclass(frozen=True, slots=True, eq=False)
class PreparedSound:
    """A clip that the model can hear at once, samples `start` to `end` of a sound; or one that is encoded already.

    `modality` is what its soft tokens count as.
    """

    source: Sound | None = None
    start: int = 0
    end: int = 0
    count: int = 0
    encoded: EncodedSound | None = None

    modality = "audio"

    @property
    def soft_tokens(self) -> tuple[int, ...]:
        """Number of soft tokens; a clip has one view."""
        return (self.count if self.encoded is None else len(self.encoded),)

    @property
    def seconds(self) -> float:
        if self.encoded is not None:
            return self.encoded.seconds
        assert self.source is not None
        return (self.end - self.start) / self.source.rate

    def waveform(self) -> npt.NDArray[np.float32]:
        """The samples of the clip, decoded now if they are not yet."""
        assert self.source is not None
        return self.source.waveform()[self.start : self.end]

    @property
    def medium(self) -> Media:
        """What a prompt needs to know."""
        return Media(kind="audio", soft_tokens=self.soft_tokens[0])


def prepare(source: Sound, facts: AudioFacts) -> Sequence[PreparedSound]:
    """The clips of a sound: one, or if it is too long for that as many as it takes, all of about the same length.

    Raises AudioError for a sound that is too short for a soft token.
    """
    if not count_soft_tokens(source.samples, facts):
        raise AudioError(
            f"{source.name}: {source.samples} samples ({source.seconds:.3g} s) are too short for the model to hear"
        )
    clips = -(-source.samples // longest_clip(facts))
    edges = [source.samples * index // clips for index in range(clips + 1)]
    return [
        PreparedSound(source, start, end, count_soft_tokens(end - start, facts))
        for start, end in itertools.pairwise(edges)
    ]
