"""What the demo model is asked and what the right answer is, as text."""

import json

import numpy as np

from .scenes import LABELS, Scene, normalised

COORDINATE_STEP = 10  # replies use coordinates in steps of this, so that each is one token of a small vocabulary
NO_SIGN = "nothing"


def rounded(coordinate: float) -> int:
    """A 0-1000 coordinate on the grid that replies use."""
    return int(min(1000, max(0, COORDINATE_STEP * round(coordinate / COORDINATE_STEP))))


def answer(scene: Scene, question: str) -> str:
    """The right reply to `question` about `scene`; KeyError for a question outside the demo's world."""
    verb, _, target = question.partition(" ")
    if question == "describe":
        return _describe(scene)
    if question == "read":
        return scene.sign.text if scene.sign else NO_SIGN
    if verb == "count" and (not target or target in LABELS):
        return str(sum(target in ("", thing.label) for thing in scene.objects))
    if verb == "detect" and (target == "all" or target in LABELS):
        return _detect(scene, target)
    raise KeyError(question)


def _describe(scene: Scene) -> str:
    names = [f"a {thing.label}" for thing in scene.objects]
    listing = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return "A" + listing[1:] + "." + (" There is a sign." if scene.sign else "")


def _detect(scene: Scene, target: str) -> str:
    found = [
        {
            "box_2d": [rounded(value) for value in normalised(thing.box, scene.image.size)],
            "label": thing.label,
        }
        for thing in scene.objects
        if target in ("all", thing.label)
    ]
    return json.dumps(found)


def random_label(scene: Scene, rng: np.random.Generator) -> str:
    """A label to ask for: usually one that is there, else any (then the honest reply is often "none")."""
    if scene.objects and rng.random() < 0.7:
        return scene.objects[rng.integers(len(scene.objects))].label
    return LABELS[rng.integers(len(LABELS))]


def questions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A training mix of questions about one scene: the harder and the richer ones are asked most often."""
    asked = ["detect all"]
    if rng.random() < 0.65:
        asked.append("describe")
    if rng.random() < 0.65:
        asked.append(f"detect {random_label(scene, rng)}")
    if rng.random() < 0.6:
        asked.append("count")
    if rng.random() < 0.3:
        asked.append(f"count {random_label(scene, rng)}")
    if rng.random() < (0.9 if scene.sign else 0.2):
        asked.append("read")
    return asked
