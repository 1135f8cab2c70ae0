"""Losses and the optimiser of the demo model's training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import TEXT_CONFIG, VISION_CONFIG
from .layers import EPSILON
from .model import DemoModel
from .packing import CLASSES, Batch, masks
from .scenes import SIGN_WORDS
from .tokenizer import COORDINATES, first_coordinate_id

_BOX_WEIGHT = 8.0
_NEIGHBOUR_SPREAD = 1.0  # standard deviation, in coordinate steps, of the smoothed target of a coordinate


class Hints(nn.Module):
    """Heads that tell each patch and each soft token what covers it; used in training only, then dropped.

    The text loss alone leaves the vision tower without a usable signal for very long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(VISION_CONFIG["hidden_size"], CLASSES + 4)
        self.cell = nn.Linear(TEXT_CONFIG["hidden_size"], CLASSES + 4 + len(SIGN_WORDS))

    def forward(self, features: Tensor, soft: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of class, box and sign text; features [batch, patches, width], soft [batch, cells, width]."""
        patch = self.patch(F.rms_norm(features, (features.shape[-1],), None, EPSILON)).flatten(0, 1)
        cell = self.cell(soft).flatten(0, 1)
        kind = F.cross_entropy(patch[:, :CLASSES], batch.patch_class.flatten())
        kind = kind + F.cross_entropy(cell[:, :CLASSES], batch.cell_class.flatten())
        box = self._box(patch, batch.patch_class, batch.patch_box) + self._box(cell, batch.cell_class, batch.cell_box)
        spelt = batch.cell_text.flatten()
        text = F.cross_entropy(cell[:, CLASSES + 4 :], spelt, ignore_index=-1, reduction="sum")
        return kind, box, text / (spelt >= 0).sum().clamp(min=1)

    @staticmethod
    def _box(scores: Tensor, kind: Tensor, box: Tensor) -> Tensor:
        covered = kind.flatten() > 0
        return (scores[covered, CLASSES : CLASSES + 4] - box.flatten(0, 1)[covered]).abs().mean()


def neighbour_smoothing() -> Tensor:
    """[coordinates, coordinates]: the target distribution of each coordinate, spread over its neighbours."""
    value = torch.arange(len(COORDINATES)).float()
    weight = torch.exp(-0.5 * ((value[:, None] - value) / _NEIGHBOUR_SPREAD) ** 2)
    return weight / weight.sum(-1, keepdim=True)


def text_loss(model: DemoModel, batch: Batch, soft: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the replies' coordinates (above its floor) and of their other tokens."""
    decoder = model.model.language_model
    hidden = decoder(batch.ids, soft, batch.positions, masks(batch.positions, batch.branches))
    learnt = batch.targets >= 0
    target = batch.targets[learnt]
    scores = decoder.logits(hidden[learnt]).log_softmax(-1)
    first, count = first_coordinate_id(), len(COORDINATES)
    number = (target >= first) & (target < first + count)
    wanted = smoothing[target[number] - first]
    coordinates = (wanted * (wanted.clamp(min=1e-9).log() - scores[number, first : first + count])).sum(-1).mean()
    return coordinates, F.nll_loss(scores[~number], target[~number])


def losses(model: DemoModel, hints: Hints, batch: Batch, smoothing: Tensor, with_text: bool) -> dict[str, Tensor]:
    """Every part of the loss, already weighted; the loss is their sum."""
    features, soft = model.see(batch.pixels.float() / 255, batch.grid)
    kind, box, text = hints(features, soft, batch)
    parts = {"kind": kind, "box": _BOX_WEIGHT * box, "sign": 0.3 * text}
    if with_text:
        coordinates, words = text_loss(model, batch, soft, smoothing)
        parts |= {"coordinates": coordinates, "words": 4 * words}
    return parts


def orthogonalised(gradients: Tensor, steps: int = 4) -> Tensor:
    """Newton-Schulz iteration towards U V^T of each matrix; gradients [matrices, rows, columns]."""
    tall = gradients.shape[1] > gradients.shape[2]
    x = gradients.transpose(1, 2) if tall else gradients
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the weight matrices; equal shapes are treated together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def optimisers(model: DemoModel, hints: Hints) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimisers with their peak learning rates: Muon for matrices inside the layers, AdamW for the rest."""
    matrices, rest = [], list(hints.parameters())
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed_tokens" not in name and "input_proj" not in name
        (matrices if inside else rest).append(parameter)
    return [
        (Muon(matrices, lr=0.02), 0.02),
        (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0), 2e-3),
    ]
