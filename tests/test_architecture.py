"""Who may import whom, and what a public module promises."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 420
STANDARD = set(sys.stdlib_module_names) | {"__future__"}

# Folder -> what its modules may import: third-party packages, and modules of the other folders.
ALLOWED = {
    "kernels": {"numpy"},
    "engine": {"numpy", "tokenizers", "PIL", "jinja2", "siglance.kernels"},
    "export": {
        *("numpy", "onnx_ir", "safetensors", "gguf", "huggingface_hub", "siglance.kernels"),
        *("siglance.engine.errors", "siglance.engine.manifest"),
    },
    "export/demo": {"numpy", "PIL", "tokenizers", "siglance.engine.errors"},
    "engine/server": {"starlette", "siglance.kernels"},
}
# Single modules that may do more, and why.
EXCEPTIONS = {
    "engine/graph.py": {"onnxruntime"},  # the one place that sees it
    "engine/cli.py": {"typer", "siglance.export.exporter", "siglance.export.families"},  # the export command's body
    "engine/grammar.py": {"llguidance"},  # structured replies, imported when one is asked for
    "engine/chat_command.py": {"rich"},  # notes beside the replies
    "engine/bench/report.py": {"rich"},  # tables
    "engine/options.py": {"typer"},
    "engine/output.py": {"rich"},  # progress
    "engine/server/metrics.py": {"prometheus_client"},
    "engine/server/command.py": {"uvicorn"},
    "engine/server/patience.py": {"h11", "uvicorn"},  # uvicorn's connections, and the parser that comes with it
    "engine/server/long_texts.py": {"numpy"},  # quotes in megabytes of text
    "engine/pdf_worker.py": {"pypdfium2"},  # runs in a process of its own
    "engine/audio_worker.py": {"av"},  # so does this
    "engine/video_worker.py": {"av"},
    "export/demo/checkpoint.py": {"transformers"},  # compares the training code with the official model
    "export/calibration_corpus.py": {
        "tokenizers",
        "siglance.engine.template",
    },  # lays conversations out as the model does
    "export/exporter.py": {"siglance.engine.template"},  # refuses what no engine would open
    "export/piecewise.py": {"siglance.engine.graph"},  # calibration runs the float32 model
    "export/graph_losses.py": {  # so does the comparison of a new bundle with it
        *("siglance.engine.bundle", "siglance.engine.device_memory", "siglance.engine.graph"),
        *("siglance.engine.image_policy", "siglance.engine.self_test", "siglance.engine.state"),
    },
    "export/self_check.py": {
        "tokenizers",
        "siglance.engine.bundle",
        "siglance.engine.self_test",
    },  # runs the new bundle
}
TRAINING = {"torch", "safetensors"}  # modules of the demo that only training imports
# Installed under optimum's name and imported by optimum only: tests/test_optimum.py.
GUESTS = ROOT / "export" / "optimum"
MODULES = sorted(
    path
    for folder in ("engine", "export", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if GUESTS not in path.parents
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Absolute names of everything a module imports, in functions too; standard library left out."""
    package = ["siglance", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.add(node.module or "")
                continue
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module.split(".") if node.module else [])]
            # "from . import x" and "from ..kernels import x" import modules
            names = [alias.name for alias in node.names]
            found |= (
                {".".join([*module, name]) for name in names}
                if len(module) < 3 or not node.module
                else {".".join(module)}
            )
    return {name for name in found if name.split(".")[0] not in STANDARD}


def allowed(name: str, rules: set[str]) -> bool:
    return any(name == rule or name.startswith(f"{rule}.") for rule in rules)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_table(path):
    name = name_of(path)
    part = "/".join(name.split("/")[:2])
    folder = part if part in ALLOWED else name.split("/")[0]
    own = f"siglance.{name.split('/')[0]}"
    rules = ALLOWED[folder] | EXCEPTIONS.get(name, set()) | {own}
    if folder == "export/demo":
        rules |= TRAINING
    if folder == "export":
        rules -= {own}
        rules |= {"siglance.export"}
    wrong = {imported for imported in imports(path) if not allowed(imported, rules)}
    assert not wrong


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_needed(name):
    found = imports(ROOT / name)
    assert [rule for rule in EXCEPTIONS[name] if not any(allowed(imported, {rule}) for imported in found)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_our_own_modules_are_imported_relatively(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("siglance"))
        or (isinstance(node, ast.Import) and node.names[0].name.startswith("siglance"))
    ]
    assert not absolute


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_torch_is_for_training_only():
    users = {name_of(path) for path in MODULES if allowed_any(imports(path), {"torch", "transformers"})}
    assert all(name.startswith("export/demo/") for name in users)
    for name in ("scenes", "tokenizer", "evaluate", "tasks"):
        assert f"export/demo/{name}.py" not in users


def allowed_any(names: set[str], rules: set[str]) -> bool:
    return any(allowed(name, rules) for name in names)


def test_the_runtime_imports_neither_torch_nor_onnx():
    code = "import sys, siglance.engine, siglance.engine.cli; print([n for n in sys.modules if '.' not in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(ast.literal_eval(done.stdout))
    assert "onnxruntime" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "safetensors",
        "ml_dtypes",
        "pypdfium2",
        "av",
        "pytest",
    }


@pytest.mark.parametrize("path", [path for path in MODULES if not name_of(path).startswith("export/demo")], ids=name_of)
def test_all_lists_what_exists(path):
    if path.name == "__main__.py":
        return
    module = importlib.import_module(
        ".".join(["siglance", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    )
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)
