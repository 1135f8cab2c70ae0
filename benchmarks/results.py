"""RESULTS.md from the results that the benchmarks have left in benchmarks/results.

    python benchmarks/results.py

Each section says which command fills it; what is not there yet is said. Ratios are medians over rounds in which both
engines ran, one after the other. A goal that is missed is called missed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import first_token
import last_row
import long_context

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))

import run as peers  # noqa: E402 - from the folder that was just named
import vision  # noqa: E402

RESULTS = HERE / "results"
LLAMA, LLAMA_BEST, GENAI = "llama.cpp Q4_0", "llama.cpp Q4_K_M", "onnxruntime-genai int4"
_OURS = "siglance"
_COMMANDS = {
    "peers": (
        'python benchmarks/peers/run.py --checkpoint CHECKPOINT --gguf Q4_K_M.gguf --bundle "siglance int4"=INT4 '
        '--bundle "siglance auto"=AUTO --engine "llama.cpp Q4_0" --engine "llama.cpp Q4_0, 8-bit embedding" '
        '--engine "llama.cpp Q4_K_M" --engine "onnxruntime-genai int4" --rounds 5 --out benchmarks/results/peers'
    ),
    "perplexity": (
        "python benchmarks/peers/run.py --checkpoint CHECKPOINT --gguf Q4_K_M.gguf --bundle NAME=BUNDLE... "
        "--rounds 0 --text /usr/share/common-licenses/GPL-3 --out benchmarks/results/perplexity"
    ),
    "slow": (
        'python benchmarks/peers/run.py --checkpoint CHECKPOINT --gguf Q4_K_M.gguf --bundle "siglance fp32"=FP32 '
        '--engine "transformers fp32" --engine "transformers bf16" --baseline "transformers fp32" --rounds 3 '
        "--new-tokens 32 --out benchmarks/results/slow"
    ),
    "optimum": (
        'python benchmarks/peers/run.py --checkpoint CHECKPOINT --gguf Q4_K_M.gguf --bundle "siglance fp32"=FP32 '
        '--engine "optimum-onnx fp32" --baseline "optimum-onnx fp32" --rounds 3 --new-tokens 32 '
        "--out benchmarks/results/optimum"
    ),
    "bench-int4": "siglance bench INT4 --json > benchmarks/results/bench-int4.json",
    "bench-int4-1024": "siglance bench INT4 --prompt-tokens 1024 --json > benchmarks/results/bench-int4-1024.json",
    "bench-e2b": (
        "siglance bench E2B --image-tokens 280 --prompt-tokens 320 --new-tokens 32 --repeats 3 --json "
        "> benchmarks/results/bench-e2b.json"
    ),
    "structured": "python -P benchmarks/structured.py demo --scenes 60 --json > benchmarks/results/structured.json",
    "long_context": "python -P benchmarks/long_context.py INT4 --out benchmarks/results/long_context",
    "last_row": "python -P benchmarks/last_row.py E2B --out benchmarks/results/last_row",
    "vision": (
        "python benchmarks/peers/vision.py --tower google/gemma-4-E2B-it=E2B "
        "--tower google/paligemma-3b-mix-224=PALIGEMMA --out benchmarks/results/vision"
    ),
    "first_token": "python -P benchmarks/first_token.py demo E2B --rounds 3 --out benchmarks/results/first_token",
}
_HEAD = """# Results

Written by `python benchmarks/results.py` from the files in `benchmarks/results`; do not edit. Each section names the
command that fills it; [NOTES.md](NOTES.md) says what was tried and why. Machines differ and neighbours are noisy, so
only ratios within one run mean much.

