"""Child processes of the exporter: what they return, what they raise, and what is said when they die."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from siglance.engine.errors import ExportError
from siglance.export.child import in_child

WORK = """
import os, signal
from siglance.engine.errors import BundleError, ExportError

def doubled(value, report):
    report("first"), report("second")
    return {"twice": [2 * number for number in value], "process": os.getpid()}

def refuse(name):
    raise ExportError(f"{name} cannot be exported")

def break_bundle():
    raise BundleError("no logits")

def fail():
    raise RuntimeError("out of cheese")

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> ModuleType:
    """A module that a child process can import too."""
    folder = tmp_path_factory.mktemp("work")
    path = folder / "work_of_a_child.py"
    path.write_text(WORK)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield module


def test_values_and_stages_travel(work):
    stages: list[str] = []
    found = in_child(work.doubled, [1, 2.5], progress=stages.append)
    assert (found["twice"], stages) == ([2, 5.0], ["first", "second"])
    assert found["process"] != work.os.getpid()


def test_an_error_keeps_its_message(work):
    with pytest.raises(ExportError, match=r"^x cannot be exported$"):
        in_child(work.refuse, "x")


def test_an_error_of_the_engine_is_about_the_new_bundle(work):
    with pytest.raises(ExportError, match=r"^the exported bundle does not run: no logits$"):
        in_child(work.break_bundle)


def test_a_failure_gives_its_last_line(work):
    with pytest.raises(ExportError, match=r"^fail failed: RuntimeError: out of cheese$"):
        in_child(work.fail)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that cannot be handled")
def test_a_killed_process_hints_at_memory(work):
    with pytest.raises(ExportError, match=r"^die was killed; is there enough memory"):
        in_child(work.die)
