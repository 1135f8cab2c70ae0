"""PaliGemma 1 and 2: a SigLIP tower and a linear projector in front of a Gemma 1 or Gemma 2 decoder.

The whole prompt (pictures, beginning of sequence, question, newline) sees all of itself; the answer is causal.
Formulas: transformers `modeling_paligemma.py`, `modeling_gemma.py`, `modeling_gemma2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...engine.errors import ExportError
from ...engine.manifest import PlaceholderFacts, ReplyFacts
from .. import blocks
from ..builder import FLOAT, INT64, GraphBuilder
from ..checkpoint import Checkpoint, Weights
from . import ConfigReader, ExportOptions, Facts, Family, full_state_note
from ._siglip import PREFIXES, SiglipConfig, features, image_facts, placeholders_as_padding, read_siglip

FIRST_POSITION = 1  # positions of PaliGemma count from one
# What PaliGemmaConfig fills in for a part that config.json does not have at all.
DEFAULT_TEXT = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}
DEFAULT_VISION = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Gemma 1 (`sandwich` false: a norm before each half of a layer) or Gemma 2 (also one after it)."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    theta: float
    scale: float
    sandwich: bool
    window: int | None
    windowed: tuple[bool, ...]  # per layer; none without a window
    attention_cap: float | None
    logits_cap: float | None
    tied: bool


@dataclass(frozen=True, slots=True)
class Config:
    text: TextConfig
    vision: SiglipConfig
    image_id: int


def read(values: dict[str, Any]) -> Config:
    """Read config.json of PaliGemmaForConditionalGeneration; defaults are those of transformers' classes."""
    reader = ConfigReader(values)
    text = _section(reader, "text_config", DEFAULT_TEXT)
    kind = text.optional("model_type") or "gemma"
    if kind not in ("gemma", "gemma2"):
        raise ExportError(f"{text.where}: model_type = {kind!r} is not supported (supported: 'gemma', 'gemma2')")
    facts = _read_text(text, kind == "gemma2", reader.flag("tie_word_embeddings", True))
    reader.expect("projection_dim", (None, facts.hidden))
    for key in ("projector_type", "mm_projector_type"):
        reader.expect(key, (None, "linear"))
    return Config(
        text=facts,
        vision=read_siglip(_section(reader, "vision_config", DEFAULT_VISION)),
        image_id=reader.integer("image_token_id", reader.integer("image_token_index", 256000)),
    )


def _section(reader: ConfigReader, key: str, default: dict[str, Any]) -> ConfigReader:
    if reader.optional(key) is None:
        return ConfigReader(default, f"{reader.where}: {key}")
    return reader.section(key)


def _read_text(reader: ConfigReader, second: bool, tied: bool) -> TextConfig:
    # Gemma 1 files say "gelu"; transformers has always computed the tanh form for them.
    reader.expect("hidden_act", (None, "gelu", "gelu_pytorch_tanh"))
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    reader.expect_epsilon(1e-6)
    rope = ConfigReader(reader.optional("rope_parameters") or {}, f"{reader.where}: rope_parameters")
    rope.expect("rope_type", (None, "default"))
    reader.expect("rope_scaling", (None,))
    layers = reader.integer("num_hidden_layers", 26 if second else 28)
    head_size = reader.integer("head_dim", 256)
    window = None  # Gemma 1 has none, and null in a Gemma 2 file means none
    if second and reader.values.get("sliding_window", 4096) is not None:
        window = reader.count("sliding_window", 4096)
    return TextConfig(
        hidden=reader.integer("hidden_size", 2304 if second else 3072),
        layers=layers,
        heads=reader.integer("num_attention_heads", 8 if second else 16),
        key_value_heads=reader.integer("num_key_value_heads", 4 if second else 16),
        head_size=head_size,
        intermediate=reader.integer("intermediate_size", 9216 if second else 24576),
        vocabulary=reader.integer("vocab_size", 256000),
        context=reader.count("max_position_embeddings", 8192),
        theta=rope.positive("rope_theta", reader.positive("rope_theta", 10_000.0)),
        scale=(reader.positive("query_pre_attn_scalar", 256) if second else head_size) ** -0.5,
        sandwich=second,
        window=window,
        windowed=(False,) * layers if window is None else _windowed(reader, layers),
        attention_cap=reader.cap("attn_logit_softcapping", 50.0) if second else None,
        logits_cap=reader.cap("final_logit_softcapping", 30.0) if second else None,
        tied=tied,
    )


