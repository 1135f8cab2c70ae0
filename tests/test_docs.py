"""The README is executed: its Python runs, its commands work, its links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from siglance.engine import cli

from .server.running import serving

ROOT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8000"  # where `siglance serve` listens, and examples ask
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with the picture that the README talks about."""
    shutil.copy(ROOT / "tests" / "data" / "scene.png", tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_blocks_run(index, desk, capsys):
    text = blocks("python")[index]
    with contextlib.ExitStack() as around:
        if ADDRESS in text:
            engine = around.enter_context(cli.Engine.open())
            text = text.replace(ADDRESS, around.enter_context(serving(engine)).url)
        exec(compile(text, f"README.md, Python block {index}", "exec"), {})
    expected = re.findall(r"# prints (.+)", blocks("python")[index])
    printed = capsys.readouterr().out
    for line in expected:
        assert line in printed


COMMANDS = [
    line
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("$ siglance ") and "CHECKPOINT" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, desk, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(line.removeprefix("$ ")))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code in (0, None)


def test_shown_output_is_real(desk, monkeypatch, capsys):
    """Lines under a command are what it prints."""
    shown = {}
    for block in blocks("console"):
        command = None
        for line in block.splitlines():
            if line.startswith("$ "):
                command = line
                shown[command] = []
            elif command is not None:
                shown[command].append(line)
    checked = 0
    for command, lines in shown.items():
        if command not in COMMANDS or not lines:
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(command.removeprefix("$ ")))
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().out.splitlines() == lines, command
        checked += 1
    assert checked


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_relative_links_exist(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("package", ["engine", "export"])
def test_the_map_of_a_package_names_its_modules(package):
    """For those who read the code: what each module is for, and none that is gone."""
    named = set(re.findall(r"`([a-z_0-9]+)`", ast.get_docstring(ast.parse(source_of(package))) or ""))
    there = {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}
    there |= {path.parent.name for path in (ROOT / package).glob("*/*.py")}
    whole = {name for name in there if name.startswith("calibration_")}  # one entry for all of them
    assert there - named - whole == set()
    assert {name for name in named if "_" in name} <= there | {"model_type"}


def source_of(package: str) -> str:
    return (ROOT / package / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__")
)
def test_the_table_of_kernels_names_each_module(name):
    assert f"`{name}.py`" in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_the_options_of_run_are_all_in_the_readme():
    """The option table and `siglance run --help` name the same options."""
    from typer.main import get_command

    run = get_command(cli.app).commands["run"]
    options = {name for parameter in run.params for name in parameter.opts if name.startswith("--")} - {"--help"}
    assert options <= set(re.findall(r"`(--[a-z-]+)", README))
