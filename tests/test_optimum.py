"""`optimum-cli export siglance`, from an editable install and from the wheel."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from siglance.engine.bundle import Bundle

from . import tiny
from .test_packaging import build_wheel

pytestmark = pytest.mark.parity

CLI = ("-P", "-m", "optimum.commands.optimum_cli")
# Without `site` no .pth file is read, so the wheel does not meet the editable install.
WHEEL_CLI = """
import runpy, sys
sys.path[:0] = {path!r}
import siglance.engine
assert siglance.engine.__file__.startswith({path!r}[0]), "this test would say nothing about the wheel"
sys.argv[0] = "optimum-cli"
runpy.run_module("optimum.commands.optimum_cli", run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def _optimum():
    try:
        importlib.metadata.version("optimum")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("optimum is not installed: pip install -e '.[optimum]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.write_gemma3(folder)
    return folder


@pytest.fixture(scope="module", params=["installed", "wheel"])
def optimum_cli(request, tmp_path_factory):
    """Runs optimum-cli with siglance as it is installed here (editable, usually), or with its wheel instead."""
    command = [sys.executable, *CLI]
    if request.param == "wheel":
        target = tmp_path_factory.mktemp("target")
        wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
        subprocess.run(install, check=True)
        path = [str(target), *(entry for entry in sys.path if Path(entry).name == "site-packages")]
        command = [sys.executable, "-S", "-P", "-c", WHEEL_CLI.format(path=path)]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, arguments)], cwd="/", check=False, capture_output=True, text=True)

    return run


def test_the_command_is_listed_beside_those_of_optimum(optimum_cli):
    done = optimum_cli("export", "--help")
    assert done.returncode == 0, done.stderr
    assert "siglance" in done.stdout
    assert "env" in optimum_cli("--help").stdout


def test_export(optimum_cli, checkpoint, tmp_path):
    arguments = ("--precision", "fp32", "--target", "cpu", "--context", 256)
    done = optimum_cli("export", "siglance", "--model", checkpoint, *arguments, tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.family, manifest.precision, manifest.context) == ("gemma3", "fp32", 256)
    assert "decoder" in done.stdout


def test_an_error_is_one_line(optimum_cli, checkpoint, tmp_path):
    done = optimum_cli("export", "siglance", "-m", tmp_path / "nowhere", tmp_path / "bundle")
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("siglance: ")
    assert "nowhere" in line
    assert not (tmp_path / "bundle").exists()
    done = optimum_cli("export", "siglance", "-m", checkpoint, "--revision", "x", tmp_path / "bundle")
    assert "revision" in done.stderr
