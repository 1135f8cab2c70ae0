"""Trains the demo model on synthetic scenes: `python -m siglance.export.demo.train --out DIR --hours H [--resume]`.

The first part of the time goes to the vision tower alone, taught by the hint heads; then the whole model learns to
answer. An average of the weights over the last steps is what is scored and kept; the best so far is in DIR/best.
"""

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import architecture, checkpoint, feed
from .answering import score_model
from .evaluate import Report
from .learning import Hints, losses, neighbour_smoothing, optimisers
from .model import DemoModel
from .packing import Batch

_STAGE_BREAK = 0.2  # share of the time for the vision tower alone
_WARM_UP_STEPS = 60
_DECAY_FROM = 0.45  # share of the time after which the learning rate falls, linearly
_AVERAGING = 0.998
_SCORED_SCENES = 60


@dataclass
class Progress:
    """Where the training stands; all of it survives a restart."""

    step: int = 0
    images: int = 0
    next_scene: int = 0
    seconds: float = 0.0
    best: float = -1.0
    smooth: dict[str, float] = field(default_factory=dict)


class Run:
    """The model, its optimisers, the averaged weights and the progress, with saving and scoring."""

    def __init__(self, out: Path, hours: float):
        torch.manual_seed(0)
        self.out, self.budget_seconds = out, hours * 3600
        self.model, self.hints = DemoModel(), Hints()
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimisers = optimisers(self.model, self.hints)
        self.smoothing, self.progress = neighbour_smoothing(), Progress()

    def step(self, batch: Batch, elapsed: float) -> None:
        """One update at `elapsed` seconds of training."""
        progress = self.progress
        share = min(1.0, elapsed / self.budget_seconds)
        rate = min(1.0, (progress.step + 1) / _WARM_UP_STEPS, max(0.01, (1 - share) / (1 - _DECAY_FROM)))
        parts = losses(self.model, self.hints, batch, self.smoothing, with_text=share > _STAGE_BREAK)
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        for optimiser, peak in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * peak
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        progress.images += len(batch.ids)
        weight = 1 - min(_AVERAGING, (1 + progress.step) / (10 + progress.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, weight)
        for name, value in parts.items():
            progress.smooth[name] = 0.97 * progress.smooth.get(name, value.item()) + 0.03 * value.item()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "hints": self.hints.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "progress": asdict(self.progress),
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").rename(self.out / "state.pt")

    def restore(self) -> None:
        state = torch.load(self.out / "state.pt")
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.average = state["average"]
        for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def evaluate(self, scenes: int) -> Report:
        """Score the averaged weights, and keep them if they are the best so far."""
        averaged = DemoModel()
        averaged.load_state_dict(self.average)
        report = score_model(averaged.eval(), scenes, (architecture.DEFAULT_BUDGET,))
        total = report.recall[architecture.DEFAULT_BUDGET] + sum(report.exact.values()) / len(report.exact)
        if total >= self.progress.best:
            self.progress.best = total
            checkpoint.write(self.out / "best", self.average)
        return report


def train(out: Path, hours: float, resume: bool, every_minutes: float, late: bool) -> None:
    """Train for `hours` in all, counting what a resumed run has already used."""
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, hours)
    if resume and (out / "state.pt").exists():
        run.restore()
    progress = run.progress
    next_score = progress.seconds + every_minutes * 60
    shares = feed.LATE_BUDGET_SHARES if late else feed.BUDGET_SHARES
    with feed.background(progress.next_scene, shares) as batches:
        before = time.monotonic()
        while progress.seconds < run.budget_seconds:
            progress.next_scene, batch = next(batches)
            run.step(batch, progress.seconds)
            if progress.step % 50 == 0:
                losses_now = {name: round(value, 3) for name, value in progress.smooth.items()}
                log(out, f"step {progress.step} images {progress.images} {progress.seconds:.0f} s {losses_now}")
            now = time.monotonic()
            progress.seconds += now - before
            before = now
            if progress.seconds >= next_score:
                next_score += every_minutes * 60
                if progress.seconds > _STAGE_BREAK * run.budget_seconds:
                    status(out, run, run.evaluate(_SCORED_SCENES))
                run.save()
    status(out, run, run.evaluate(_SCORED_SCENES))
    run.save()


def status(out: Path, run: Run, report: Report) -> None:
    """One line per evaluation: time, step, images and the scores."""
    budget = report.default_budget
    exact = json.dumps({kind: round(rate, 3) for kind, rate in report.exact.items()})
    with (out / "STATUS").open("a") as file:
        file.write(
            f"{time.strftime('%H:%M:%S')} step {run.progress.step} images {run.progress.images} "
            f"recall@{budget} {report.recall[budget]:.3f} small {report.small_recall[budget]:.3f} exact {exact}\n"
        )


def log(out: Path, line: str) -> None:
    with (out / "log.txt").open("a") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the state, the log and the best checkpoint")
    parser.add_argument("--hours", type=float, required=True, help="training time in all, scoring included")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--late", action="store_true", help="look closer: more scenes at the largest budget")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every-minutes", type=float, default=8.0, help="time between two scorings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, so that the background process ends too
    train(options.out, options.hours, options.resume, options.every_minutes, options.late)


if __name__ == "__main__":
    main()
