"""Run siglance bundles: `Engine.open("demo").generate(["street.jpg", "detect red circle"])`.

A map for those who read the code, in the order in which a request passes through it. `Engine.stream` is that path.

Surface: `engine` (Engine), `chat` (Chat), `parts` (what a prompt is made of), `reply` (what comes back), `errors` (all
    of them), `limits` (bounds of what comes from outside).
Bundle: `bundle` (folder, hashes), `manifest` (facts), read by `strict_json`, `external_data` and `protobuf` (weights
    that a graph file names), `self_test`, `inspect`.
Media to pixels and samples: `sources` (path, bytes, file, data URI), `media` (which kind it is), `known_files` (files
    seen before); `image`, `image_files`, `image_modes`; `pdf`, `video`, `video_frames` and `audio`, which ask the
    processes of `worker`: `pdf_worker`, `video_worker`, `audio_worker`, bounded by `worker_limits`.
Prompt: `preprocessing` (conversation -> media and prompt); `image_policy`, `pictures`, `sounds` (views and clips, and
    how many soft tokens each has); `messages` (turns), `template` (the sandboxed chat template),
    `template_capabilities` (whether it knows tools and thinking), `prompt` (token ids, and the spans of soft tokens).
Prefill: `encoder_inputs` (patches and samples), `encoding` and `feature_cache` (soft tokens), `prefill_plan`,
    `prefix_cache` and `reuse` (states of earlier requests), `runtime` (a session: embed, splice, decode).
Graphs: `graph` (the one module that imports onnxruntime, prepared by `ort_environment`), `wiring` (whether the graphs
    fit), `state` (key/value buffers), `device_memory` and `device_step` (on a GPU), `cuda`, `heap`, `processes`.
Reply: `decoding` (the loop over tokens); `sampling`, `penalties`, `logprobs`; `grammar`, `guide`, `calls`,
    `call_grammar`, `call_schemas`, `schema_checks` (which tokens may come next); `text` (ids -> text, stop strings),
    `thinking`, `tools`, `tool_format` (thoughts and calls), `boxes`.
Program: `cli`, `options`, `option_files`, `attachments`, `program`, `interruption`, `output`, `reply_writer`,
    `chat_command`, `draw`, `perplexity`; the folders `server`, `bench` and `assets` (the embedded demo).
"""

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