`CHECKPOINT` and `Q4_K_M.gguf` are Gemma 3 270M as `make test-real` downloads it; `INT4`, `AUTO` and `FP32` are its
bundles, by `siglance export CHECKPOINT --precision P`; `E2B` is `siglance export google/gemma-4-E2B-it --random
--precision int4 --context 4096`, `PALIGEMMA` is `siglance export google/paligemma-3b-mix-224 --random --precision
int4`.
"""


def main() -> None:
    for path in RESULTS.glob("bench-*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["bundle"].pop("folder", None) is not None:  # where a bundle lies is nobody's business
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sections = [_HEAD.strip(), *(section() for section in SECTIONS)]
    (HERE / "RESULTS.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any] | None:
    """A file of results, None if it was not made yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def command(name: str) -> str:
    return f"    {_COMMANDS[name]}"


def table(name: str, markdown: Callable[[dict[str, Any]], str]) -> str:
    """The command, and the table that the benchmark writes of its results."""
    found = read(name)
    if found is None:
        return f"{command(name)}\n\nNot measured yet."
    return "\n\n".join(filter(None, [command(name), remark(name), markdown(found).strip()]))


def goal(what: str, value: float | None, wanted: float, unit: str = "x", *, most: bool = False) -> str:
    """A row of a table of goals. `most` is for what must stay below."""
    limit = f"{'under' if most else 'at least'} {wanted:g}{unit}"
    if value is None:
        return f"| {what} | {limit} | not measured |"
    reached = value < wanted if most else value >= wanted
    number = f"{value:.2f}" if unit == "x" else f"{value:.0f}"
    return f"| {what} | {limit} | {number}{unit} {'reached' if reached else '**missed**'} |"


def goals(*rows: str) -> str:
    return "\n".join(["| what | goal | result |", "|---|---|---|", *rows])


def ratio(found: dict[str, Any], what: str, tokens: int, ours: str, theirs: str) -> float | None:
    """The median over common rounds of our speed over another's."""
    speeds: dict[str, dict[int, float]] = {ours: {}, theirs: {}}
    for one in found["runs"]:
        if one["engine"] in speeds and one["prompt_tokens"] == tokens:
            speeds[one["engine"]][one["round"]] = one[what]
    own, other = speeds[ours], speeds[theirs]
    ratios = [own[round] / other[round] for round in own if round in other]
    return statistics.median(ratios) if ratios else None


def all_peers() -> dict[str, Any] | None:
    """The runs beside other engines, with the perplexities that were measured apart."""
    found, scores = read("peers"), read("perplexity")
    if found is not None and scores is not None:
        for name, facts in scores["engines"].items():
            if name in found["engines"] and "perplexity" in facts:
                found["engines"][name]["perplexity"] = facts["perplexity"]
    return found


def fastest(found: dict[str, Any], worst: float) -> str | None:
    """The bundle of ours that decodes fastest among those of at most that perplexity."""
    names = [
        name
        for name, facts in found["engines"].items()
        if name.startswith(_OURS) and facts.get("perplexity", worst + 1) <= worst
    ]

    def speed(name: str) -> float:
        return statistics.median(one["decode"] for one in found["runs"] if one["engine"] == name)

    return max(names, key=speed, default=None)


def speed_section() -> str:
    found = all_peers()
    lines = ["## 1 and 2. Decode, prefill and memory beside other engines", command("peers"), command("perplexity")]
    if found is None:
        return "\n\n".join([*lines, "Not measured yet."])
    limit = found["engines"][LLAMA].get("perplexity", 23.35)
    ours = fastest(found, limit)
    assert ours is not None
    rows = []
    for tokens in (512, 1024):
        for other, wanted in ((LLAMA, 1.1), (GENAI, 1.3)):
            rows.append(goal(f"decode after {tokens}, to {other}", ratio(found, "decode", tokens, ours, other), wanted))
    for tokens in (512, 1024):
        for other, wanted in ((LLAMA, 1.2), (GENAI, 2.5)):
            rows.append(goal(f"prefill {tokens}, to {other}", ratio(found, "prefill", tokens, ours, other), wanted))
    rows.append(goal("resident after 1,024", found["engines"][ours].get("resident_mb"), 450, " MB", most=True))
    for tokens, name in ((512, "bench-int4"), (1024, "bench-int4-1024")):
        one = read(name)
        share = None if one is None else one["decode"]["percent_of_limit"]
        rows.append(goal(f"decode after {tokens}, of this machine's limit", share, 65, " %"))
    facts = found["engines"][ours]
    lines += [
        f"`{ours}` has the perplexity {facts['perplexity']:.2f}, {LLAMA} {limit:.2f}. {remark('peers')}",
        goals(*rows),
        peers.markdown(found).strip(),
        "The limit is the slower of bytes over bandwidth and operations over GEMV rate, by `siglance bench`:",
        "\n".join([command("bench-int4"), command("bench-int4-1024")]),
        limits_table(),
        "Resident is VmRSS of the worker's process after its rounds, anonymous what of it is no mapped file (RssAnon), "
        "peak VmHWM, for all engines alike.",
        "Full-precision peers, in runs of their own:",
        table("slow", peers.markdown),
        table("optimum", peers.markdown),
    ]
    return "\n\n".join(lines)


