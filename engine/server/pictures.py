"""Pictures in places where a protocol has nothing but pictures."""

from __future__ import annotations

from ..audio import is_sound
from ..media import is_moving
from ..parts import Image
from ..pdf import is_pdf
from .failures import Failure

__all__ = ["picture"]


def picture(data: bytes, place: str, tokens: int | None = None) -> Image:
    """A picture with a budget of soft tokens. Raises Failure for other media, which the engine would take as such."""
    kinds = {"a PDF": is_pdf, "a sound": is_sound, "a video": is_moving}
    kind = next((kind for kind, is_one in kinds.items() if is_one(data)), None)
    if kind is not None:
        raise Failure(400, f"{place} is {kind}, expected a picture", field=place)
    return Image(data, tokens=tokens)
