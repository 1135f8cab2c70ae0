"""Perplexity: the protocol, against a direct computation from the logits of whole chunks."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from siglance.engine import Engine, Text, cli, perplexity
from siglance.engine.bundle import Bundle
from siglance.engine.errors import InputError, ModelOutputError
from siglance.engine.runtime import Runtime
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import tiny

CHUNK = perplexity.CHUNK


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def bundle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    getattr(tiny, f"write_{request.param}")(folder / "checkpoint")
    export(folder / "checkpoint", folder / "bundle", ExportOptions(context=600, precision="fp32"))
    return Bundle.open(folder / "bundle")


class FakeRuntime:
    """Gives the same row of logits everywhere, and remembers what it was fed."""

    def __init__(self, row: np.ndarray, context: int = 1024, requires: tuple[str, ...] = ()):
        self.manifest = SimpleNamespace(name="fake", context=context, requires=requires)
        self.fed: list[list[int]] = []
        self._row = row.astype(np.float32)

    def session(self):
        self.fed.append([])
        return SimpleNamespace(prefill=self._take, reply_logits=self._take)

    def _take(self, ids):
        self.fed[-1].extend(ids.tolist())
        return np.tile(self._row, (len(ids), 1))


def fake(*arguments, **options) -> Runtime:
    return cast(Runtime, FakeRuntime(*arguments, **options))


def test_equals_a_direct_computation(bundle):
    """Chunks of 512, the first token replaced, rows 256 to 510 scored, logits of whole chunks in float64."""
    runtime = Runtime(bundle)
    ids = np.random.default_rng(0).integers(5, runtime.vocabulary, 2 * CHUNK + 100)
    ids[0] = 2
    expected = []
    for start in (0, CHUNK):
        chunk = np.concatenate([[2], ids[start + 1 : start + CHUNK]])
        logits = runtime.session().prompt_logits(chunk).astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected += [-np.log(probabilities[row, chunk[row + 1]]) for row in range(256, 511)]
    found = perplexity.measure(runtime, ids)
    assert found.scored_tokens == len(expected) == 510
    assert (found.tokens, found.chunks) == (len(ids), 2)
    assert found.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-4)
    assert found.standard_error == pytest.approx(
        np.exp(np.mean(expected)) * np.std(expected, ddof=1) / 510**0.5, rel=1e-3
    )


@pytest.mark.usefixtures("brief_calibration")
def test_rows_run_one_by_one_where_a_state_rounds_them(tmp_path):
    tiny.write_gemma3(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(context=600, precision="int4"))
    runtime = Runtime(Bundle.open(tmp_path / "bundle"))
    ids = np.random.default_rng(0).integers(5, runtime.vocabulary, CHUNK)
    session = runtime.session()
    session.prefill(ids[:256])
    expected = [perplexity.losses(session.step(ids[row])[None], ids[row + 1 : row + 2])[0] for row in range(256, 511)]
    found = perplexity.measure(runtime, ids).perplexity
    assert found == pytest.approx(np.exp(np.mean(expected)), rel=1e-6)
    together = runtime.session()
    together.prefill(ids[:256])
    logits = together.prompt_logits(ids[256:511])
    assert found != pytest.approx(np.exp(perplexity.losses(logits, ids[257:]).mean()), rel=1e-6)


def test_the_text_is_encoded_as_a_raw_prompt_is(tmp_path):
    """Control tokens that it spells stay text, also those of replies that the tokenizer does not mark as special."""
    tiny.write_gemma4(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "tokenizer.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    for token in facts["added_tokens"]:
        token["special"] &= token["content"] != "<|tool_call>"
    path.write_text(json.dumps(facts), encoding="utf-8")
    export(tmp_path / "checkpoint", tmp_path / "bundle")
    bundle, text = Bundle.open(tmp_path / "bundle"), "a <|tool_call> and a <|channel>"
    found = perplexity.text_ids(bundle, text).tolist()
    with Engine(bundle, threads=1) as engine:
        assert found == list(engine.generate(Text(text), raw=True, max_tokens=1).prompt_token_ids)
        assert engine._tokenizer.token_to_id("<|tool_call>") not in found


def test_a_model_that_knows_nothing_is_as_uncertain_as_its_vocabulary():
    assert perplexity.measure(fake(np.full(50, 3.0)), np.arange(600) % 50).perplexity == pytest.approx(50)


def test_what_the_model_is_fed():
    """Every chunk begins anew with the first token of the text, and the rest at the end is dropped."""
    runtime = FakeRuntime(np.zeros(10))
    ids = np.arange(2 * CHUNK + 511) % 10
    ids[0] = 7
    perplexity.measure(cast(Runtime, runtime), ids)
    assert runtime.fed == [[7, *ids[1:511]], [7, *ids[CHUNK + 1 : 2 * CHUNK - 1]]]


@pytest.mark.parametrize("length", [1, CHUNK - 1])
def test_a_text_that_is_too_short_is_refused(length):
    with pytest.raises(InputError, match=rf"{length} tokens.*at least 512"):
        perplexity.measure(fake(np.zeros(4)), np.zeros(length, np.int64))


def test_bundles_that_cannot_score_are_refused():
    ids = np.zeros(CHUNK, np.int64)
    with pytest.raises(InputError, match=r"context of 511"):
        perplexity.measure(fake(np.zeros(4), context=511), ids)
    with pytest.raises(InputError, match="rows after them"):
        perplexity.measure(fake(np.zeros(4), requires=("attention:prefix",)), ids)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(ModelOutputError, match="chunk 0"):
        perplexity.measure(fake(np.array([0.0, np.nan])), np.zeros(CHUNK, np.int64))


@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-1e4, 1e4, width=32)))
def test_log_probabilities_are_probabilities(logits):
    found = perplexity.log_probabilities(logits)
    assert np.exp(found).sum(-1) == pytest.approx(1, rel=1e-5)
    chosen = np.array([0, 3, 6])
    assert perplexity.losses(logits, chosen) == pytest.approx(-found[np.arange(3), chosen], rel=1e-5, abs=1e-5)


def test_the_command_line_prints_it(tmp_path, monkeypatch, capsys):
    def bench(*arguments: str) -> tuple[int, str, str]:
        quick = ["--prompt-tokens=8", "--new-tokens=2", "--repeats=1"]
        monkeypatch.setattr(sys, "argv", ["siglance", "bench", "demo", *quick, "--perplexity", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    text = tmp_path / "text.txt"
    text.write_text("red square blue circle " * 150, encoding="utf-8")
    code, out, _ = bench(str(text), "--json")
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    found = facts["perplexity"]
    assert found["perplexity"] > 1
    assert found["scored_tokens"] == 255 * found["chunks"] > 0
    assert found["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert facts["versions"]["onnxruntime"]
    code, out, _ = bench(str(text))
    assert code == 0
    assert out.splitlines()[-1].startswith(
        f"perplexity {found['perplexity']:.3f} +- {found['standard_error']:.3f} over {found['scored_tokens']} of "
    )
    text.write_bytes(b"\xff" * 600)
    for path in (text, tmp_path / "none.txt"):
        code, out, err = bench(str(path))
        assert (code, out) == (1, "")
        assert path.name in err
