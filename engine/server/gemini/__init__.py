"""The protocol of Google's Gemini API, and the same under the paths of Vertex AI.

    routes.py      paths and what answers them
    contents.py    what a request says: turns and parts
    media.py       media in parts
    config.py      what it wants: generation, tools, safety
    schemas.py     Google's form of schemas as JSON schemas
    replies.py     replies, pieces of replies, models and errors as Google writes them
    document.py    the paths in OpenAPI

Readers and writers know nothing of HTTP. Fields are written in camelCase and read in either spelling.
"""

from .routes import protocol

__all__ = ["protocol"]
