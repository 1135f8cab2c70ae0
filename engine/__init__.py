"""Run siglance bundles: `Engine.open("demo").generate(["street.jpg", "detect red circle"])`."""

# The first import: it must come before that of onnxruntime.
from . import ort_environment as ort_environment  # isort: skip
from . import errors
from .boxes import Box
from .bundle import Bundle
from .chat import Chat
from .engine import Engine
from .errors import SiglanceError
from .grammar import Grammar
from .limits import Limits
from .logprobs import Logprob
from .parts import Audio, Image, Pdf, Turn, Video
from .prompt import Text, Thought
from .reply import Candidate, Chunk, EncodedImage, EncodedSound, EncodedVideo, Reply, Timings, Usage
from .sampling import Sampling
from .tools import MalformedCall, Tool, ToolCall, ToolResult

__all__ = [
    "Audio",
    "Box",
    "Bundle",
    "Candidate",
    "Chat",
    "Chunk",
    "EncodedImage",
    "EncodedSound",
    "EncodedVideo",
    "Engine",
    "Grammar",
    "Image",
    "Limits",
    "Logprob",
    "MalformedCall",
    "Pdf",
    "Reply",
    "Sampling",
    "SiglanceError",
    "Text",
    "Thought",
    "Timings",
    "Tool",
    "ToolCall",
    "ToolResult",
    "Turn",
    "Usage",
    "Video",
    "errors",
]
