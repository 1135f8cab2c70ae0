"""Fixtures shared by all tests: tiny random checkpoints exported once per session."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.runtime import Runtime
from siglance.export import calibration_run, child, exporter
from siglance.export.exporter import export

from . import tiny, tiny_gemma4_audio, tiny_gemma4_large, tiny_siglip


@dataclass(frozen=True)
class TinyModel:
    """A tiny random checkpoint, and the bundle exported from it."""

    checkpoint: Path
    bundle: Bundle
    runtime: Runtime


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests neither read nor write the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGLANCE_HOME", str(tmp_path_factory.mktemp("siglance-home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _exact_exports():
    """Exports of tests that do not name a precision are exact; tests/test_calibration.py looks at the real default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "DEFAULT_PRECISION", "fp32")
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_child_processes():
    """Exports of tests do in this process what others do in child processes, which take nine tenths of their time.

    Tests of the processes themselves ask for `child_processes`; what runs in a subprocess of a test has them anyway.
    """

    def in_process(function: Callable[..., Any], *arguments: Any, progress: Callable[[str], None] | None = None) -> Any:
        given = json.loads(json.dumps(arguments))
        reply = json.loads(json.dumps(child.call(function, *given, *([] if progress is None else [progress]))))
        if "error" in reply:
            raise ExportError(reply["error"])
        return reply["result"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "in_child", in_process)
        yield


@pytest.fixture
def brief_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration runs an eighth of its tokens: for tests of something else than the matrices that it finds."""
    monkeypatch.setattr(calibration_run, "_TOKENS_PER_COLUMN", 1)
    monkeypatch.setattr(calibration_run, "_FEWEST_TOKENS", 128)


@pytest.fixture
def child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter starts child processes, as it does outside of tests."""
    monkeypatch.setattr(exporter, "in_child", child.in_child)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """A function (writer name, **arguments of the writer) -> TinyModel; equal arguments give the same model."""
    made: dict[str, TinyModel] = {}

    def make(family: str, **arguments: object) -> TinyModel:
        key = repr((family, sorted(arguments.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            checkpoint = folder / "checkpoint"
            name = f"write_{family}"
            writers = {**vars(tiny_siglip), **vars(tiny_gemma4_audio), **vars(tiny_gemma4_large), **vars(tiny)}
            writers[name](checkpoint, **arguments)
            export(checkpoint, folder / "bundle")
            bundle = Bundle.open(folder / "bundle")
            made[key] = TinyModel(checkpoint, bundle, Runtime(bundle))
        return made[key]

    return make