def limits_table() -> str:
    columns = (
        "prompt | decode tok/s | limit | of it | bound by | bytes a step | read GB/s | prefill tok/s | of its limit"
    )
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    for name in ("bench-int4", "bench-int4-1024"):
        one = read(name)
        if one is None:
            continue
        decode, prefill, reads = one["decode"], one["prefill"], one["rates"]["read_spread"]
        lines.append(
            f"| {one['options']['prompt_tokens']} | {decode['tokens_per_second']:g} ({decode['min']:g} - "
            f"{decode['max']:g}) | {decode['limit']['tokens_per_second']:g} | {decode['percent_of_limit']:.0f} % | "
            f"{decode['limit']['bound_by']} | {one['bytes']['per_decode_token'] / 1e6:.0f} MB | "
            f"{reads['median']:g} ({reads['min']:g} - {reads['max']:g}) | {prefill['tokens_per_second']:g} | "
            f"{prefill['percent_of_limit']:.0f} % |"
        )
    return "\n".join(lines)


def repeats_section() -> str:
    lines = ["### Replies that repeat: forced tokens", command("structured")]
    found = read("structured")
    if found is None:
        return "\n\n".join([*lines, "Not measured yet."])
    lines += [
        *filter(None, [remark("structured")]),
        f"Lists of boxes by the embedded demo, {found['scenes']} scenes, each freely and by a grammar in turns: "
        f"{found['forced_share']:.1%} of {found['tokens']} tokens are forced and run in one pass with the next; a "
        f"reply takes {found['structured_ms']:.1f} ms by the grammar and {found['free_ms']:.1f} ms freely, "
        f"{found['ratio']:.2f} times as long (median of pairs). {found['valid']} of {found['scenes']} replies are "
        f"valid, {found['same_text']} say the same as the free one. {found['machine']}.",
        "There is no speculative decoding (by looking up what the prompt or the reply says, or by a draft model): no "
        "figure is claimed for it.",
    ]
    return "\n\n".join(lines)


def long_section() -> str:
    return "### Decode behind 8,192 tokens\n\n" + table("long_context", long_context.markdown)


def last_row_section() -> str:
    lines = ["## 3. Gemma 4 E2B shape: the last row alone", table("last_row", last_row.markdown)]
    lines += ["Time to the first token by stage, a whole request with a 1920x1080 JPEG:", command("bench-e2b")]
    found = read("bench-e2b")
    if found is None:
        return "\n\n".join([*lines, "Not measured yet."])
    lines += filter(None, [remark("bench-e2b")])
    stages = found["ttft_ms"]
    names = [name for name in stages if isinstance(stages[name], int | float) and name not in ("prompt_tokens",)]
    lines.append(
        "\n".join(
            [
                f"| prompt tokens | {' | '.join(name.replace('_', ' ') for name in names)} |",
                "|---" * (len(names) + 1) + "|",
                f"| {stages['prompt_tokens']} | {' | '.join(f'{stages[name]:g} ms' for name in names)} |",
            ]
        )
    )
    lines.append(_surroundings(found))
    return "\n\n".join(lines)


