"""The protocol of OpenAI's chat completions.

    routes.py      paths and what answers them
    messages.py    what a request says: messages, parts, media
    config.py      what it wants: sampling, format, tools
    replies.py     replies, pieces of replies and errors as OpenAI writes them
    document.py    the paths in OpenAPI

Readers and writers know nothing of HTTP.
"""

from .routes import protocol

__all__ = ["protocol"]
