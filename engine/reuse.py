"""What an engine keeps of its requests, so that later ones have less to do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .encoder_inputs import PreparedPrompt
from .errors import InputError
from .feature_cache import FeatureCache, FeatureFolder
from .known_files import NOTHING_KNOWN, KnownFiles
from .manifest import Manifest
from .prefill_plan import Boundaries, PrefillPlan
from .prefix_cache import Pin, PrefixCache
from .preprocessing import tower_identity
from .runtime import Session

__all__ = ["CACHE_BYTES", "FEATURE_CACHE_BYTES", "FEATURE_FOLDER_BYTES", "Reuse"]

CACHE_BYTES = 512 * 2**20  # of decoder states
FEATURE_CACHE_BYTES = 128 * 2**20  # of soft tokens in memory
FEATURE_FOLDER_BYTES = 2**30  # of soft tokens on disk


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where a request looks for what earlier ones left, and leaves something for later ones.

    `pin` holds the states that are left. In `exact` reuse states serve only where they are bit for bit what running the
    rows again would give. With quantised or half-precision matrices rounding grows into other words, so that a reply
    would depend on what ran before; in float32 it stays rounding, and any beginning of a prompt serves.
    """

    prefixes: PrefixCache
    features: FeatureCache
    files: KnownFiles
    exact: bool = True
    pin: Pin | None = None

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        *,
        cache_bytes: int,
        feature_cache_bytes: int,
        feature_cache_dir: str | os.PathLike[str] | None,
        feature_cache_dir_bytes: int,
    ) -> Reuse:
        """The caches of an engine, see there. Raises InputError."""
        for name, value in (
            ("cache_bytes", cache_bytes),
            ("feature_cache_bytes", feature_cache_bytes),
            ("feature_cache_dir_bytes", feature_cache_dir_bytes),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{name} is {value!r}, it must be an integer of at least 0")
        # Where the rows of a prompt see all later ones, no beginning of it stands for itself.
        reusable = "attention:prefix" not in manifest.requires
        folder = None
        if feature_cache_dir is not None:
            if not os.fspath(feature_cache_dir):
                raise InputError("feature_cache_dir is empty; give a folder, or None to keep nothing on disk")
            folder = FeatureFolder(feature_cache_dir, tower_identity(manifest), feature_cache_dir_bytes)
        return cls(
            PrefixCache(cache_bytes if reusable else 0),
            FeatureCache(feature_cache_bytes, folder),
            KnownFiles(),
            exact=manifest.precision != "fp32",
        )

    def off(self) -> Reuse:
        """For a request that neither takes nor leaves anything."""
        return dataclasses.replace(self, prefixes=PrefixCache(0), features=FeatureCache(0), files=NOTHING_KNOWN)

    def plan(self, session: Session, prepared: PreparedPrompt, boundaries: Boundaries, chunk: int) -> PrefillPlan:
        """How to run a prompt, at most `chunk` rows at once. With and without caches it is the same in exact reuse."""
        length = len(prepared.prompt.ids)
        evicts = session.evicts(length)
        if self.exact:
            stops = session.run_ends([*boundaries.all, length], prepared.seen_runs, chunk)
        else:
            # Without eviction any beginning can be cut out of the state at the end.
            stops = [*(boundaries.shared if evicts and self.prefixes.max_bytes else []), length]
        kept = {*(boundaries.shared if evicts else []), length}
        return PrefillPlan(prepared.row_keys(), tuple(stops), frozenset(kept))

    def restore(self, session: Session, plan: PrefillPlan) -> np.ndarray | None:
        """Bring an empty session as far into a prompt as possible; the logits behind it if that is all of it."""
        match = self.prefixes.find(plan.keys, plan.stops if self.exact else None)
        if match is None:
            return None
        session.restore(match.snapshot, match.length)
        return match.logits

    def keep(self, session: Session, plan: PrefillPlan, logits: np.ndarray) -> None:
        """Keep the state of a session that has come to a stop of its plan, if it is one to keep it at."""
        if self.prefixes.max_bytes and session.length in plan.kept:
            stops = [stop for stop in plan.stops if stop <= session.length] if self.exact else None
            snapshot = session.snapshot()
            last = logits if session.length == plan.stops[-1] else None
            self.prefixes.add(plan.keys, snapshot, self.pin, stops=stops, logits=last)

    def keep_reply(self, session: Session, plan: PrefillPlan, ids: Sequence[int]) -> None:
        """Keep the state behind a reply of these ids, of which the last may not have run."""
        # Tokens that run one by one leave another state than tokens of a prompt.
        if self.prefixes.max_bytes and not self.exact:
            self.prefixes.add(np.append(plan.keys, ids), session.snapshot(), self.pin)

    def clear(self) -> None:
        """Forget everything; files stay."""
        self.prefixes.clear()
        self.features.clear()
        self.files.clear()
