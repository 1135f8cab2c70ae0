"""Which frames of a video are taken, from when each is shown."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import InputError

__all__ = ["Index", "choose"]


@dataclass(frozen=True, slots=True)
class Index:
    """The frames of a video in the order in which they are shown.

    Attributes:
        ticks: when each is shown, in units of `tick`, ascending.
        last: how many ticks the last frame is shown.
        tick: seconds.
        starts: (number, when it is shown) of the packets with which decoding can begin, in the order of the file.
    """

    ticks: Sequence[int]
    last: int
    tick: Fraction
    starts: Sequence[tuple[int, int]]

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        return float((self.ticks[-1] - self.ticks[0] + self.last) * self.tick)

    def first_packet(self, number: int) -> int:
        """The packet from which on a decoder must be fed to get a frame: the last start that is shown no later.

        Frames that are shown before a start but stand behind it in the file may need what is before it.
        """
        return max((packet for packet, at in self.starts if at <= self.ticks[number]), default=0)


def choose(index: Index, fps: float, start: float, end: float | None, most: int) -> list[tuple[float, int]]:
    """(seconds, number of the frame) of the frames to take.

    The frame that is shown at `start`, then for each multiple of 1 / fps behind it the first frame from there on, each
    frame once; `end` itself is not part of it. More than `most` are thinned evenly: of n the frames floor(i n / most).
    Seconds count from the first frame of the file. Half a tick is forgiven: containers round times to their ticks.

    Raises InputError for a start behind the end of the video.
    """
    if start and start >= index.seconds:
        raise InputError(f"the start at {start:g} s is behind its end, it is {index.seconds:g} s long")
    zero, slack, step = index.ticks[0], Fraction(1, 2), 1 / (Fraction(fps) * index.tick)
    begin = zero + Fraction(start) / index.tick
    stop = math.inf if end is None else zero + Fraction(end) / index.tick
    shown = max(0, bisect.bisect_right(index.ticks, begin + slack) - 1)
    chosen, wanted = [shown], begin + step
    for number in range(shown + 1, len(index.ticks)):
        at = index.ticks[number] + slack
        if at - slack >= stop:
            break
        if at >= wanted:
            chosen.append(number)
            wanted = begin + step * ((at - begin) // step + 1)
    if len(chosen) > most:
        chosen = [chosen[i * len(chosen) // most] for i in range(most)]
    return [(max(start, float((index.ticks[number] - zero) * index.tick)), number) for number in chosen]
