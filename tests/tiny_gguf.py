"""Tiny GGUF files, written from a tiny Gemma 3 checkpoint by the `gguf` package as llama.cpp's converter would.

The converter's rules are written down here a second time, in the other direction than the exporter reads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

F32, F16, BF16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16
Q4_0, Q8_0, Q5_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_0

TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    checkpoint: Path,
    path: Path,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    *,
    change: Any = lambda metadata, tensors: None,
    architecture: str = "gemma3",
) -> Path:
    """Write the tiny checkpoint as `path`; `kinds` maps parts of GGUF tensor names to types, the rest is float32.

    `change` may edit the metadata (key -> value, keys without the architecture's name) and the tensors before they are
    written (GGUF name -> float32 array, or a pair of raw bytes [rows, bytes] and a type).
    """
    config = json.loads((checkpoint / "config.json").read_text())
    metadata = metadata_of(config) | vocabulary_of(checkpoint)
    tensors = {gguf_name(name): stored(name, value) for name, value in tensors_of(checkpoint).items()}
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add(writer, key if key.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{key}", value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
            continue
        kind = next((kind for part, kind in (kinds or {}).items() if part in name and value.ndim == 2), F32)
        writer.add_tensor(name, value if kind == F32 else quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in load_file(checkpoint / "model.safetensors").items()}


def gguf_name(name: str) -> str:
    if name in TENSORS:
        return TENSORS[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYERS[rest.removesuffix('.weight')]}.weight"


def stored(name: str, value: np.ndarray) -> np.ndarray:
    """The converter adds the 1 of 1 + w to every norm, in float32."""
    return value + np.float32(1) if name.endswith("norm.weight") else value


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes, in its types: 32-bit integers and floats."""
    ropes = config["rope_parameters"]
    metadata = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": config["_sliding_window_pattern"],
        "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
    }
    if "factor" in ropes["full_attention"]:
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": ropes["full_attention"]["factor"]}
    if config["final_logit_softcapping"]:
        metadata["final_logit_softcapping"] = config["final_logit_softcapping"]
    return metadata


def vocabulary_of(checkpoint: Path) -> dict[str, Any]:
    """The vocabulary of tokenizer.json as SentencePiece has it: a score is the rank of what two pieces make."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    types = [
        gguf.TokenType.CONTROL
        if token in added and added[token]["special"]
        else gguf.TokenType.USER_DEFINED
        if token in added
        else gguf.TokenType.BYTE
        if token.startswith("<0x")
        else gguf.TokenType.NORMAL
        for token in tokens
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0 if token in added else -float(rank) for rank, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": (checkpoint / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
