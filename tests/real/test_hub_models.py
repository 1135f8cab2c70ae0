"""Official models, for whoever has their weights: prompts, logits and greedy tokens as recorded (tests/goldens/hub).

`SIGLANCE_HUB_MODELS` names a folder with checkpoints or fp32 bundles, such as `google--gemma-4-E2B-it`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from siglance.engine import Bundle, Engine
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from ..hub.golden import GOLDENS, Golden, check_greedy, check_logits, check_prompt

pytestmark = pytest.mark.hub

VARIABLE = "SIGLANCE_HUB_MODELS"
CONTEXT = 1024  # tokens: the recordings need about 320


def find_model(golden: Golden) -> Path:
    """The folder of a checkpoint or a bundle; skips, saying why, where there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} does not name a folder with official checkpoints or bundles")
    path = Path(folder) / golden.model_id.replace("/", "--")
    if not path.is_dir():
        pytest.skip(f"{path} does not exist")
    return path


@pytest.fixture(scope="module", params=list(GOLDENS))
def model(request, tmp_path_factory):
    """(engine, recording) of one model; a bundle that was made here is deleted at the end."""
    golden = GOLDENS[request.param]
    path, made = find_model(golden), None
    if not (path / "siglance.json").is_file():
        made = tmp_path_factory.mktemp("hub") / path.name
        export(path, made, ExportOptions(precision="fp32", context=CONTEXT))
    bundle = Bundle.open(made or path)
    if bundle.manifest.precision != "fp32":
        pytest.skip(f"{path} is {bundle.manifest.precision}; the recordings are float32")
    try:
        with Engine(bundle) as engine:
            yield engine, golden
    finally:
        if made is not None:
            shutil.rmtree(made)


def test_prompt_ids(model):
    check_prompt(*model)


def test_first_token_logits(model):
    check_logits(*model)


def test_greedy_ids(model):
    check_greedy(*model)
