"""The wheel holds what the tree holds: an explicit package list leaves subpackages and data out without a word."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "export", "kernels")
NOT_SHIPPED = ("__pycache__", "README.md")
MAX_WHEEL_BYTES = 12_000_000


def build_wheel(target: Path) -> Path:
    """Build from a copy of the tree, without the network and without leaving build folders in the tree."""
    source = target / "source"
    source.mkdir(parents=True)
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source]
    subprocess.run(command, check=True, cwd=target)
    [wheel] = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def place(name: str) -> str:
    """Where a file of the tree lies in the wheel."""
    head, own, tail = name.partition("export/optimum/")
    return f"optimum/commands/register/{tail}" if own and not head else f"siglance/{name}"


def test_the_wheel_has_every_file_of_the_tree(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        place(path.relative_to(ROOT).as_posix())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not any(part in NOT_SHIPPED for part in path.parts)
    }
    assert shipped == expected


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_names_the_program(wheel):
    archive = zipfile.ZipFile(wheel)
    [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "siglance = siglance.engine.cli:main" in archive.read(entry_points).decode()
