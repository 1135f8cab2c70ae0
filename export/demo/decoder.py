"""The text decoder of the demo model in PyTorch: sliding and full layers, shared keys and values, per-layer inputs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import BLOCK_SIZE_AT_START, EPSILON, MLP, RMSNorm, linear, rotate, score_norm
from .tokenizer import COORDINATES, SPECIAL_TOKENS, first_coordinate_id

Cache = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values [batch, kv heads, length, head_dim]


class Attention(nn.Module):
    """Grouped-query attention; a layer with `owner` set reads that layer's keys and values instead of making any."""

    def __init__(self, config: dict[str, Any], full: bool, owner: int | None):
        super().__init__()
        width, self.owner = config["hidden_size"], owner
        self.head_dim = config["global_head_dim"] if full else config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj, self.q_norm = linear(width, self.heads * self.head_dim), score_norm(self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, width)
        if owner is None:
            self.k_proj, self.k_norm = linear(width, self.kv_heads * self.head_dim), score_norm(self.head_dim)
            self.v_proj = linear(width, self.kv_heads * self.head_dim)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, kv heads, length, head_dim] each."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = F.rms_norm(self.v_proj(x).view(shape), (self.head_dim,), None, EPSILON).transpose(1, 2)
        return rotate(k, cos, sin), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_dim)).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, attn_mask=mask, scale=1.0)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """One decoder block: attention, MLP and the gated per-layer input."""

    def __init__(self, config: dict[str, Any], full: bool, owner: int | None):
        super().__init__()
        width, narrow = config["hidden_size"], config["hidden_size_per_layer_input"]
        self.self_attn = Attention(config, full, owner)
        self.mlp = MLP(width, config["intermediate_size"] * (1 if owner is None else 2))
        self.input_layernorm, self.pre_feedforward_layernorm = RMSNorm(width), RMSNorm(width)
        self.post_attention_layernorm = RMSNorm(width, BLOCK_SIZE_AT_START)
        self.post_feedforward_layernorm = RMSNorm(width, BLOCK_SIZE_AT_START)
        self.post_per_layer_input_norm = RMSNorm(width, BLOCK_SIZE_AT_START / 2)
        self.per_layer_input_gate, self.per_layer_projection = linear(width, narrow), linear(narrow, width)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def finish(self, x: Tensor, attended: Tensor, per_layer: Tensor) -> Tensor:
        """Everything after attention; per_layer is [batch, length, narrow]."""
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        gated = F.gelu(self.per_layer_input_gate(x), approximate="tanh") * per_layer
        x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar


def _rope_frequencies(config: dict[str, Any], kind: str) -> Tensor:
    """[head_dim / 2]; a proportional rope leaves the slow three quarters of the pairs unrotated."""
    head_dim = config["global_head_dim"] if kind == "full_attention" else config["head_dim"]
    rope = config["rope_parameters"][kind]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    rotated = int(rope.get("partial_rotary_factor", 1.0) * head_dim / 2)
    return torch.where(torch.arange(head_dim // 2) < rotated, frequencies, 0.0)


class Decoder(nn.Module):
    """Embeddings, layers and the tied output."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config, width, narrow = config, config["hidden_size"], config["hidden_size_per_layer_input"]
        kinds = config["layer_types"]
        self.kinds, own = kinds, len(kinds) - config["num_kv_shared_layers"]
        # a layer without keys of its own reads those of the last layer of its kind that has
        owners = [None if i < own else max(j for j in range(own) if kinds[j] == kinds[i]) for i in range(len(kinds))]
        self.owners = [i if owner is None else owner for i, owner in enumerate(owners)]
        self.layers = nn.ModuleList(
            Layer(config, kind == "full_attention", owner) for kind, owner in zip(kinds, owners, strict=True)
        )
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.embed_tokens_per_layer = nn.Embedding(config["vocab_size"], len(kinds) * narrow)
        self.per_layer_model_projection = linear(width, len(kinds) * narrow)
        self.per_layer_projection_norm = RMSNorm(narrow)
        self.norm = RMSNorm(width)
        for kind in dict.fromkeys(kinds):
            self.register_buffer(f"{kind}_frequencies", _rope_frequencies(config, kind), persistent=False)
        self._start_embeddings()

    @torch.no_grad()
    def _start_embeddings(self) -> None:
        """Unit-size embeddings; those of the coordinates vary smoothly with the number they stand for."""
        width = self.embed_tokens.weight.shape[1]
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        nn.init.normal_(self.embed_tokens_per_layer.weight, std=0.1)
        value = torch.linspace(0, 1, len(COORDINATES))[:, None]
        waves = torch.arange(1, 17)[None] * math.pi * value
        features = torch.cat((waves.cos(), waves.sin()), -1) / torch.arange(1, 17).repeat(2).sqrt()
        smooth = features @ torch.randn(features.shape[1], width)
        smooth = smooth / smooth.norm(dim=-1, keepdim=True)
        first = first_coordinate_id()
        self.embed_tokens.weight[first : first + len(COORDINATES)] = smooth

    def embed(self, ids: Tensor, soft: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings and per-layer inputs [batch, length, layers, narrow] of ids [batch, length]."""
        width, narrow = self.config["hidden_size"], self.config["hidden_size_per_layer_input"]
        is_image = ids == SPECIAL_TOKENS["<|image|>"]
        x = self.embed_tokens(ids) * math.sqrt(width)
        if soft is not None:
            x = x.masked_scatter(is_image[..., None], soft)
        shape = (*ids.shape, len(self.layers), narrow)
        token = self.embed_tokens_per_layer(ids.masked_fill(is_image, 0)).view(shape) * math.sqrt(narrow)
        context = self.per_layer_projection_norm((self.per_layer_model_projection(x) * width**-0.5).view(shape))
        return x, (context + token) * 2**-0.5

    def forward(
        self, ids: Tensor, soft: Tensor | None, positions: Tensor, masks: dict[str, Tensor], cache: Cache | None = None
    ) -> Tensor:
        """Final hidden states [batch, length, width].

        positions is [batch, length]; masks hold True where a key may be seen, [batch, 1, length, keys], one per kind of
        layer. With a `cache` the new keys and values are appended to it and `keys` counts the old ones too.
        """
        x, per_layer = self.embed(ids, soft)
        turns = {}
        for kind in dict.fromkeys(self.kinds):
            angles = positions[:, None, :, None] * getattr(self, f"{kind}_frequencies")
            angles = torch.cat((angles, angles), -1)
            turns[kind] = angles.cos(), angles.sin()
        made: Cache = {}
        for index, (layer, kind, owner) in enumerate(zip(self.layers, self.kinds, self.owners, strict=True)):
            cos, sin = turns[kind]
            normed = layer.input_layernorm(x)
            if owner == index:
                k, v = layer.self_attn.keys_values(normed, cos, sin)
                if cache is not None:
                    if index in cache:
                        k, v = torch.cat((cache[index][0], k), 2), torch.cat((cache[index][1], v), 2)
                    cache[index] = k, v
                made[index] = k, v
            attended = layer.self_attn(normed, *made[owner], cos, sin, masks[kind])
            x = layer.finish(x, attended, per_layer[:, :, index])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [..., vocabulary]."""
        cap = self.config["final_logit_softcapping"]
        return cap * torch.tanh(F.linear(hidden, self.embed_tokens.weight) / cap)
