"""The real Gemma 3 270M straight from its GGUF file: the model of the dequantised folder, tensor by tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from siglance.engine import Engine, Sampling
from siglance.engine.bundle import Bundle
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, find_family
from siglance.export.gguf_file import GgufFile
from siglance.export.sources import open_source
from siglance.kernels.quantize import dequantize

from .checkpoint import GGUF_NAME

# The fast suite collects this file in environments without sentencepiece, and deselects all of it.
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is in the parity extra only")
protocol = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="see above")

pytestmark = pytest.mark.real

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "gemma3-270m.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
CONTROL, UNKNOWN = 3, 2


@pytest.fixture(scope="module")
def file(checkpoint):
    return checkpoint.parent / GGUF_NAME


@pytest.fixture(scope="module")
def tokenizer(file, tmp_path_factory):
    """The rebuilt tokenizer."""
    target = tmp_path_factory.mktemp("texts")
    open_source(file).write_texts(target)
    return Tokenizer.from_file(str(target / "tokenizer.json"))


def test_the_model_is_that_of_the_folder(file, checkpoint):
    ours, theirs = open_source(file), open_source(checkpoint)
    family = find_family(ours.config)
    assert family.read(ours.config) == family.read(theirs.config)
    assert ours.names() == theirs.names()
    for name in sorted(ours.names()):
        one = np.float32(name.endswith("norm.weight"))  # of a norm the sum counts: it is what the file holds
        found, expected = one + ours.read(name), one + theirs.read(name)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
    print(f"{len(ours.names())} of {len(ours.names())} tensors equal bit for bit")


def test_blocks_are_the_floats_of_the_folder(file, checkpoint):
    ours, theirs = open_source(file), open_source(checkpoint)
    kept = 0
    for name in sorted(ours.names()):
        blocks = ours.blocks(name)
        if blocks is not None:
            assert np.array_equal(dequantize(blocks).view(np.uint32), theirs.read(name).view(np.uint32)), name
            kept += 1
    print(f"{kept} Q8_0 matrices repacked without loss")
    assert kept


@pytest.mark.parametrize("name", CASES)
def test_the_rebuilt_tokenizer_gives_the_golden_ids(tokenizer, name):
    case = CASES[name]
    if case["prompt"] is not None:
        assert tokenizer.encode(case["prompt"]).ids == case["input_ids"]


def test_the_rebuilt_tokenizer_is_sentencepiece(tokenizer, file):
    """SentencePiece itself, on the file's pieces; texts without control tokens, which it takes apart."""
    metadata = GgufFile(file).metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    model = protocol.ModelProto()
    for token, kind, score in zip(tokens, types, metadata["tokenizer.ggml.scores"].tolist(), strict=True):
        piece = model.pieces.add()
        piece.piece = token.replace(" ", "▁")
        piece.score = score
        piece.type = UNKNOWN if token == "<unk>" else kind
    model.trainer_spec.model_type = protocol.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.bos_id, model.trainer_spec.unk_id = range(
        4
    )
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(model.SerializeToString())

    draw = random.Random(0)
    pieces = [token.replace("▁", " ") for token, kind in zip(tokens, types, strict=True) if kind not in (CONTROL, 6)]
    alphabet = [
        "a",
        " ",
        "  ",
        "\n",
        "\t",
        "<table>",
        "é",
        "漢",
        "😀",
        "▁",
        "\u200d",
        "0",
        "\r",
        "ﬁ",
        "अ",
        "\x00",
        "\u0301",
    ]
    texts = ["".join(draw.choice(pieces) for _ in range(20)) for _ in range(2000)]
    texts += ["".join(draw.choice(alphabet) for _ in range(draw.randrange(40))) for _ in range(2000)]
    texts += [case["prompt"] for case in GOLDEN["cases"] if case["prompt"]]
    differing = [
        text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids != reference.encode(text)
    ]
    print(f"{len(texts) - len(differing)} of {len(texts)} texts have the ids of SentencePiece")
    assert not differing


def test_the_bundle_is_that_of_the_folder(file, checkpoint, tmp_path):
    facts = {}
    for source in (file, checkpoint):
        bundle = tmp_path / "bundle"
        export(source, bundle, ExportOptions(precision="fp32"), name="gemma-3-270m")
        facts[source] = Bundle.open(bundle).manifest
        bundle.rename(tmp_path / source.name)
    for key in ("weights", "embed", "decoder"):
        assert facts[file].files[key] == facts[checkpoint].files[key]
    assert facts[file].stop_ids == facts[checkpoint].stop_ids


def test_kept_blocks_answer_as_the_dequantised_model(file, tmp_path):
    """The default precision of a GGUF file. Products of 8-bit blocks round their inputs, so logits are only close."""
    export(file, tmp_path / "bundle")
    with Engine.open(tmp_path / "bundle") as engine:
        assert engine.bundle.manifest.precision == "keep"
        for name, case in CASES.items():
            reply = engine.generate([], prompt_ids=case["input_ids"], max_tokens=32, sampling=Sampling(temperature=0))
            same = sum(a == b for a, b in zip(reply.token_ids, case["greedy_ids"], strict=True))
            logits = engine.runtime.session().prefill(np.array(case["input_ids"]))
            top = {entry["id"]: entry["logit"] for entry in case["first_step_top5"]}
            difference = max(abs(float(logits[token]) - expected) for token, expected in top.items())
            print(f"{name}: {same} of 32 greedy ids, top-5 logits within {difference:.2g}")
            assert difference < 0.5
            assert int(np.argmax(logits)) == max(top, key=top.__getitem__)
