"""Scores of the demo model on held-out scenes, whatever produces its replies."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from .architecture import BUDGETS, DEFAULT_BUDGET
from .scenes import Scene, normalised, scene
from .tasks import answer, random_label

Generate = Callable[[Image.Image, str, int], str]  # image, question, budget in soft tokens -> reply
NormalisedBox = tuple[int, int, int, int]  # y1, x1, y2, x2 on the 0-1000 grid

FOUND_ABOVE = 0.5  # intersection over union


@dataclass(frozen=True)
class Question:
    """One request of the evaluation and the scene it is about; `kind` is the task it counts for."""

    scene: Scene
    kind: str
    text: str
    budget: int


@dataclass(frozen=True)
class Report:
    """Rates in 0..1; `recall` and `small_recall` map a budget to the share of objects that `detect all` found."""

    scenes: int
    default_budget: int
    exact: dict[str, float]
    recall: dict[int, float]
    small_recall: dict[int, float]
    precision: dict[int, float]
    objects: int
    small_objects: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.scenes} held-out scenes, {self.objects} objects ({self.small_objects} of them small)", ""]
        lines += [f"Exact replies at budget {self.default_budget}:"]
        lines += [f"  {kind:<16} {rate:6.1%}" for kind, rate in self.exact.items()]
        lines += ["", "detect all:", "  budget  recall  small objects  precision"]
        lines += [
            f"  {budget:>6}  {self.recall[budget]:6.1%}  {self.small_recall[budget]:13.1%}  "
            f"{self.precision[budget]:9.1%}"
            for budget in self.recall
        ]
        return "\n".join(lines)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (y1, x1, y2, x2)."""
    high = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    wide = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other))
    return high * wide / (areas - high * wide) if areas > high * wide else 0.0


def parse_boxes(reply: str) -> list[tuple[str, NormalisedBox]]:
    """(label, box) of each detection in a reply; a reply that is not the agreed JSON holds none."""
    try:
        return [(item["label"], _box(item["box_2d"])) for item in json.loads(reply)]
    except (ValueError, TypeError, KeyError):
        return []


def _box(values: Any) -> NormalisedBox:
    y1, x1, y2, x2 = (int(value) for value in values)
    return y1, x1, y2, x2


def found(scene: Scene, reply: str) -> list[bool]:
    """For each object of the scene: did `reply` name it, with a box that overlaps it enough? A box counts once."""
    boxes = parse_boxes(reply)
    hits = []
    for thing in scene.objects:
        truth = normalised(thing.box, scene.image.size)
        rated = [(overlap(box, truth), index) for index, (label, box) in enumerate(boxes) if label == thing.label]
        best = max(rated, default=(0.0, -1))
        hits.append(best[0] > FOUND_ABOVE)
        if hits[-1]:
            boxes.pop(best[1])
    return hits


def questions(count: int, budgets: Sequence[int] = BUDGETS, default_budget: int = DEFAULT_BUDGET) -> list[Question]:
    """Everything the evaluation asks: all tasks at the default budget, `detect all` at the others too."""
    asked = []
    for index in range(count):
        seen = scene(index)
        rng = np.random.default_rng([3, index])
        texts = {"detect all": "detect all", "describe": "describe", "count": "count", "read": "read"}
        texts["detect <thing>"] = f"detect {random_label(seen, rng)}"
        texts["count <thing>"] = f"count {random_label(seen, rng)}"
        asked += [Question(seen, kind, text, default_budget) for kind, text in texts.items()]
        asked += [Question(seen, "detect all", "detect all", budget) for budget in budgets if budget != default_budget]
    return asked


def score(asked: Sequence[Question], replies: Sequence[str], default_budget: int = DEFAULT_BUDGET) -> Report:
    """The report on one reply per question."""
    exact: dict[str, list[bool]] = defaultdict(list)
    hits: dict[int, list[tuple[bool, bool]]] = defaultdict(list)  # budget -> (found, small) of each object
    given: dict[int, int] = defaultdict(int)
    for question, reply in zip(asked, replies, strict=True):
        if question.kind == "detect all":
            things = question.scene.objects
            result = found(question.scene, reply)
            hits[question.budget] += [(hit, question.scene.is_small(t)) for hit, t in zip(result, things, strict=True)]
            given[question.budget] += len(parse_boxes(reply))
        elif question.kind == "detect <thing>":
            exact[question.kind].append(_same_things(question, reply))
        else:
            exact[question.kind].append(reply == answer(question.scene, question.text))
    budgets = sorted(hits)
    return Report(
        scenes=len({id(question.scene) for question in asked}),
        default_budget=default_budget,
        exact={kind: sum(values) / len(values) for kind, values in exact.items()},
        recall={budget: _share([hit for hit, _ in hits[budget]]) for budget in budgets},
        small_recall={budget: _share([hit for hit, small in hits[budget] if small]) for budget in budgets},
        precision={budget: sum(hit for hit, _ in hits[budget]) / max(1, given[budget]) for budget in budgets},
        objects=len(hits[default_budget]),
        small_objects=sum(small for _, small in hits[default_budget]),
    )


def _same_things(question: Question, reply: str) -> bool:
    """Whether a `detect <thing>` reply has exactly the right objects: no box missing, none too many."""
    label = question.text.removeprefix("detect ")
    wanted = tuple(thing for thing in question.scene.objects if thing.label == label)
    boxes = parse_boxes(reply)
    if not wanted:
        return reply == "[]"
    return len(boxes) == len(wanted) and all(found(Scene(question.scene.image, wanted, None), reply))


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0


def evaluate(
    generate: Generate,
    count: int = 500,
    budgets: Sequence[int] = BUDGETS,
    default_budget: int = DEFAULT_BUDGET,
) -> Report:
    """Ask everything, one question at a time."""
    asked = questions(count, budgets, default_budget)
    replies = [generate(question.scene.image, question.text, question.budget) for question in asked]
    return score(asked, replies, default_budget)
