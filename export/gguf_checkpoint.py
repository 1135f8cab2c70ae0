"""A GGUF text model as a checkpoint: metadata under the keys of config.json, tensors under the names of a folder.

Metadata and tensor names: llama.cpp, architecture "gemma3" (convert_hf_to_gguf.py writes them, its model loader has the
values that a file may leave out). Matrices are stored as they are, queries and keys are not permuted. Norm vectors
carry the 1 of "1 + w".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..engine.errors import ExportError
from ..kernels.quantize import Blocks
from .checkpoint import copy_tokenizer, write_template
from .gguf_file import GgufFile
from .gguf_tokenizer import Vocabulary

__all__ = ["GgufCheckpoint", "q4_0_blocks", "q8_0_blocks"]

ARCHITECTURES = ("gemma3",)
_BLOCK = 32  # columns that share a scale in Q4_0 and Q8_0
_PATTERN = 6  # of window layers when the file does not say: every sixth layer sees everything
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


class GgufCheckpoint:
    """The text model in the GGUF file at `path`; `tokenizer` is a tokenizer.json to use instead of its vocabulary.

    Raises ExportError for a file that is damaged, has another architecture, or holds no text model.
    """

    folder = None

    def __init__(
        self, path: Path, *, source: str | None = None, revision: str | None = None, tokenizer: Path | None = None
    ):
        self.source = source or path.name
        self.revision = revision
        self.quantised = True
        self._tokenizer = tokenizer
        self._file = GgufFile(path)
        self._facts = _Metadata(path, self._file.metadata)
        _check_kind(path, self._file.metadata)
        self._names = {_folder_name(name): name for name in self._file.tensors}
        self.config: dict[str, Any] = self._config()

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """What the file says of generation_config.json and tokenizer_config.json; it stands for no other."""
        if name == "generation_config.json":
            return self._generation()
        if name == "tokenizer_config.json":
            begin, tokens = self._facts.optional("tokenizer.ggml.bos_token_id", int), self._facts.tokens
            return {"bos_token": tokens[begin]} if begin is not None and 0 <= begin < len(tokens) else {}
        if required:
            raise ExportError(f"{self._file.path} has nothing that stands for {name}")
        return {}

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored(name)].shape

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32; of a norm, what a folder holds: without the 1 of "1 + w"."""
        values = np.concatenate(list(self._file.read_rows(self._stored(name)))).reshape(self.shape(name))
        return self._without_one(name, values) if name.endswith("norm.weight") else values

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        return self._file.read_rows(self._stored(name))

    def blocks(self, name: str) -> Blocks | None:
        """Q4_0 and Q8_0 matrices, without loss: a scale for 32 columns, the codes with their zero in the middle."""
        stored = self._stored(name)
        tensor = self._file.tensors[stored]
        repack = _BLOCKS.get(tensor.kind)
        if repack is None or len(tensor.shape) != 2:
            return None
        bits = 4 if tensor.kind == GGMLQuantizationType.Q4_0 else 8
        codes = np.empty((tensor.rows, tensor.shape[1] * bits // 8), np.uint8)
        scales = np.empty((tensor.rows, tensor.shape[1] // _BLOCK), np.float32)
        start = 0
        for raw in self._file.read_raw(stored):
            part = repack(raw)
            codes[start : start + len(raw)], scales[start : start + len(raw)] = part.codes, part.scales
            start += len(raw)
        if not np.isfinite(scales).all():
            raise ExportError(f"{self._file.path}: tensor {stored!r} has scales that are not finite")
        return Blocks(bits, _BLOCK, codes, scales)

    def widened(self) -> dict[str, int]:
        """Weights of matrices in blocks of other kinds than Q4_0 and Q8_0, by kind."""
        found: dict[str, int] = {}
        for tensor in self._file.tensors.values():
            if GGML_QUANT_SIZES[tensor.kind][0] > 1 and (tensor.kind not in _BLOCKS or len(tensor.shape) != 2):
                found[tensor.kind.name] = found.get(tensor.kind.name, 0) + prod(tensor.shape)
        return found

    def write_texts(self, folder: Path) -> dict[str, str]:
        """Write the tokenizer.json rebuilt from the vocabulary, or copy the given one, and the chat template."""
        template = write_template(self._facts.optional("tokenizer.chat_template", str), folder)
        if self._tokenizer:
            return copy_tokenizer(self._tokenizer, folder) | template
        vocabulary = Vocabulary(self._file.path, self._file.metadata)
        rows = self.config["vocab_size"]
        if len(vocabulary.tokens) > rows:
            raise ExportError(f"{self._file.path} has {len(vocabulary.tokens)} tokens and {rows} rows of embeddings")
        vocabulary.write(folder / "tokenizer.json")
        return {"tokenizer": "tokenizer.json"} | template

    def _stored(self, name: str) -> str:
        """The name in the file for `name`, that of a folder."""
        if name not in self._names:
            raise ExportError(f"the checkpoint has no tensor {name!r}")
        return self._names[name]

    def _without_one(self, name: str, values: np.ndarray) -> np.ndarray:
        """w such that 1 + w, computed in float32, is exactly what is stored.

        There is one for every sum v = 1 + w that was made in float32: v - 1 is exact from 1/2 on (up to 2 by Sterbenz's
        lemma, above because it is smaller than v and on v's grid); below, w < -1/2 was a multiple of 2^-24, so the sum
        was exact and so is the difference.
        """
        without = values - np.float32(1.0)
        if not np.array_equal(np.float32(1.0) + without, values, equal_nan=True):
            raise ExportError(f"{self._file.path}: norm {self._stored(name)!r} is not 1 + w for any float32 w")
        return without

    def _config(self) -> dict[str, Any]:
        """config.json of Gemma3ForCausalLM."""
        facts = self._facts
        hidden, layers = facts.integer("embedding_length"), facts.integer("block_count")
        heads = facts.integer("attention.head_count")
        head_size = facts.integer("attention.key_length", hidden // heads)
        [vocabulary, *_] = self._header_shape("token_embd.weight")
        if self._header_shape("blk.0.attn_q_norm.weight") != (head_size,):
            raise facts.error("attention.key_length", head_size, "the length of 'blk.0.attn_q_norm.weight'")
        for key in ("attention.value_length", "rope.dimension_count"):
            facts.expect(key, head_size)
        ropes = {
            "sliding_attention": {"rope_type": "default", "rope_theta": facts.number("rope.freq_base_swa", 10_000.0)},
            "full_attention": self._rope(),
        }
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": facts.integer("attention.head_count_kv", heads),
            "head_dim": head_size,
            "intermediate_size": facts.integer("feed_forward_length"),
            "vocab_size": vocabulary,
            "max_position_embeddings": facts.integer("context_length"),
            "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
            # As llama.cpp has it: the 27B model is told by its layers, and scales by the hidden width of a head.
            "query_pre_attn_scalar": hidden // heads if layers == 62 else head_size,
            "final_logit_softcapping": facts.number("final_logit_softcapping", None),
            "attn_logit_softcapping": facts.number("attn_logit_softcapping", None),
            "sliding_window": facts.integer("attention.sliding_window", 0, least=0),
            "layer_types": self._layer_types(layers),
            "rope_parameters": ropes,
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
        }

    def _header_shape(self, stored: str) -> tuple[int, ...]:
        if stored not in self._file.tensors:
            raise ExportError(f"{self._file.path} has no tensor {stored!r}")
        return self._file.tensors[stored].shape

    def _layer_types(self, layers: int) -> list[str]:
        """Which layers see a window; without a window all layers see everything."""
        if layers > len(self._file.tensors):
            raise self._facts.error("block_count", layers, f"at most the {len(self._file.tensors)} tensors of the file")
        pattern = self._facts.integer("attention.sliding_window_pattern", _PATTERN, least=0)
        if self._facts.integer("attention.sliding_window", 0, least=0) == 0 or pattern == 0:
            return ["full_attention"] * layers
        return ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]

    def _rope(self) -> dict[str, Any]:
        """Rotary positions of the layers that see everything; those of window layers are never scaled."""
        facts = self._facts
        rope = {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", 10_000.0)}
        factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 1.0))
        kind = facts.optional("rope.scaling.type", str) or ("none" if factor == 1.0 else "linear")
        if kind not in ("none", "linear"):
            raise facts.error("rope.scaling.type", kind, "'none' or 'linear'")
        return rope | {"rope_type": "linear", "factor": factor} if kind == "linear" else rope

    def _generation(self) -> dict[str, Any]:
        """Sampling defaults and the ids that end a reply: of the sequence, a turn or a message."""
        values: dict[str, Any] = {}
        for key, name in _SAMPLING.items():
            value = self._facts.optional(f"general.sampling.{key}", (int, float))
            if value is not None:
                values[name] = int(value) if name == "top_k" else _short(value)
        if values:
            values["do_sample"] = values.get("temperature", 1.0) != 0
        ends = (self._facts.optional(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom"))
        return values | {"eos_token_id": sorted({end for end in ends if end is not None})}


class _Metadata:
    """Typed access to metadata; keys without "general." or "tokenizer." are those of the architecture."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self._path = path
        self._values = values

    @property
    def tokens(self) -> list[str]:
        """The vocabulary; empty when there is none."""
        return self.optional("tokenizer.ggml.tokens", list) or []

    def optional(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `key`, or None when it is absent; a value of another type is an ExportError."""
        value = self._values.get(self._full(key))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise self.error(key, value, names)
        return value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.optional(key, int)
        if value is None:
            value = default
        if value is None:
            raise ExportError(f"{self._path} has no metadata {self._full(key)!r}")
        if value < least:
            raise self.error(key, value, f"at least {least}")
        return value

    def number(self, key: str, *default: float | None) -> Any:
        """A finite number; `default` stands for an absent key."""
        value = self.optional(key, (int, float))
        if value is None and not default:
            raise ExportError(f"{self._path} has no metadata {self._full(key)!r}")
        if value is None:
            return default[0]
        if not math.isfinite(value):
            raise self.error(key, value, "a finite number")
        return _short(value)

    def expect(self, key: str, expected: int) -> None:
        """Refuse a value that would need mathematics this family does not have; absent is fine."""
        value = self.optional(key, int)
        if value not in (None, expected):
            raise self.error(key, value, str(expected))

    def error(self, key: str, value: Any, expected: str) -> ExportError:
        shown = repr(value) if isinstance(value, (int, float, str)) else f"of type {type(value).__name__}"
        return ExportError(f"{self._path}: metadata {self._full(key)} = {shown} is not supported, expected {expected}")

    def _full(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.")) else f"{self._values['general.architecture']}.{key}"


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse what is not a whole text model of a known architecture."""
    architecture = metadata.get("general.architecture")
    if architecture == "clip" or metadata.get("general.type") == "mmproj":
        raise ExportError(f"{path} is the picture part (mmproj) of a model; name the GGUF file of its text model")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ExportError(
            f"{path} has the architecture {architecture!r}, which is not supported (supported: {supported})"
        )
    if metadata.get("general.type", "model") != "model":
        raise ExportError(f"{path} holds no model but something of the type {metadata['general.type']!r}")
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ExportError(f"{path} is one of {parts} parts; join them first (llama-gguf-split --merge)")


def _folder_name(name: str) -> str:
    """The name in a folder for a name in the file; unknown ones stay, so that an error can name them."""
    match = _LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.weight"
    return _NAMES.get(name, name)


def _short(value: float) -> float:
    """A float32 of the metadata as the decimal that was meant: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def q4_0_blocks(raw: np.ndarray) -> Blocks:
    """Rows of Q4_0, uint8 [rows, 18 bytes a block] -> Blocks of 4 bits.

    A block is a float16 scale d and 16 bytes: w = d (q - 8), the low halves of the bytes are its first 16 columns and
    the high halves its last 16. Here neighbours share a byte.
    """
    scales, codes = _split(raw, 18)
    columns = np.concatenate([codes & 15, codes >> 4], axis=-1)
    packed = columns[..., 0::2] | columns[..., 1::2] << 4
    return Blocks(4, _BLOCK, packed.reshape(len(raw), -1), scales)


def q8_0_blocks(raw: np.ndarray) -> Blocks:
    """Rows of Q8_0, uint8 [rows, 34 bytes a block] -> Blocks of 8 bits: w = d q with q signed, here from 128."""
    scales, codes = _split(raw, 34)
    return Blocks(8, _BLOCK, (codes ^ 128).reshape(len(raw), -1), scales)


def _split(raw: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales float32 [rows, blocks] and bytes uint8 [rows, blocks, size - 2]."""
    cut = raw.reshape(len(raw), -1, size)
    scales = np.ascontiguousarray(cut[..., :2]).view("<f2")[..., 0]
    return scales.astype(np.float32), cut[..., 2:]


_BLOCKS: dict[GGMLQuantizationType, Callable[[np.ndarray], Blocks]] = {
    GGMLQuantizationType.Q4_0: q4_0_blocks,
    GGMLQuantizationType.Q8_0: q8_0_blocks,
}
