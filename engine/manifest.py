"""The manifest of a bundle: what `siglance.json` may say, and a reader that accepts nothing else.

A manifest states facts; it holds no shapes, dtypes or layer counts (the graphs are the truth about those), no
expressions and no code. An unknown key is an error: a typing mistake must not become a silently ignored option.
`family` and `name` are for people. The engine never reads them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from dataclasses import dataclass

from .errors import BundleError, UnsupportedBundle
from .strict_json import build, unique_keys

__all__ = [
    "FILES",
    "FORMAT",
    "GRAPHS",
    "MANIFEST_NAME",
    "MECHANISMS",
    "AudioFacts",
    "FileFact",
    "FramesFacts",
    "ImageFacts",
    "Manifest",
    "PanAndScanFacts",
    "PlaceholderFacts",
    "PromptFacts",
    "ReplyFacts",
    "SamplingFacts",
    "StatePair",
    "VideoFacts",
    "read_manifest",
    "write_manifest",
]

FORMAT = 1
MANIFEST_NAME = "siglance.json"
_MOST_PIXELS = 2**26  # that a picture is resized to, 200 MB of RGB: 25 times what the models of today see
_MOST_CROPS = 64

# Graphs ("vision" only with images, "audio" only with sound), then the rest; without a "chat_template" it is a base
# model, always raw.
GRAPHS = ("vision", "audio", "embed", "decoder")
FILES = (*GRAPHS, "weights", "tokenizer", "chat_template", "self_test", "export")

# What this engine can do. A bundle lists what it needs in `requires`; anything else is refused by name.
MECHANISMS: frozenset[str] = frozenset(
    {
        "attention:image_blocks",  # each run of soft tokens of pictures sees all of itself: see `block_ends`
        "attention:prefix",  # the whole prompt sees all of itself: the engine makes `block_ends`
        "audio:frames",  # a soft token is a fixed number of samples, the last one filled up with silence
        "audio:log_mel",  # frames of two hops, those that end before the last sample; several frames a soft token
        "image:aspect_patches",  # resize to fill a token budget, whole multiples of patch*pool on both sides
        "image:squash",  # resize to one square size, whatever the aspect ratio
        "prompt:media_first",  # all media, the beginning-of-sequence token, the text, then `prompt.end`
        "video:clock_frames",  # frames as pictures, each with MM:SS in front of it
        "state:global",  # one growing key/value buffer per layer
        "state:window",  # a buffer of fixed capacity; the operator evicts, see GroupQueryAttention sliding_window_cache
        "logit_rows:any",  # any prompt rows may ask for logits
        "logit_rows:last",  # only the last row of a chunk is exact (layers that share keys and values see one row)
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """One file of the bundle: its path inside the folder, its size in bytes and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PanAndScanFacts:
    """When and how a picture is also shown in crops, if a request asks for it; see `geometry.pan_and_scan_crops`.

    In the prompt the placeholder of the picture becomes before_full + full + before_crops + crops, where `full` and
    each crop are expanded as a picture of their own is and between two crops stands `between_crops`.
    """

    min_crop: int  # pixels; crops with a shorter side are not made
    max_crops: int
    min_ratio: float  # long side over short side from which a picture is cut
    before_full: str
    before_crops: str
    between_crops: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """How pixels become patches. Normalisation is not here: it is folded into the vision graph.

    A "squash" bundle has one budget, the square of the number of soft tokens on a side. `pan_and_scan` is null for
    models that were not trained with crops.
    """

    policy: str  # "aspect_patches" | "squash"
    patch_size: int  # side of a patch in pixels
    pool_size: int  # patches per side of one soft token
    budgets: tuple[int, ...]  # allowed numbers of soft tokens, ascending
    default_budget: int
    resample: str  # "bicubic" | "bilinear", Pillow's antialiased filters on uint8
    pan_and_scan: PanAndScanFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """How a video becomes frames. Each of them becomes patches as an image does, with a budget of its own."""

    budgets: tuple[int, ...]  # allowed numbers of soft tokens of a frame, ascending
    default_budget: int
    fps: float  # frames a second unless a request says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFacts:
    """How many soft tokens a clip has; see `kernels.audio.FRAME_COUNTS` for the policies.

    The front end is not here: the audio graph takes samples in [-1, 1] of one channel.
    """

    policy: str  # "log_mel" | "frames"
    sample_rate: int  # samples a second
    frame_step: int  # samples from one frame to the next
    frames_per_token: int
    max_tokens: int  # soft tokens of the longest clip that the model was made for


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceholderFacts:
    """How one medium appears in the prompt: the template writes `item`; it becomes before + soft * n + after."""

    item: str
    before: str
    soft: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesFacts(PlaceholderFacts):
    """How a video appears in the prompt: the template writes `item`; it becomes the frames with `between` between them.

    Each frame is its time (MM:SS) + before + soft * n + after.
    """

    between: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """Prompt facts. `begin` is the beginning-of-sequence token; `image`, `video` and `audio` are null for one without.

    `layout` is "inline" (begin, then text and media in their order, by the chat template) or "media_first" (all media,
    begin, text, `end`; no template). `end` is text behind the question, "" for "inline".
    """

    begin: str
    layout: str = "inline"
    end: str = ""
    image: PlaceholderFacts | None
    video: FramesFacts | None = None
    audio: PlaceholderFacts | None = None

    @property
    def placeholders(self) -> dict[str, PlaceholderFacts]:
        """By the kind of medium, those that this bundle takes."""
        listed = {"image": self.image, "video": self.video, "audio": self.audio}
        return {kind: facts for kind, facts in listed.items() if facts is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFacts:
    """How replies are read. `boxes` is "box_2d", "loc" or "none"; markers are the special tokens around thoughts."""

    boxes: str
    thought: tuple[str, str] | None
    tool_call: tuple[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePair:
    """One tensor of decoder state: the graph reads `input` and writes `output`; `kind` is "global" or "window"."""

    input: str
    output: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFacts:
    """The checkpoint's sampling defaults; null means that the filter is off. temperature 0 is greedy."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All facts of a bundle. Field names are the keys of `siglance.json`, in this order.

    `source` and `revision` say what was exported: the id on the hub or the name of a folder or file, and the commit of
    the hub repository, null where there is none. They are for people, like `family` and `name`.
    """

    format: int
    family: str
    name: str
    source: str
    revision: str | None
    target: str  # "cpu" | "cuda"
    precision: str  # as in `siglance export --precision`; of it the engine reads only whether it is "fp32", see `Reuse`
    requires: tuple[str, ...]
    modalities: tuple[str, ...]  # "text", "image", "video", "audio"
    context: int  # tokens, prompt and reply together
    stop_ids: tuple[int, ...]
    files: dict[str, FileFact]  # keys are among FILES
    image: ImageFacts | None
    video: VideoFacts | None = None
    audio: AudioFacts | None = None
    prompt: PromptFacts
    reply: ReplyFacts
    state: tuple[StatePair, ...]
    sampling: SamplingFacts


def read_manifest(text: str) -> Manifest:
    """Parse the text of a `siglance.json`.

    Raises BundleError naming the key for anything missing, unknown or of the wrong type, and UnsupportedBundle
    for a format or a mechanism this engine does not know.
    """
    try:
        raw = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise BundleError(f"{MANIFEST_NAME} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BundleError(f"{MANIFEST_NAME} must be a JSON object, not {type(raw).__name__}")
    if raw.get("format") != FORMAT:
        raise UnsupportedBundle(
            f"{MANIFEST_NAME}: format {raw.get('format')!r} is not supported, this engine reads format {FORMAT}"
        )
    manifest = typing.cast(Manifest, build(Manifest, raw, MANIFEST_NAME))
    unknown = [name for name in manifest.requires if name not in MECHANISMS]
    if unknown:
        raise UnsupportedBundle(
            f"this bundle requires {', '.join(map(repr, unknown))}, which this engine does not have "
            f"(it has: {', '.join(sorted(MECHANISMS))})"
        )
    _check(manifest)
    return manifest


def write_manifest(manifest: Manifest) -> str:
    """The text of `siglance.json` for `manifest`; `read_manifest` gives the same value back."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"


def _check(manifest: Manifest) -> None:
    """Values that types cannot express."""
    _require(manifest.target in ("cpu", "cuda"), "target", manifest.target, "'cpu' or 'cuda'")
    _require(manifest.context > 0, "context", manifest.context, "a positive number of tokens")
    _require(all(id >= 0 for id in manifest.stop_ids), "stop_ids", manifest.stop_ids, "token ids, 0 or more")
    for name in manifest.files:
        _require(name in FILES, "files", name, f"one of {', '.join(FILES)}")
    for name in ("embed", "decoder", "tokenizer"):
        _require(name in manifest.files, "files", sorted(manifest.files), f"an entry '{name}'")
    boxes = manifest.reply.boxes
    _require(boxes in ("box_2d", "loc", "none"), "reply.boxes", boxes, "'box_2d', 'loc' or 'none'")
    for index, pair in enumerate(manifest.state):
        _require(pair.kind in ("global", "window"), f"state[{index}].kind", pair.kind, "'global' or 'window'")
    known = "text" in manifest.modalities and set(manifest.modalities) <= {"text", "image", "video", "audio"}
    known = known and ("image" in manifest.modalities or "video" not in manifest.modalities)
    _require(known, "modalities", manifest.modalities, "'text', perhaps 'image' and 'audio', and 'video' with 'image'")
    _check_requires(manifest)
    sampling = manifest.sampling
    for key, value, highest in (
        ("temperature", sampling.temperature, sys.float_info.max),
        ("top_k", sampling.top_k, 2**31),
        ("top_p", sampling.top_p, 1),
        ("min_p", sampling.min_p, 1),
    ):
        _require(value is None or 0 <= value <= highest, f"sampling.{key}", value, f"a number from 0 to {highest:g}")
    for medium, graph, facts in (("image", "vision", manifest.image), ("audio", "audio", manifest.audio)):
        wanted = medium in manifest.modalities
        for key, present in (
            (medium, facts is not None),
            (f"prompt.{medium}", medium in manifest.prompt.placeholders),
            (f"files.{graph}", graph in manifest.files),
        ):
            _require(present == wanted, key, present, f"presence to follow {medium!r} in modalities ({wanted})")
    has_video = "video" in manifest.modalities
    for key, present in (
        ("video", manifest.video is not None),
        ("prompt.video", manifest.prompt.video is not None),
        ("requires", "video:clock_frames" in manifest.requires),
    ):
        _require(present == has_video, key, present, f"presence to follow 'video' in modalities ({has_video})")
    _check_prompt(manifest)
    if manifest.video is not None:
        _check_video(manifest.video)
    if manifest.audio is not None:
        _check_audio(manifest.audio, manifest.requires)
    if manifest.image is not None:
        _check_image(manifest.image, manifest.requires)
        budgets = manifest.image.budgets + (() if manifest.video is None else manifest.video.budgets)
        pixels = max(budgets) * (manifest.image.patch_size * manifest.image.pool_size) ** 2
        _require(pixels <= _MOST_PIXELS, "image", manifest.image, f"at most {_MOST_PIXELS} pixels of a picture")


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise BundleError(f"{MANIFEST_NAME}: '{key}' is {value!r}, expected {wanted}")


def _check_requires(manifest: Manifest) -> None:
    """Mechanisms that exclude each other."""
    attention = [name for name in manifest.requires if name.startswith("attention:")]
    _require(len(attention) <= 1, "requires", manifest.requires, "one kind of attention")
    # Where later layers see one row of a chunk, no row of a block could be asked for logits except the last.
    last_row = "logit_rows:last" in manifest.requires
    _require(not (attention and last_row), "requires", manifest.requires, "'logit_rows:any' beside blocks of attention")


def _check_prompt(manifest: Manifest) -> None:
    facts = manifest.prompt
    _require(facts.layout in ("inline", "media_first"), "prompt.layout", facts.layout, "'inline' or 'media_first'")
    first = facts.layout == "media_first"
    needs = "prompt:media_first" in manifest.requires
    _require(
        needs == first, "requires", manifest.requires, f"'prompt:media_first' to follow the layout {facts.layout!r}"
    )
    _require(first or not facts.end, "prompt.end", facts.end, "\"\" for the layout 'inline'")
    for kind, place in facts.placeholders.items():
        _require(bool(place.item), f"prompt.{kind}.item", place.item, "what a chat template writes for it")
    template = "chat_template" in manifest.files
    _require(
        not (first and template), "files", sorted(manifest.files), "no chat template with the layout 'media_first'"
    )


def _check_video(facts: VideoFacts) -> None:
    _require(bool(facts.budgets) and min(facts.budgets) > 0, "video.budgets", facts.budgets, "positive budgets")
    one_of = f"one of {facts.budgets}"
    _require(facts.default_budget in facts.budgets, "video.default_budget", facts.default_budget, one_of)
    _require(0 < facts.fps < math.inf, "video.fps", facts.fps, "a positive number")


def _check_audio(facts: AudioFacts, requires: tuple[str, ...]) -> None:
    mechanism = f"audio:{facts.policy}"
    _require(mechanism in requires, "requires", requires, f"{mechanism!r} among them")
    for key in ("sample_rate", "frame_step", "frames_per_token", "max_tokens"):
        _require(getattr(facts, key) > 0, f"audio.{key}", getattr(facts, key), "a positive number")


def _check_image(facts: ImageFacts, requires: tuple[str, ...]) -> None:
    mechanism = f"image:{facts.policy}"
    _require(mechanism in requires, "requires", requires, f"{mechanism!r} among them")
    _require(facts.patch_size > 0 and facts.pool_size > 0, "image", facts, "positive patch and pool sizes")
    _require(bool(facts.budgets) and min(facts.budgets) > 0, "image.budgets", facts.budgets, "positive budgets")
    one_of = f"one of {facts.budgets}"
    _require(facts.default_budget in facts.budgets, "image.default_budget", facts.default_budget, one_of)
    _require(facts.resample in ("bicubic", "bilinear"), "image.resample", facts.resample, "'bicubic' or 'bilinear'")
    if facts.policy == "squash":
        square = math.isqrt(facts.default_budget) ** 2
        _require(facts.budgets == (square,), "image.budgets", facts.budgets, "one square number of soft tokens")
    crops = facts.pan_and_scan
    if crops is not None:
        possible = crops.min_crop > 0 and 1 < crops.max_crops <= _MOST_CROPS
        _require(possible, "image.pan_and_scan", crops, f"positive sizes and crops, at most {_MOST_CROPS}")
        _require(crops.min_ratio >= 1, "image.pan_and_scan.min_ratio", crops.min_ratio, "a number from 1 up")
