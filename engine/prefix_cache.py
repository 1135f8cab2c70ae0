"""Decoder states of earlier prompts and replies, to go on from instead of running their tokens again.

A prompt is compared row by row. The key of a text row is its token id. The key of a soft row stands for all the pixels
that the vision tower saw, so two pictures never match, and one picture matches itself whatever file it came from.

How a prompt is cut into runs changes its states by rounding. Where that matters, the stops between the runs are
compared too: a state is then used only behind a stop up to which both prompts were cut alike, and is bit for bit what
running the rows again would give.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from .state import Snapshot

__all__ = ["MOST_ENTRIES", "Match", "Pin", "PrefixCache", "SoftRows", "row_keys"]

MOST_ENTRIES = 64  # every one of them is compared with every prompt


@dataclass(frozen=True, slots=True)
class SoftRows:
    """The rows `start : start + length` of a prompt hold the soft tokens of a view with the content key `content`."""

    start: int
    length: int
    content: bytes


def row_keys(ids: np.ndarray, soft: Sequence[SoftRows]) -> np.ndarray:
    """One key for each row of a prompt: int64 [L], the id of a text row, below zero for a soft row.

    Rows of consecutive soft tokens may see each other, so each of their keys depends on all pictures of the run and on
    its place in it. Every key has 63 bits of the digest of its own, so a run of n rows is told apart by 63 n bits.
    """
    keys = ids.astype(np.int64)
    for start, run in _runs(soft):
        length = sum(rows.length for rows in run)
        digest = hashlib.shake_256()
        for rows in run:
            digest.update(len(rows.content).to_bytes(8, "little") + rows.content + rows.length.to_bytes(8, "little"))
        keys[start : start + length] = np.frombuffer(digest.digest(8 * length), np.int64) | np.iinfo(np.int64).min
    return keys


def _runs(soft: Sequence[SoftRows]) -> list[tuple[int, list[SoftRows]]]:
    """The longest runs of consecutive soft rows, with their first row."""
    runs: list[tuple[int, list[SoftRows]]] = []
    end = -1
    for rows in sorted(soft, key=lambda rows: rows.start):
        if rows.start == end:
            runs[-1][1].append(rows)
        else:
            runs.append((rows.start, [rows]))
        end = rows.start + rows.length
    return runs


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The first `length` tokens of `snapshot` are those of the prompt; `logits` if they are all of it."""

    snapshot: Snapshot
    length: int
    logits: np.ndarray | None = None


class Pin:
    """Keeps entries from being evicted in favour of others, for as long as it is referred to."""


@dataclass(slots=True, eq=False)
class _Entry:
    keys: np.ndarray
    snapshot: Snapshot
    stops: tuple[int, ...] | None
    logits: np.ndarray | None
    pins: weakref.WeakSet[Pin] = field(default_factory=weakref.WeakSet)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.snapshot.nbytes + (0 if self.logits is None else self.logits.nbytes)

    def covers(self, other: _Entry) -> bool:
        """Whether the state of `other` could be cut out of this entry."""
        length = other.snapshot.length
        if not self.snapshot.shortest <= other.snapshot.shortest or length > self.snapshot.length:
            return False
        if length == self.snapshot.length and other.logits is not None and self.logits is None:
            return False
        alike = other.stops is None or (self.stops is not None and self.stops[: len(other.stops)] == other.stops)
        return alike and np.array_equal(self.keys[:length], other.keys)

    def usable(self, keys: np.ndarray, stops: Sequence[int] | None) -> int:
        """How many rows of a prompt the entry saves."""
        if self.logits is not None and self.stops == _tuple(stops) and np.array_equal(self.keys, keys):
            return len(keys)
        compared = min(len(self.keys), len(keys) - 1)
        differ = np.flatnonzero(self.keys[:compared] != keys[:compared])
        length = int(differ[0]) if len(differ) else compared
        if stops is not None:
            length = _last_common_stop(self.stops or (), stops, length)
        elif length and keys[length - 1] < 0 and keys[length] < 0:
            text = np.flatnonzero(keys[:length] >= 0)
            length = int(text[-1]) + 1 if len(text) else 0
        return length if length >= self.snapshot.shortest else 0


class PrefixCache:
    """The states used last, in at most `max_bytes` (0 keeps none), and at most 64 of them. Thread-safe.

    When it is full the entry that was not used for longest goes, and a pinned one only if all are pinned.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._entries: list[_Entry] = []  # the one used last is the last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.nbytes for entry in self._entries)

    def find(self, keys: np.ndarray, stops: Sequence[int] | None = None) -> Match | None:
        """The longest usable beginning of a prompt with these row keys, or all of it if its logits are known.

        Otherwise at least one row is left to run, because the logits of the last one are wanted. A run of soft tokens
        is not parted. With `stops`, the rows behind which the prompt's runs end, a state is used behind a stop only.
        """
        with self._lock:
            lengths = [entry.usable(keys, stops) for entry in self._entries]
            best = max(range(len(lengths)), key=lambda index: (lengths[index], index), default=None)
            if best is None or lengths[best] == 0:
                return None
            entry = self._entries.pop(best)
            self._entries.append(entry)
            return Match(entry.snapshot, lengths[best], entry.logits if lengths[best] == len(keys) else None)

    def add(
        self,
        keys: np.ndarray,
        snapshot: Snapshot,
        pin: Pin | None = None,
        *,
        stops: Sequence[int] | None = None,
        logits: np.ndarray | None = None,
    ) -> None:
        """Keep the state after the rows with these keys, which were run in runs that end behind `stops`.

        `logits` are those behind the last row. Entries that could be cut out of another one are not kept beside it.
        """
        keys = keys[: snapshot.length].copy()
        if len(keys) != snapshot.length:
            raise ValueError(f"{len(keys)} row keys for a state of {snapshot.length} tokens")
        if logits is not None:
            logits = logits.copy()
            logits.flags.writeable = False
        new = _Entry(keys, snapshot, _tuple(stops), logits)
        if new.nbytes > self.max_bytes or not snapshot.length:
            return
        with self._lock:
            new = next((entry for entry in self._entries if entry.covers(new)), new)
            if pin is not None:
                new.pins.add(pin)
            kept = []
            for entry in self._entries:
                if entry is new:
                    continue
                if new.covers(entry):
                    new.pins |= entry.pins
                else:
                    kept.append(entry)
            self._entries = [*kept, new]
            self._evict()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def _evict(self) -> None:
        while self.nbytes > self.max_bytes or len(self._entries) > MOST_ENTRIES:
            others = range(len(self._entries) - 1)  # the last one is new
            victim = next((index for index in others if not self._entries[index].pins), 0)
            del self._entries[victim]


def _last_common_stop(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """The last stop, at most `most`, up to which both are cut alike; 0 if there is none."""
    last = 0
    for stop, other in zip(first, second, strict=False):
        if stop != other or stop > most:
            break
        last = stop
    return last


def _tuple(stops: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if stops is None else tuple(stops)
