"""Limits on the files that requests bring along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .errors import InputError

__all__ = ["DEFAULT_LIMITS", "Limits", "read_limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on pictures, documents, videos and sounds.

    They are checked before anything is decoded, and errors name value and limit.

    Raises InputError for a limit that is not a positive number.
    """

    max_bytes: int = 64 * 2**20  # of one encoded file
    max_pixels: int = 50_000_000  # width * height of one picture: 150 MB of RGB, which phones of today reach
    max_pages: int = 100  # of one document in one request
    max_page_seconds: float = 10.0  # wall time for opening a document, and for drawing each of its pages
    max_page_memory: int = 512 * 2**20  # bytes of address space of the process that does it, beside the file itself
    # Of one encoded video: phones write 100 to 400 MB a minute. Files are not held in memory.
    max_video_bytes: int = 2**30
    # Of one video: what the models were made for is a minute at one frame a second. Longer clips are thinned evenly.
    max_frames: int = 60
    max_video_seconds: float = 60.0  # wall time for a look through a video, and for decoding up to 64 MB of its frames
    max_video_memory: int = 2**30  # bytes of address space of the process that does it, beside a video given as bytes
    max_audio_length: int = 1800  # seconds of one sound that is split into several clips
    max_audio_seconds: float = 60.0  # wall time for decoding a sound
    max_audio_memory: int = 512 * 2**20  # bytes of address space of the process that does it, beside the file itself

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            whole = not field.name.endswith("_seconds")
            numbers = (int,) if whole else (int, float)
            # The comparison is this way round so that NaN fails it.
            if isinstance(value, bool) or not isinstance(value, numbers) or not value > 0:
                raise InputError(
                    f"{field.name} is {value!r}, it must be {'an integer' if whole else 'a number'} above 0"
                )


DEFAULT_LIMITS = Limits()


def read_limits(assignments: Iterable[str]) -> Limits:
    """Limits from texts such as "pixels=100000000"; the names are those of the fields without "max_".

    Raises InputError for an unknown name or a value that is not a positive number.
    """
    kinds = {field.name.removeprefix("max_"): field for field in fields(Limits)}
    values: dict[str, float] = {}
    for assignment in assignments:
        name, _, value = (part.strip() for part in assignment.partition("="))
        if name not in kinds:
            raise InputError(f"there is no limit {name!r}; the limits are {', '.join(kinds)}")
        field = kinds[name]
        try:
            values[field.name] = float(value) if field.name.endswith("_seconds") else int(value)
        except ValueError:
            raise InputError(f"the limit {name} is {value!r}, it must be a number above 0") from None
    return Limits(**values)  # pyright: ignore[reportArgumentType] - each field has the type of its own
