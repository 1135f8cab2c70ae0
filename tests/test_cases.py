"""The table of public bug reports: each has its line, and the tests that a line names are there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Numbers are not contiguous.
CASES = (
    *(1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 31, 33, 34, 35),
    *(37, 38, 40, 41, 42, 43, 44, 46, 47, 48, 49, 51, 52, 53, 56, 57, 58, 59, 61, 63, 64, 65, 66, 67, 68, 70, 72, 73),
    *(74, 75, 79, 82, 83, 84, 85, 86, 87, 88),
)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (HERE / "CASES.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ ", line)
]


@functools.cache
def functions_in(path: Path) -> set[str]:
    """The functions of a file that pytest would collect, in classes too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
    return found


def test_every_case_has_one_line():
    assert [int(row[0]) for row in ROWS] == sorted(CASES)
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_of_a_case_exist(row):
    _, reports, kind, tests = row
    assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*", reports)
    assert kind
    named = re.findall(r"`([^`]*)`", tests)
    assert named
    assert len(named) == len(set(named))
    for name in named:
        file, _, function = name.partition("::")
        assert file.endswith(".py")
        assert (HERE / file).is_file(), file
        assert function in functions_in(HERE / file), name
    rest = re.sub(r"`[^`]*`", "", tests).strip()
    assert re.fullmatch(r"(\([^()]+\))?", rest), rest


def test_docstrings_speak_of_cases_that_there_are():
    """A number that a test gives is in the table."""
    for path in HERE.rglob("test_*.py"):
        if path == Path(__file__):
            continue
        for match in re.finditer(r"\b[Cc]ases? (\d+)((?:, \d+)*(?:,? and \d+)?)", path.read_text(encoding="utf-8")):
            numbers = [int(number) for number in re.findall(r"\d+", match.group())]
            assert set(numbers) <= set(CASES), (path.name, match.group())
