"""What a request to NVIDIA's endpoint says and wants: one message of a user, with pictures in it, and three numbers.

A picture is a part of its own, or it is written into the text, as the first clients did:
`What is this? <img src="data:image/png;base64,..." />`.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from ...prompt import Text
from ...sampling import Sampling
from ..access import Access
from ..bodies import Fields
from ..failures import Failure
from ..pictures import picture
from ..request import Request
from ..said import File, Said, SaidPart, fetched

__all__ = ["MAX_BASE64", "MAX_TEXT", "MAX_TOKENS", "TEMPERATURE", "TOP_P", "Asked", "read_chat"]

MAX_TOKENS = 1024
"""Of a reply, which is the default too."""

MAX_TEXT = 204_800
"""Characters of the text of a part, and of the URL of a picture."""

MAX_BASE64 = 180_000
"""Characters of base64 of a picture."""

TEMPERATURE, TOP_P = 0.2, 0.7
"""Of a request that does not say."""

# Another `src` is no picture: texts about HTML have those.
_IMAGE = re.compile(r"""<img\s+src\s*=\s*(["'])((?:data|https?|file):[^"'<>]*)\1\s*/?>""", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A request as it was made."""

    request: Request
    stream: bool


async def read_chat(data: dict[str, Any], access: Access) -> Asked:
    """The body of a request. Raises Failure; fields that are not known are refused by name."""
    turn, options, stream = await asyncio.to_thread(_read, data)  # a body may be long
    return Asked(request=Request(conversation=await fetched([turn], access), **options), stream=stream)


def _read(data: dict[str, Any]) -> tuple[Said, dict[str, Any], bool]:
    """The turn, with pictures that are not there yet, further fields of `Request`, and whether a stream is wanted."""
    body = Fields(data)
    turn = _turn(body)
    temperature, top_p = _share(body, "temperature"), _share(body, "top_p")
    options = {
        "max_tokens": body.integer("max_tokens", 1, MAX_TOKENS) or MAX_TOKENS,
        "sampling": Sampling(
            temperature=TEMPERATURE if temperature is None else temperature, top_p=TOP_P if top_p is None else top_p
        ),
    }
    stream = bool(body.flag("stream"))
    body.finish()
    return turn, options, stream


def _share(body: Fields, name: str) -> float | None:
    """A number above 0, at most 1."""
    value = body.number(name, 0, 1)
    if value == 0:
        raise body.failure(name, "is 0, it must be above 0")
    return value


def _turn(body: Fields) -> Said:
    messages = body.objects("messages")
    if messages is None:
        raise body.missing("messages")
    if len(messages) != 1:
        raise body.failure("messages", f"has {len(messages)} messages, it must have exactly 1")
    [message] = messages
    if message.choice("role", ("user",)) is None:
        raise message.missing("role")
    content = message.value("content")
    if content is None:
        raise message.missing("content")
    if isinstance(content, str):
        parts = _with_pictures(content, message.path("content"))
    elif isinstance(content, list):
        parts = [part for item in message.objects("content") or () for part in _part(item)]
    else:
        raise message.failure("content", "must be a text or a list of parts")
    message.finish()
    return "user", parts


def _part(item: Fields) -> list[SaidPart]:
    kind = item.choice("type", ("text", "image_url"))
    if kind is None:
        raise item.missing("type")
    parts: list[SaidPart] = []
    if kind == "text":
        text = item.text("text", MAX_TEXT)
        if text is None:
            raise item.missing("text")
        parts = _with_pictures(text, item.path("text"))
    else:
        image = item.object("image_url")
        if image is None:
            raise item.missing("image_url")
        url = image.text("url", MAX_TEXT)
        if url is None:
            raise image.missing("url")
        image.finish()
        parts = [_picture(url, image.path("url"))]
    item.finish()
    return parts


def _with_pictures(text: str, place: str) -> list[SaidPart]:
    """A text and the pictures that are written into it, in their order. White space around a picture is markup."""
    pieces = _IMAGE.split(text)  # text, then quote, URL and text for each picture
    texts, urls = pieces[::3], pieces[2::3]
    parts: list[SaidPart] = []
    for index, piece in enumerate(texts):
        said = piece if index == 0 else piece.lstrip()
        said = said if index == len(urls) else said.rstrip()
        if said or not urls:
            parts.append(Text(said))
        if index < len(urls):
            parts.append(_picture(urls[index], f"{place}: picture {index + 1}"))
    return parts


def _picture(url: str, place: str) -> File:
    header, comma, payload = url.partition(",")
    if comma and header[:5].lower() == "data:" and len(payload) > MAX_BASE64:
        raise Failure(
            400, f"{place} has {len(payload)} characters of base64, over the limit of {MAX_BASE64}", field=place
        )
    return File(place=place, uri=url, part=lambda data: picture(data, place))
