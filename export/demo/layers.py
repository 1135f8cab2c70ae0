"""Pieces that the vision tower and the decoder of the demo model share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
# Each block ends in a norm whose weight is the size of its contribution to the residual.
BLOCK_SIZE_AT_START = 0.5


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPSILON)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A bias-free projection; weights start at variance 1 / inputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired: x [..., length, head_dim], cos and sin broadcast against it."""
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + swapped * sin


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, layer: Callable[[int, int], nn.Module] = linear):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer(width, inner), layer(width, inner), layer(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def score_norm(head_dim: int) -> RMSNorm:
    """Norm of queries or keys. Scores are not divided by sqrt(head_dim): the weights have to start small instead."""
    return RMSNorm(head_dim, 1.2 * head_dim**-0.25)
