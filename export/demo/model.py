"""A lean PyTorch form of the Gemma 4 architecture, for training the demo model; parameter names are the official ones.

It computes what transformers' `Gemma4ForConditionalGeneration` computes (see `checkpoint.compare_with_transformers`),
without padding in the vision tower and without the generality.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import POOL, TEXT_CONFIG, VISION_CONFIG
from .decoder import Decoder
from .layers import BLOCK_SIZE_AT_START, EPSILON, MLP, RMSNorm, linear, rotate, score_norm


class Wrapped(nn.Module):
    """The vision tower names its weights `<name>.linear.weight`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class VisionAttention(nn.Module):
    """Bidirectional attention over patches with two-dimensional rotary positions."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.heads, self.head_dim, width = config["num_attention_heads"], config["head_dim"], config["hidden_size"]
        inner = self.heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = Wrapped(width, inner), Wrapped(width, inner), Wrapped(width, inner)
        self.o_proj = Wrapped(inner, width)
        self.q_norm, self.k_norm = score_norm(self.head_dim), score_norm(self.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # [batch, length, heads, head_dim]; the rotation treats the x half and the y half as two vectors
        shape, halves = (batch, length, self.heads, self.head_dim), (batch, length, self.heads, 2, self.head_dim // 2)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).view(halves), cos, sin).view(shape).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).view(halves), cos, sin).view(shape).transpose(1, 2)
        v = F.rms_norm(self.v_proj(x).view(shape), (self.head_dim,), None, EPSILON).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class VisionLayer(nn.Module):
    """One block of the vision tower."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width = config["hidden_size"]
        self.self_attn = VisionAttention(config)
        self.mlp = MLP(width, config["intermediate_size"], Wrapped)
        self.input_layernorm, self.pre_feedforward_layernorm = RMSNorm(width), RMSNorm(width)
        self.post_attention_layernorm = RMSNorm(width, BLOCK_SIZE_AT_START)
        self.post_feedforward_layernorm = RMSNorm(width, BLOCK_SIZE_AT_START)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """Pixels to patch vectors, plus a learnt vector per column and per row."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, positions = config["hidden_size"], config["position_embedding_size"]
        self.input_proj = linear(3 * config["patch_size"] ** 2, width)
        # Smooth in the position, so that what is learnt for one column helps its neighbours.
        waves = torch.arange(positions)[:, None] * torch.logspace(0, -2.3, width // 2)[None]
        start = 0.3 * torch.cat((waves.sin(), waves.cos()), -1)
        self.position_embedding_table = nn.Parameter(torch.stack((start, start.flip(-1))))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches [batch, rows * columns, 768] in 0..1 -> [batch, rows * columns, width]."""
        rows, columns = grid
        places = self.position_embedding_table[1, :rows, None] + self.position_embedding_table[0, None, :columns]
        return self.input_proj(2 * (patches - 0.5)) + places.reshape(rows * columns, -1)


class Encoder(nn.Module):
    """The stack of vision layers."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config["num_hidden_layers"]))
        half = config["head_dim"] // 2
        theta = config["rope_parameters"]["rope_theta"]
        self.register_buffer("frequencies", theta ** (-torch.arange(0, half, 2) / half), persistent=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        column = torch.arange(columns).repeat(rows)
        row = torch.arange(rows).repeat_interleave(columns)
        # [length, 1, 2, half / 2]: x first, then y
        angles = torch.stack((column, row), -1)[:, None, :, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


class VisionTower(nn.Module):
    """Patches to pooled soft tokens."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.patch_embedder, self.encoder = PatchEmbedder(config), Encoder(config)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """patches [batch, rows * columns, 768] -> features of the patches and of each 3x3 group of them."""
        x = self.encoder(self.patch_embedder(patches, grid), grid)
        batch, _, width = x.shape
        rows, columns = grid[0] // POOL, grid[1] // POOL
        pooled = x.view(batch, rows, POOL, columns, POOL, width).mean((2, 4)).view(batch, rows * columns, width)
        return x, pooled * math.sqrt(width)


class Embedder(nn.Module):
    """Soft tokens to the decoder's width."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.embedding_projection = linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding_projection(F.rms_norm(x, (x.shape[-1],), None, EPSILON))


class Gemma4Core(nn.Module):
    """Holder that gives its parts the official names."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = VisionTower(VISION_CONFIG)
        self.embed_vision = Embedder(VISION_CONFIG["hidden_size"], TEXT_CONFIG["hidden_size"])
        self.language_model = Decoder(TEXT_CONFIG)


class DemoModel(nn.Module):
    """The whole model; its state dict is the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Gemma4Core()

    def see(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """patches [batch, n, 768] -> patch features [batch, n, width] and soft tokens [batch, n / 9, decoder width]."""
        features, pooled = self.model.vision_tower(patches, grid)
        return features, self.model.embed_vision(pooled)
