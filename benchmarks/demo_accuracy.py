"""Score a bundle of the demo model on held-out scenes.

    python benchmarks/demo_accuracy.py [BUNDLE] [--scenes N] [--json]

Runs through the public engine, exactly as a user would. The last line of --json output is one object.
"""

from __future__ import annotations

import argparse

from PIL import Image

from siglance.engine import Engine, Text
from siglance.engine import Image as Picture
from siglance.export.demo.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?", default="demo")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with Engine.open(arguments.bundle) as engine:

        def generate(image: Image.Image, question: str, budget: int) -> str:
            return engine.generate([Picture(image, budget), Text(question)], max_tokens=200).text

        report = evaluate(generate, count=arguments.scenes)
    print(report.to_json() if arguments.json else report)


if __name__ == "__main__":
    main()
