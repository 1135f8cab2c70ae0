"""The calibrated precisions of the real Gemma 3 270M: how well they predict a text that calibration has not seen.

float32 has a perplexity of 13.829 on this text by this protocol, and so it has in llama.cpp.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from siglance.engine import perplexity
from siglance.engine.bench.traffic import Traffic
from siglance.engine.bundle import Bundle
from siglance.engine.runtime import Runtime

pytestmark = pytest.mark.real

TEXT = Path("/usr/share/common-licenses/GPL-3")
EXACT = 13.829


@pytest.mark.skipif(not TEXT.is_file(), reason=f"the text that is scored is Debian's {TEXT}")
@pytest.mark.parametrize(
    ("precision", "most", "megabytes"),
    [
        ("auto", 1.06 * EXACT, 225),  # measured: 14.14 at 201 MB; searched scales alone: 14.9 at this size
        ("int4", 18.0, 160),  # measured: 17.4 at 143 MB; searched scales alone: 22.3 at 168 MB
    ],
)
def test_perplexity(precision, most, megabytes, checkpoint, tmp_path):
    command = [sys.executable, "-P", "-m", "siglance.engine", "export", checkpoint, "-o", tmp_path / "bundle"]
    # auto is what a user gets who says nothing.
    subprocess.run([*command, *(() if precision == "auto" else ("--precision", precision))], check=True, cwd="/")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.precision == precision
    cost = Traffic(bundle).step(0)
    read = (cost.weight_bytes + cost.lookup_bytes) / 1e6
    text, _ = perplexity.read_text(TEXT)
    found = perplexity.measure(Runtime(bundle), perplexity.text_ids(bundle, text)).perplexity
    report = json.loads(bundle.path("export").read_text())
    agreement = report["graphs"]["decoder"]["argmax_agreement"]
    print(f"{precision}: perplexity {found:.3f}, {read:.1f} MB a token, best token as float32 {agreement:.0%}")
    assert found <= most
    assert read <= megabytes
    assert agreement > 0.7
