"""Run the parity tests and print, for each layout, how far the exported graphs are from transformers.

    python -P benchmarks/parity_table.py [--report FILE] [PYTEST ARGUMENTS]

A layout is a family at one size in small: a random checkpoint saved by transformers. Figures are the largest absolute
differences that the tests record, over all rows and tokens: of the log-mel features of sounds; of soft tokens; of
logits of prompts with no, one and two pictures, with frames of a video, and with sounds, run at once; of logits with a
cache (prompts cut into chunks, and steps of an answer), which transformers recomputes for the whole sequence.
`--report` reads the JUnit report of an earlier run instead. Exits with the status of the tests.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
COUNTS = ("no picture", "one picture", "two pictures")
COLUMNS = ("features", "soft tokens", *COUNTS, "video", "sounds", "cached", "greedy ids")
# Tests that say nothing about their number of pictures.
TESTS = {"test_text_logits": 0, "test_a_text_only_checkpoint": 0}
# A test of one layout that has no parameter for it.
ONLY = {
    "test_a_text_only_checkpoint": "gemma4_26b_text",
    "test_log_mel_frames": "gemma4_e2b_audio",
    "test_transformers_rounds_loud_tones": "gemma4_e2b_audio",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="a JUnit report of the parity tests, of the form xunit1")
    arguments, others = parser.parse_known_args()
    if arguments.report is not None:
        print("\n".join(table(arguments.report)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "parity.xml"
        # -P: the folders of the repository must not hide packages that transformers imports.
        pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "parity"]
        # The default form of reports has no place for what tests record.
        command = [*pytest, "-o", "junit_family=xunit1", f"--junitxml={report}", *others]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if report.is_file():
            print("\n".join(table(report)))
    return status


def table(report: Path) -> list[str]:
    """A Markdown table of the differences recorded in a JUnit report, and what they were measured with."""
    rows: dict[str, dict[str, float | bool]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name, _, parameters = case.get("name", "").partition("[")
        layout = ONLY.get(name) or layout_of(parameters)
        passed = not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped"))
        if name.startswith("test_greedy_ids"):
            rows.setdefault(layout, {})["greedy ids"] = passed
        for item in case.iter("property"):
            column = column_of(item.get("name", ""), name, count_of(name, parameters))
            if column is None:
                continue
            row = rows.setdefault(layout, {})
            row[column] = max(float(item.get("value", "nan")), row.get(column, 0.0))
    lines = ["| layout | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {layout} | " + " | ".join(written(row.get(column)) for column in COLUMNS) + " |"
        for layout, row in sorted(rows.items())
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnxruntime", "transformers", "torch"))
    return [*lines, "", f"float32 on a CPU, {versions}; the tests allow 1e-4 for soft tokens and 1e-3 for logits."]


def layout_of(parameters: str) -> str:
    """The layout among the parameters of a test, "gemma3_4b-2]": the one that is no number."""
    return next((part for part in re.split(r"[\]-]", parameters) if part and not part.isdigit()), "")


def count_of(test: str, parameters: str) -> int | None:
    """Number of pictures of a test: what its name says, or its parameter that is a number."""
    numbers = [int(part) for part in re.split(r"[\]-]", parameters) if part.isdigit()]
    return numbers[0] if numbers else TESTS.get(test)


def column_of(name: str, test: str, count: int | None) -> str | None:
    """The column of a recorded difference; a prompt of one chunk is run at once, 512 tokens hold all prompts.

    None if it is no difference of a graph: of the reference, or what transformers' own float32 loses.
    """
    if name.startswith(("reference", "rounding")):
        return None
    for column in ("features", "soft tokens"):
        if name.startswith(column):
            return column
    if name == "frames":
        return "video"
    at_once = name in ("all rows", "chunk 512", "logits, chunk 512")
    if at_once and test == "test_logits_of_text_pictures_and_sounds":
        return "sounds"
    return COUNTS[count] if at_once and count is not None else "cached"


def written(value: float | bool | None) -> str:
    if value is None:
        return "-"
    return ("equal" if value else "DIFFER") if isinstance(value, bool) else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
