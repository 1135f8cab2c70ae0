"""The protocol of NVIDIA's NIM endpoint for PaliGemma.

    routes.py      paths and what answers them
    asked.py       what a request says and wants
    replies.py     replies, pieces of replies and errors as NVIDIA writes them
    document.py    the paths in OpenAPI

Readers and writers know nothing of HTTP. Newer NIM containers speak OpenAI's protocol, which is beside this one.
"""

from .routes import protocol

__all__ = ["protocol"]