def vision_section() -> str:
    lines = ["## 4. Vision towers"]
    found, bench = read("vision"), read("bench-e2b")
    rows = []
    for tower in found["towers"] if found else ():
        own = tower["seconds"][vision.OURS]
        for name in vision.PEERS:
            both = zip(own, tower["seconds"][name], strict=True)
            value = statistics.median(other / ours for ours, other in both)
            rows.append(goal(f"{tower['model']}, {tower['soft_tokens']} tokens, to {name}", value, 1.3))
    lines += [*([goals(*rows)] if rows else []), table("vision", vision.markdown)]
    if bench is not None and bench["vision"]:
        one = bench["vision"]
        lines.append(
            f"Of the GEMM peak that `siglance bench` measures on this machine, the E2B tower reaches "
            f"{one['percent_of_limit']:.0f} % ({one['tokens_per_second']:g} of {one['limit']['tokens_per_second']:g} "
            f"soft tokens a second at a budget of {bench['options']['image_tokens']}, bound by "
            f"{one['limit']['bound_by']})."
        )
    return "\n\n".join(lines)


def overhead_section() -> str:
    lines = ["## 5. Time outside of kernels", command("bench-int4")]
    found = read("bench-int4")
    if found is None:
        return "\n\n".join([*lines, "Not measured yet."])
    outside = found["decode"]["outside_kernels"]
    operators = ", ".join(f"{name} {ms:.2f}" for name, ms in list(outside["by_operator_ms"].items())[:8])
    lines += [
        goals(goal("of a decode step, Python and runtime", outside["percent"], 10, " %", most=True)),
        f"A step takes {outside['step_ms']:g} ms: {outside['kernels_ms']:g} in {outside['nodes']} kernels, "
        f"{outside['runtime_ms']:g} in the runtime around them, {outside['python_ms']:g} in Python. By operator, in "
        f"milliseconds: {operators}.",
        _surroundings(found),
    ]
    return "\n\n".join(lines)


def start_section() -> str:
    return "## 6. Starting and loading\n\n" + table("first_token", first_token.markdown)


def frontier_section() -> str:
    lines = ["## 7. Perplexity against speed"]
    lines.append(
        "    python benchmarks/frontier.py benchmarks/results/peers.json benchmarks/results/frontier.svg "
        "--perplexity benchmarks/results/perplexity.json"
    )
    found, scores = all_peers(), read("perplexity")
    if found is None or scores is None:
        return "\n\n".join([*lines, "Not measured yet."])
    exact = scores["engines"]["siglance fp32"]["perplexity"]
    ours = fastest(found, 1.06 * exact)
    value = None if ours is None else ratio(found, "decode", 512, ours, LLAMA_BEST)
    lines.append(goals(goal(f"{ours}, decode after 512, to {LLAMA_BEST}", value, 1.2)))
    rows = ["| engine | perplexity | of fp32 | decode after 512 |", "|---|---|---|---|"]
    named = {name: facts["perplexity"] for name, facts in scores["engines"].items() if "perplexity" in facts}
    for name, perplexity in sorted(named.items(), key=lambda item: item[1]):
        speeds = [one["decode"] for one in found["runs"] if one["engine"] == name and one["prompt_tokens"] == 512]
        speed = f"{statistics.median(speeds):.0f} tok/s" if speeds else "-"
        rows.append(f"| {name} | {perplexity:.2f} | {perplexity / exact:.3f} | {speed} |")
    lines += ["\n".join(rows), "![perplexity against decode speed](results/frontier.svg)"]
    return "\n\n".join(lines)


def remark(name: str) -> str:
    """Which state of the repository was measured and what else is to be known, as remarks.json says."""
    return (read("remarks") or {}).get(name, "")


def _surroundings(facts: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['machine']['cpu']}, {facts['threads']} threads, {facts['machine']['platform']}; {known}."


SECTIONS = (
    speed_section,
    repeats_section,
    long_section,
    last_row_section,
    vision_section,
    overhead_section,
    start_section,
    frontier_section,
)


if __name__ == "__main__":
    main()
