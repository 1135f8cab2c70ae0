"""What a stranger gets: the wheel in an empty environment, with nothing but its own requirements."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .test_packaging import build_wheel

pytestmark = pytest.mark.install

MAX_INSTALL_BYTES = 250_000_000
SCENE = Path(__file__).parent / "data" / "scene.png"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh virtual environment with siglance[cpu] from the wheel."""
    folder = tmp_path_factory.mktemp("install")
    wheel = build_wheel(folder / "wheel")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[cpu]"], check=True)
    return folder / "venv", installed_bytes(folder / "venv")


def installed_bytes(environment: Path) -> int:
    """All files of the packages, compiled ones too; what a new environment has already is left out."""
    [packages] = environment.glob("lib/python*/site-packages")
    there_before = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    return sum(
        path.lstat().st_size
        for folder in packages.iterdir()
        if not folder.name.startswith(there_before)
        for path in ([folder] if folder.is_file() else folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    )


def test_install_size(environment):
    print(f"runtime install: {environment[1] / 1e6:.0f} MB")
    assert environment[1] < MAX_INSTALL_BYTES


def test_neither_torch_nor_onnx_is_installed(environment):
    listed = subprocess.run(
        [environment[0] / "bin" / "python", "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "onnxruntime" in names
    assert not names & {"torch", "onnx", "transformers", "onnx-ir"}


def test_the_program_answers_about_a_picture(environment, tmp_path):
    program = environment[0] / "bin" / "siglance"
    command = [program, "run", "-i", SCENE, "-p", "detect all", "--json", "--draw", tmp_path / "boxes.png"]
    variables = {**os.environ, "SIGLANCE_HOME": str(tmp_path / "home")}
    walls = []
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path, env=variables)
        walls.append(time.perf_counter() - begin)
    print(f"siglance run on the demo: median {statistics.median(walls):.2f} s of {[round(wall, 2) for wall in walls]}")
    reply = json.loads(done.stdout)
    assert reply["boxes"]
    assert (tmp_path / "boxes.png").stat().st_size > 1000


def test_import_time(environment):
    """Printed, not judged: machines differ. The import must at least work."""
    code = "import time; begin = time.perf_counter(); import siglance.engine; print(time.perf_counter() - begin)"
    python = environment[0] / "bin" / "python"
    seconds = [
        float(subprocess.run([python, "-c", code], capture_output=True, check=True, cwd="/").stdout) for _ in range(7)
    ]
    print(
        f"import siglance.engine: median {statistics.median(seconds):.2f} s of {[round(value, 2) for value in seconds]}"
    )


def test_export_without_its_extra_says_what_to_install(environment, tmp_path):
    done = subprocess.run(
        [environment[0] / "bin" / "siglance", "export", tmp_path, "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "siglance[export]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
