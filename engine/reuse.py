"""What an engine keeps of its requests, so that later ones have less to do."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from .errors import InputError
from .feature_cache import FeatureCache, FeatureFolder
from .manifest import Manifest
from .prefix_cache import Pin, PrefixCache
from .reading import tower_identity
from .runtime import Session

__all__ = ["CACHE_BYTES", "FEATURE_CACHE_BYTES", "FEATURE_FOLDER_BYTES", "NO_REUSE", "Reuse"]

CACHE_BYTES = 512 * 2**20  # of decoder states
FEATURE_CACHE_BYTES = 128 * 2**20  # of soft tokens in memory
FEATURE_FOLDER_BYTES = 2**30  # of soft tokens on disk


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where a request looks for what earlier ones left, and leaves something for later ones.

    `pin` holds the states that are left.
    """

    prefixes: PrefixCache
    features: FeatureCache
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
            folder = FeatureFolder(feature_cache_dir, tower_identity(manifest), feature_cache_dir_bytes)
        return cls(PrefixCache(cache_bytes if reusable else 0), FeatureCache(feature_cache_bytes, folder))

    @property
    def keeps_states(self) -> bool:
        return self.prefixes.max_bytes > 0

    def restore(self, session: Session, keys: np.ndarray) -> int:
        """Bring an empty session as far into a prompt with these row keys as possible; returns how far."""
        match = self.prefixes.find(keys)
        if match is None:
            return 0
        session.restore(match.snapshot, match.length)
        return match.length

    def keep(self, session: Session, keys: np.ndarray) -> None:
        """Keep the state of a session whose rows have these keys; keys of what has not run may follow."""
        if self.keeps_states:
            self.prefixes.add(keys, session.snapshot(), self.pin)

    def clear(self) -> None:
        """Forget everything; files stay."""
        self.prefixes.clear()
        self.features.clear()


NO_REUSE = Reuse(PrefixCache(0), FeatureCache(0))
"""For requests that neither take nor leave anything."""