def _windowed(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Every other layer, beginning with the first, unless `layer_types` says something else."""
    kinds = reader.strings("layer_types", [])
    if not kinds:
        return tuple(index % 2 == 0 for index in range(layers))
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise ExportError(
            f"{reader.where}: layer_types has {len(kinds)} entries for {layers} layers, unknown: {unknown}"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


# --- graphs


def build_vision(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """patches and positions -> soft_tokens [n, D]. Features are not scaled, embeddings of text are."""
    x = features(graph, weights, config.vision)
    shape = (config.text.hidden, config.vision.hidden)
    projected = blocks.linear(graph, x, weights, "projector.linear.weight", shape, bias=True)
    flat = graph.constant(np.array([-1, config.text.hidden], np.int64), "flat")
    graph.output(graph.op("Reshape", projected, flat), "soft_tokens", FLOAT, ["soft_tokens", config.text.hidden])


def build_embed(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """input_ids [1, S] -> inputs_embeds [1, S, D], scaled by sqrt(D)."""
    ids = graph.input("input_ids", INT64, [1, "tokens"])
    ids = placeholders_as_padding(graph, ids, config.image_id, config.text.vocabulary)
    rows = blocks.lookup(graph, _table(graph, weights, config.text), ids, "embed_tokens")
    scaled = blocks.constant_scale(graph, rows, float(config.text.hidden) ** 0.5, "scale_embeddings")
    graph.output(scaled, "inputs_embeds", FLOAT, [1, "tokens", config.text.hidden])


def _table(graph: GraphBuilder, weights: Weights, text: TextConfig) -> blocks.Table:
    shape = (text.vocabulary, text.hidden)
    return blocks.table(graph, weights, "embed_tokens.weight", "text.embed_tokens.weight", shape)


def build_decoder(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """inputs_embeds and state -> logits of the rows asked for."""
    text = config.text
    inputs = blocks.decoder_inputs(graph, text.hidden, blocks=True)
    tables = blocks.rope_tables(
        *(graph, "global", blocks.inverse_frequencies(text.head_size, text.theta)),
        min(text.context, options.context),
        first=FIRST_POSITION,
    )
    masks = {
        windowed: blocks.block_bias(graph, inputs, window=text.window if windowed else None, inside_window=False)
        for windowed in sorted(set(text.windowed))
    }
    x = inputs.embeddings
    normed = blocks.rms_norm(graph, x, _norm(graph, weights, "text.layers.0.input_layernorm", text.hidden), "norm")
    for layer in range(text.layers):
        with graph.scope(f"layers.{layer}"):
            mixed = _attention(graph, weights, text, layer, normed, inputs, tables, masks[text.windowed[layer]])
            if layer == text.layers - 1:
                # The last attention has written its state: only rows whose logits are wanted go on.
                mixed = blocks.take_rows(graph, mixed, inputs, "take_rows")
                x = blocks.take_rows(graph, x, inputs, "take_residual_rows")
            normed, x = _feed_forward(graph, weights, text, layer, mixed, x)
    head = _table(graph, weights, text) if text.tied else _head(graph, weights, text)
    blocks.logits(graph, normed, head, text.logits_cap)


def _feed_forward(
    graph: GraphBuilder, weights: Weights, text: TextConfig, layer: int, mixed: ir.Value, x: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Add the attention's output, then the MLP's; returns (the norm that follows, the sum).

    In Gemma 1 the weights called post_attention_layernorm belong to the norm in front of the MLP.
    """
    prefix, hidden = f"text.layers.{layer}", text.hidden
    before = "pre_feedforward_layernorm" if text.sandwich else "post_attention_layernorm"
    if text.sandwich:
        weight = _norm(graph, weights, f"{prefix}.post_attention_layernorm", hidden)
        mixed = blocks.rms_norm(graph, mixed, weight, "post_attention")
    weight = _norm(graph, weights, f"{prefix}.{before}", hidden)
    normed, x = blocks.add_rms_norm(graph, mixed, x, weight, "pre_feedforward")
    fed = blocks.gated_mlp(graph, normed, weights, f"{prefix}.mlp", hidden, text.intermediate)
    if text.sandwich:
        weight = _norm(graph, weights, f"{prefix}.post_feedforward_layernorm", hidden)
        fed = blocks.rms_norm(graph, fed, weight, "post_feedforward")
    following = "text.norm" if layer == text.layers - 1 else f"text.layers.{layer + 1}.input_layernorm"
    return blocks.add_rms_norm(graph, fed, x, _norm(graph, weights, following, hidden), "next_norm")


def _attention(
    graph: GraphBuilder,
    weights: Weights,
    text: TextConfig,
    layer: int,
    x: ir.Value,
    inputs: blocks.DecoderInputs,
    tables: tuple[ir.Value, ir.Value],
    mask: ir.Value,
) -> ir.Value:
    prefix, size = f"text.layers.{layer}.self_attn", text.head_size
    widths = (text.heads * size, text.key_value_heads * size, text.key_value_heads * size)
    query, key, value = blocks.query_key_value(graph, x, weights, prefix, widths, text.hidden)
    state = blocks.key_value_state(graph, layer, text.key_value_heads, size, None, "capacity")
    facts = blocks.Attention(text.heads, text.key_value_heads, size, text.scale, *tables, soft_cap=text.attention_cap)
    mixed, _, _ = blocks.attention(graph, query, key, value, state, inputs, facts, bias=mask)
    return blocks.linear(graph, mixed, weights, f"{prefix}.o_proj.weight", (text.hidden, text.heads * size))


def _norm(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    """The vector of a norm, with 1 + w folded into it."""
    return graph.weight(f"{name}.weight", (size,), lambda: [1.0 + weights.read(f"{name}.weight", (size,))])


def _head(graph: GraphBuilder, weights: Weights, text: TextConfig) -> blocks.Table:
    return blocks.table(graph, weights, "lm_head.weight", "lm_head.weight", (text.vocabulary, text.hidden))


# --- facts


def finish(checkpoint: Checkpoint, weights: Weights, config: Config, options: ExportOptions) -> Facts:
    text, vision = config.text, config.vision
    values = [2 * text.key_value_heads * text.head_size] * text.layers
    if text.tied:
        weights.drop_copy("lm_head.weight", "text.embed_tokens.weight")
    return Facts(
        requires=("state:global", "logit_rows:any", "attention:prefix", "image:squash", "prompt:media_first"),
        state=blocks.state_pairs([False] * text.layers),
        image=image_facts(checkpoint, vision, pool=1, resample=3),
        image_prompt=PlaceholderFacts(item="<image>", before="", soft="<image>", after=""),
        reply=ReplyFacts(boxes="loc", thought=None, tool_call=None),
        turn_ends=("<eos>",),
        context=text.context,
        layout="media_first",
        prompt_end="\n",
        notes=(full_state_note(values, text.windowed, text.window or 0, "the prompt did not see all of itself"),),
    )


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    prefixes=PREFIXES,
    read=read,
    graphs=lambda config: {"vision": build_vision, "embed": build_embed, "decoder": build_decoder},
    finish=finish,
)
