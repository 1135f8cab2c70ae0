"""Time to the first token of a second question on the same picture, with the caches and without.

    python benchmarks/second_question.py [BUNDLE]... [--rounds N] [--json]

Every round has pictures of its own, so that a first question meets nothing that is known. Then the second question is
asked with the caches and without, in turns: as a request of its own, which reads the file again, and as the next turn
of a chat. Replies with and without must be equal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
from collections.abc import Callable

import numpy as np
import PIL.Image

from siglance.engine import Engine, Reply, Sampling, Text
from siglance.engine.graph import usable_cores, versions
from siglance.engine.self_test import formula_picture

FIRST, SECOND = Text("describe"), Text("count")
OPTIONS = {"sampling": Sampling(temperature=0), "max_tokens": 4}
SIZE = (768, 1024)


def photo(index: int) -> bytes:
    """A PNG that differs from all others."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.roll(formula_picture(*SIZE), 17 * index + 1, axis=1)).save(file, "PNG")
    return file.getvalue()


def one_round(engine: Engine, index: int) -> dict[str, Reply]:
    """All ways to ask, with and without the caches first in turns."""
    picture, other = photo(2 * index), photo(2 * index + 1)

    def separate(cache: bool) -> Reply:
        return engine.generate([picture, SECOND], cache=cache, **OPTIONS)

    def chat(cache: bool) -> Callable[[], Reply]:
        talk = engine.chat(cache=cache, **OPTIONS)
        talk.send([other, FIRST])
        return lambda: talk.send(SECOND)

    found = {"first": engine.generate([picture, FIRST], **OPTIONS)}
    order = (True, False) if index % 2 else (False, True)
    for cache in order:
        found[f"request, cache {'on' if cache else 'off'}"] = separate(cache)
    turns = {cache: chat(cache) for cache in order}
    for cache in order:
        found[f"chat turn, cache {'on' if cache else 'off'}"] = turns[cache]()
    return found


def measure(bundle: str, rounds: int) -> dict:
    with Engine.open(bundle) as engine:
        one_round(engine, 10_000)  # warm up
        found = [one_round(engine, index) for index in range(rounds)]
        facts = {"bundle": engine.manifest.name, "precision": engine.manifest.precision, "rounds": rounds}
        facts["state_cache_mb"] = round(engine._reuse.prefixes.nbytes / 1e6, 1)
    first = statistics.median(one["first"].timings.first_token for one in found)
    facts["ways"] = {}
    for way in found[0]:
        times = [one[way].timings.first_token for one in found]
        usage = found[0][way].usage
        facts["ways"][way] = {
            "first_token_ms": round(statistics.median(times), 2),
            "lowest": round(min(times), 2),
            "highest": round(max(times), 2),
            "of_first": round(statistics.median(times) / first, 4),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
        }
    for way in ("request", "chat turn"):
        pairs = [(one[f"{way}, cache on"].token_ids, one[f"{way}, cache off"].token_ids) for one in found]
        facts[f"{way}: equal replies"] = f"{sum(on == off for on, off in pairs)} of {rounds}"
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", default=["demo"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    arguments = parser.parse_args()
    results = [measure(bundle, arguments.rounds) for bundle in arguments.bundles]
    machine = {"platform": platform.platform(), "cores": usable_cores(), "load": os.getloadavg()[0]}
    if not arguments.json:
        for facts in results:
            print(f"{facts['bundle']} ({facts['precision']}), {facts['rounds']} rounds, a PNG of {SIZE[1]}x{SIZE[0]}")
            for way, row in facts["ways"].items():
                print(
                    f"  {way:22} {row['first_token_ms']:9.1f} ms ({row['lowest']:.1f} to {row['highest']:.1f}),"
                    f" {row['of_first']:7.1%} of the first,"
                    f" {row['cached_tokens']} of {row['prompt_tokens']} tokens cached"
                )
    print(json.dumps({"second_question": results, "machine": machine, "versions": versions()}))


if __name__ == "__main__":
    main()
