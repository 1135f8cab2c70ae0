"""GGUF text models as checkpoints: the same model as the folder, blocks without loss, the tokenizer, damaged files."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tokenizers import Tokenizer

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.runtime import Runtime
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, find_family
from siglance.export.gguf_checkpoint import q4_0_blocks, q8_0_blocks
from siglance.export.gguf_file import GgufFile
from siglance.export.sources import open_source
from siglance.kernels.quantize import dequantize

from . import tiny
from .tiny_gguf import BF16, F16, Q4_0, Q5_0, Q8_0, gguf_name, tensors_of, write_gguf

FP32 = ExportOptions(precision="fp32")
MATRICES = ("attn_q", "attn_k.", "attn_v", "attn_output.", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with everything that the metadata can say: windows by pattern, scaled positions, a soft cap."""
    target = tmp_path_factory.mktemp("folder")
    scaling = {"rope_type": "linear", "factor": 8.0}
    # head_dim: GGUF has no query_pre_attn_scalar
    tiny.write_gemma3(target, query_pre_attn_scalar=16, rope_scaling=scaling, final_logit_softcapping=30.0)
    return target


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The checkpoint as GGUF in float32."""
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "plain.gguf")


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


# --- the same model as the folder


def test_the_configuration_is_that_of_the_folder(folder, plain):
    ours, theirs = open_source(plain), open_source(folder)
    family = find_family(ours.config)
    assert family.read(ours.config) == family.read(theirs.config)


def test_the_tensors_are_those_of_the_folder(folder, plain):
    ours, theirs = open_source(plain), open_source(folder)
    assert ours.names() == theirs.names()
    for name in ours.names():
        assert ours.shape(name) == theirs.shape(name)
        if name.endswith("norm.weight"):
            # Adding 1 may have cost w its last bits, but not the sum.
            np.testing.assert_array_equal(bits(1.0 + ours.read(name)), bits(1.0 + theirs.read(name)))
        else:
            np.testing.assert_array_equal(bits(ours.read(name)), bits(theirs.read(name)))
            np.testing.assert_array_equal(np.concatenate(list(ours.read_rows(name))), theirs.read(name))


def test_the_bundle_is_that_of_the_folder(folder, plain, tmp_path):
    for source, name in ((folder, "folder"), (plain, "gguf")):
        export(source, tmp_path / name, FP32, name="tiny")
    ours, theirs = Bundle.open(tmp_path / "gguf").manifest, Bundle.open(tmp_path / "folder").manifest
    assert ours.source == "plain.gguf"
    for key in ("weights", "embed", "decoder", "chat_template"):
        assert ours.files[key] == theirs.files[key]
    for fact in ("requires", "context", "stop_ids", "prompt", "state", "reply", "revision"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact


def test_an_untied_head_is_found(tmp_path):
    tiny.write_gemma3(tmp_path / "folder", query_pre_attn_scalar=16, tie_word_embeddings=False)
    checkpoint = open_source(write_gguf(tmp_path / "folder", tmp_path / "untied.gguf"))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.names()
    export(tmp_path / "untied.gguf", tmp_path / "bundle", FP32)


def test_a_model_without_windows_sees_everything_everywhere(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "a.gguf", change=lambda metadata, _: metadata.pop("attention.sliding_window"))
    assert open_source(path).config["layer_types"] == ["full_attention"] * 4


def test_what_the_file_leaves_out_is_what_llama_cpp_takes(folder, tmp_path):
    def change(metadata, tensors):
        for key in ("rope.freq_base_swa", "attention.sliding_window_pattern", "rope.scaling.type"):
            metadata.pop(key)

    config = open_source(write_gguf(folder, tmp_path / "a.gguf", change=change)).config
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000.0
    assert config["rope_parameters"]["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert config["layer_types"] == ["sliding_attention"] * 4  # every sixth would see everything


def test_the_27b_scales_by_the_hidden_width_of_a_head(folder, tmp_path):
    def change(metadata, tensors):
        metadata["block_count"] = 62
        metadata["attention.head_count"] = 2
        tensors.update({f"filler.{index}": np.zeros(1, np.float32) for index in range(62)})

    assert open_source(write_gguf(folder, tmp_path / "a.gguf", change=change)).config["query_pre_attn_scalar"] == 32


@pytest.mark.parametrize("kind", [F16, BF16, Q5_0, Q4_0, Q8_0], ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_the_package_does(folder, tmp_path, kind):
    kinds = dict.fromkeys(("token_embd", *MATRICES), kind)
    path = write_gguf(folder, tmp_path / "a.gguf", kinds)
    checkpoint, reader = open_source(path), gguf.GGUFReader(path)
    for tensor in reader.tensors:
        name = next(name for name in checkpoint.names() if gguf_name(name) == tensor.name)
        if tensor.tensor_type == kind:
            expected = gguf_dequantize(tensor.data, kind)
            np.testing.assert_array_equal(bits(checkpoint.read(name)), bits(expected))
            assert (checkpoint.blocks(name) is not None) == (kind in (Q4_0, Q8_0))


def test_large_tables_are_read_in_slices(plain, monkeypatch):
    monkeypatch.setattr("siglance.export.gguf_file._SLICE_BYTES", 4 * 64 * 100)  # 100 rows of 64
    checkpoint = open_source(plain)
    slices = list(checkpoint.read_rows("model.embed_tokens.weight"))
    assert [len(rows) for rows in slices] == [100] * 5 + [12]
    np.testing.assert_array_equal(np.concatenate(slices), checkpoint.read("model.embed_tokens.weight"))


def test_norms_come_back_bit_for_bit(folder, tmp_path):
    """1 + w of every size of w: from 2^-60 to 2^20 and of both signs, those near -1 and -1/2 in full."""
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.uniform(-60, 20, 100_000)).astype(np.float32)
    w = np.concatenate([sizes, -sizes, *(at + np.arange(-9, 9) * 2.0**-26 for at in (-2, -1, -0.5, 0, 1))])
    w = w.astype(np.float32)
    sums = np.float32(1) + w
    path = write_gguf(
        folder, tmp_path / "a.gguf", change=lambda _, tensors: tensors.update({"output_norm.weight": sums})
    )
    without = open_source(path).read("model.norm.weight")
    np.testing.assert_array_equal(bits(1.0 + without), bits(sums))


def test_a_norm_that_is_no_sum_is_refused(folder, tmp_path):
    """A quarter and its next neighbour: no float32 w gives 1 + w there."""
    norm = np.full(64, np.nextafter(np.float32(0.25), np.float32(1)))
    path = write_gguf(
        folder, tmp_path / "a.gguf", change=lambda _, tensors: tensors.update({"output_norm.weight": norm})
    )
    with pytest.raises(ExportError, match=r"output_norm\.weight.*not 1 \+ w"):
        open_source(path).read("model.norm.weight")


# --- blocks without loss


RAW = {Q4_0: (18, q4_0_blocks), Q8_0: (34, q8_0_blocks)}


@pytest.mark.parametrize("kind", RAW, ids=lambda kind: kind.name)
@settings(max_examples=200)
@given(data=st.data())
def test_repacked_blocks_dequantise_to_identical_floats(kind, data):
    """For any bytes; float16 scales of all kinds: negative, zero of both signs, subnormal, largest."""
    size, repack = RAW[kind]
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    raw = data.draw(arrays.arrays(np.uint8, (rows, count * size)))
    scales = st.sampled_from([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00]) | st.integers(
        0, 0xFFFF
    ).filter(lambda bits: bits & 0x7C00 != 0x7C00)
    chosen = [data.draw(scales) for _ in range(rows * count)]
    raw.reshape(-1, size)[:, :2] = np.array(chosen, "<u2").view(np.uint8).reshape(-1, 2)
    np.testing.assert_array_equal(bits(dequantize(repack(raw))), bits(gguf_dequantize(raw, kind)))


@pytest.mark.parametrize("kind", RAW, ids=lambda kind: kind.name)
def test_every_finite_scale_dequantises_to_identical_floats(kind):
    size, repack = RAW[kind]
    scales = np.array([bits for bits in range(0x10000) if bits & 0x7C00 != 0x7C00], "<u2")
    raw = np.random.default_rng(1).integers(0, 256, (len(scales), size), np.uint8)
    raw[:, :2] = scales.view(np.uint8).reshape(-1, 2)
    np.testing.assert_array_equal(bits(dequantize(repack(raw))), bits(gguf_dequantize(raw, kind)))


@pytest.mark.parametrize(("kind", "width"), [(Q4_0, 4), (Q8_0, 8)], ids=["Q4_0", "Q8_0"])
def test_a_checkpoint_gives_its_blocks(folder, tmp_path, monkeypatch, kind, width):
    monkeypatch.setattr("siglance.export.gguf_file._SLICE_BYTES", 4 * 64 * 100)
    checkpoint = open_source(write_gguf(folder, tmp_path / "a.gguf", {"token_embd": kind, "ffn_up": kind}))
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"):
        blocks = checkpoint.blocks(name)
        assert blocks is not None
        rows, columns = checkpoint.shape(name)
        assert (blocks.bits, blocks.block) == (width, 32)
        assert blocks.codes.shape == (rows, columns * width // 8)
        assert blocks.scales.shape == (rows, columns // 32)
        np.testing.assert_array_equal(bits(dequantize(blocks)), bits(checkpoint.read(name)))
    assert checkpoint.blocks("model.layers.2.mlp.gate_proj.weight") is None
    assert checkpoint.blocks("model.norm.weight") is None
    assert checkpoint.quantised


def test_scales_that_are_not_finite_are_refused(folder, tmp_path):
    raw = np.zeros((512, 36), np.uint8)
    raw[7, 18:20] = np.array([np.inf], np.float16).view(np.uint8)
    path = write_gguf(
        folder, tmp_path / "a.gguf", change=lambda _, tensors: tensors.update({"token_embd.weight": (raw, Q4_0)})
    )
    with pytest.raises(ExportError, match=r"token_embd\.weight.*not finite"):
        open_source(path).blocks("model.embed_tokens.weight")


# --- the tokenizer


def pieces_of(text: str, tokens: list[str], scores: list[float], types: list[int]) -> list[int]:
    """SentencePiece BPE by its definition: user-defined pieces first, then the best pair, leftmost of equals."""
    ids = {token: index for index, token in enumerate(tokens)}
    fixed = sorted((token for token, kind in zip(tokens, types, strict=True) if kind == 4), key=len, reverse=True)
    text, symbols, at = text.replace(" ", "▁"), [], 0
    while at < len(text):
        match = next((token for token in fixed if text.startswith(token, at)), None)
        symbols.append((match or text[at], match is not None))
        at += len(match or text[at])
    while True:
        best = None
        for index in range(len(symbols) - 1):
            (left, frozen), (right, also_frozen) = symbols[index : index + 2]
            identifier = ids.get(left + right)
            if frozen or also_frozen or identifier is None or types[identifier] != 1:
                continue
            if (
                best is None
                or scores[identifier] > scores[ids["".join(symbol for symbol, _ in symbols[best : best + 2])]]
            ):
                best = index
        if best is None:
            break
        symbols[best : best + 2] = [(symbols[best][0] + symbols[best + 1][0], False)]
    found = []
    for symbol, _ in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁", "<b>"]
TYPES = [3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4]


@pytest.fixture(scope="module")
def vocabularies(folder, tmp_path_factory):
    """Twenty random vocabularies of short pieces, each rebuilt: (tokenizer, pieces, scores, types)."""
    made = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pieces = {*"abc<>é", "▁", "\n"}
        while len(pieces) < 60:  # closed under what BPE can make: a piece is two pieces
            left, right = rng.choice(sorted(pieces), 2)
            pieces |= {left + right} - {*PIECES}
        normal = [str(piece) for piece in rng.permutation(sorted(pieces))]
        tokens = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
        types = [*TYPES, *[6] * 256, *[1] * len(normal)]
        scores = [0.0] * (len(tokens) - len(normal)) + [-float(rank) for rank in rng.permutation(len(normal))]

        def change(metadata, tensors, tokens=tokens, types=types, scores=scores):
            spelled = [
                token.replace("▁", " ") if kind == 4 else token for token, kind in zip(tokens, types, strict=True)
            ]
            metadata["tokenizer.ggml.tokens"] = spelled
            metadata["tokenizer.ggml.token_type"] = types
            metadata["tokenizer.ggml.scores"] = scores

        target = tmp_path_factory.mktemp("vocabulary")
        open_source(write_gguf(folder, target / "a.gguf", change=change)).write_texts(target)
        made.append((Tokenizer.from_file(str(target / "tokenizer.json")), tokens, scores, types))
    return made


@settings(max_examples=300, deadline=None)
@given(text=st.text("abc<> é\n▁漢", max_size=40), which=st.integers(0, 19))
def test_the_rebuilt_tokenizer_is_sentencepiece(vocabularies, text, which):
    tokenizer, tokens, scores, types = vocabularies[which]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == pieces_of(text, tokens, scores, types)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
    assert tokenizer.encode(text).ids == [2, *ids]


def test_flags_of_added_tokens(folder, tmp_path):
    def change(metadata, tensors):
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        tokens[-1], types[-1] = " " * 9, 4
        types[tokens.index("<start_of_image>")] = 4  # as the converter has them

    open_source(write_gguf(folder, tmp_path / "a.gguf", change=change)).write_texts(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    flags = {token["content"]: (token["special"], token["normalized"]) for token in written["added_tokens"]}
    assert flags["<start_of_turn>"] == flags["<bos>"] == flags["<start_of_image>"] == (True, False)
    assert flags["▁" * 9] == flags["<unused0>"] == (False, True)
    assert "<0x0A>" not in flags
    assert (tmp_path / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()


def test_the_rebuilt_tokenizer_is_the_folders(folder, plain, tmp_path):
    """On texts of the tiny vocabulary's words, where every way to build a word leads to the same pieces."""
    open_source(plain).write_texts(tmp_path)
    ours, theirs = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (tmp_path, folder))
    for text in ("What is this image of the cat and the red dog\n\n\nhello world", "é漢", "<start_of_turn>user\n", ""):
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_given_tokenizer_is_used(folder, plain, tmp_path):
    given_one = tmp_path / "mine.json"
    given_one.write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    export(plain, tmp_path / "bundle", FP32, tokenizer=given_one)
    assert (tmp_path / "bundle" / "tokenizer.json").read_bytes() == given_one.read_bytes()
    with pytest.raises(ExportError, match="no such tokenizer file"):
        open_source(plain, tokenizer=tmp_path / "nowhere.json")


def test_a_given_tokenizer_stands_in_for_one_that_cannot_be_rebuilt(folder, tmp_path):
    path = write_gguf(
        folder, tmp_path / "a.gguf", change=lambda metadata, _: metadata.update({"tokenizer.ggml.model": "gpt2"})
    )
    with pytest.raises(ExportError, match=r"'gpt2'.*--tokenizer"):
        open_source(path).write_texts(tmp_path)
    open_source(path, tokenizer=folder / "tokenizer.json").write_texts(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("add_space_prefix", True, "space in front"),
        ("add_eos_token", True, "end-of-sequence"),
        ("scores", [0.0], "512 tokens need as many tokenizer.ggml.scores, it has 1"),
        ("scores", [float("nan")] * 512, "not all finite"),
        ("token_type", [9] * 512, "type 9"),
        ("bos_token_id", 512, "no id of its 512 tokens"),
        ("tokens", ["a"] * 512, "'a' twice"),
        ("tokens", [f"a{index}" for index in range(513)], "513 tokens"),
        ("tokens", "a", "tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt(folder, tmp_path, key, value, named):
    def change(metadata, tensors):
        metadata[f"tokenizer.ggml.{key}"] = value

    path = write_gguf(folder, tmp_path / "a.gguf", change=change)
    with pytest.raises(ExportError, match=named):
        open_source(path).write_texts(tmp_path)


def test_generation_defaults(folder, tmp_path):
    def change(metadata, tensors):
        metadata.update({"general.sampling.temp": 0.7, "general.sampling.top_k": 64, "general.sampling.top_p": 0.95})
        metadata.update({"tokenizer.ggml.eot_token_id": 6, "tokenizer.ggml.eom_token_id": 9})

    path = write_gguf(folder, tmp_path / "a.gguf", change=change)
    assert open_source(path).json("generation_config.json") == {
        **{"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95},
        "eos_token_id": [1, 6, 9],
    }
    export(path, tmp_path / "bundle", FP32)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.sampling.temperature, manifest.sampling.top_k, manifest.sampling.top_p) == (0.7, 64, 0.95)
    assert {1, 6, 9} <= set(manifest.stop_ids)


# --- files that are refused


def refused(path: Path) -> str:
    """Opening, reading or exporting `path` is an ExportError of one line; returns its message."""
    before = path.read_bytes()
    with pytest.raises(ExportError) as error:
        export(path, path.parent / "out" / "bundle", FP32)
    assert not (path.parent / "out").exists()
    assert path.read_bytes() == before
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("architecture", "metadata", "named"),
    [
        ("llama", {}, r"'llama'.*supported: gemma3"),
        ("gemma3n", {}, "'gemma3n'"),
        ("clip", {"general.type": "mmproj"}, "mmproj"),
        ("gemma3", {"general.type": "mmproj"}, "mmproj"),
        ("gemma3", {"general.type": "adapter"}, "'adapter'"),
        ("gemma3", {"split.count": 3}, "one of 3 parts"),
        ("gemma3", {"rope.scaling.type": "yarn"}, r"rope\.scaling\.type = 'yarn'"),
        ("gemma3", {"rope.freq_base": float("inf")}, "finite"),
        ("gemma3", {"rope.dimension_count": 8}, r"rope\.dimension_count = 8"),
        ("gemma3", {"attention.value_length": 8}, "value_length = 8"),
        ("gemma3", {"attention.key_length": 2**31}, "key_length = 2147483648"),
        ("gemma3", {"attention.head_count": 0}, "head_count = 0"),
        ("gemma3", {"attention.head_count": [4, 4, 4, 4]}, "head_count = of type"),
        ("gemma3", {"embedding_length": "64"}, "embedding_length = '64'"),
        ("gemma3", {"embedding_length": 128}, "shape"),
        ("gemma3", {"block_count": 2**32 - 1}, "block_count"),
        ("gemma3", {"block_count": 5}, "layers.4"),
        ("gemma3", {"block_count": 3}, "does not use"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"attention.layer_norm_rms_epsilon": 1e-5}, "rms_norm_eps"),
        ("gemma3", {"general.alignment": 3}, "alignment"),
    ],
)
def test_a_model_that_is_not_supported_is_named(folder, tmp_path, architecture, metadata, named):
    path = write_gguf(
        folder,
        tmp_path / "a.gguf",
        change=lambda found, _: found.update(metadata),
        architecture=architecture,
    )
    assert re.search(named, refused(path))


def test_missing_metadata_is_named(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "a.gguf", change=lambda metadata, _: metadata.pop("block_count"))
    assert "gemma3.block_count" in refused(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q_norm.weight", "blk.1.ffn_up.weight"])
def test_a_missing_tensor_is_named(folder, tmp_path, name):
    path = write_gguf(folder, tmp_path / "a.gguf", change=lambda _, tensors: tensors.pop(name))
    assert name in refused(path).replace("model.layers.1.mlp.up_proj", "blk.1.ffn_up")


def test_a_left_over_tensor_is_named(folder, tmp_path):
    """Files that hold a vision tower too have such."""
    path = write_gguf(
        folder,
        tmp_path / "a.gguf",
        change=lambda _, tensors: tensors.update({"v.patch_embd.weight": np.zeros((2, 2), "f4")}),
    )
    assert "v.patch_embd.weight" in refused(path)


def test_tensors_of_integers_are_refused(folder, tmp_path):
    integers = (np.zeros((96, 64), np.int8), gguf.GGMLQuantizationType.I8)
    path = write_gguf(
        folder, tmp_path / "a.gguf", change=lambda _, tensors: tensors.update({"blk.1.ffn_up.weight": integers})
    )
    assert "blk.1.ffn_up.weight" in (message := refused(path))
    assert "I8" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF", "cut short"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "no room"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "no room"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(20), "ends inside"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**50), "no room"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(16), "array of type"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 99, 1), "type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "None"),
    ],
)
def test_a_file_that_is_no_gguf(tmp_path, content, named):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert named in refused(path)


def test_a_file_cut_short_anywhere_is_refused(plain, tmp_path):
    """Before anything is read: the header names more than there is."""
    data, path = plain.read_bytes(), tmp_path / "a.gguf"
    for size in [*range(0, len(data) - 1, 20_011), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ExportError):
            GgufFile(path)
    assert "cut short: tensor" in refused(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_never_anything_but_an_export_error(plain, tmp_path_factory, data):
    good = plain.read_bytes()
    header = GgufFile(plain).tensors["output_norm.weight"].offset  # the first tensor
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 400) | st.integers(0, header - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        damaged[at : at + width] = data.draw(st.binary(min_size=width, max_size=width))
    place = tmp_path_factory.mktemp("damaged")
    (place / "a.gguf").write_bytes(damaged)
    try:
        checkpoint = open_source(place / "a.gguf")
        find_family(checkpoint.config).read(checkpoint.config)
        for name in checkpoint.names():
            checkpoint.read(name)
            checkpoint.blocks(name)
        checkpoint.json("generation_config.json")
        checkpoint.json("tokenizer_config.json")
        checkpoint.write_texts(place)
    except ExportError:
        pass


def test_a_folder_of_gguf_files_says_what_to_name(plain):
    with pytest.raises(ExportError, match=r"name one of its GGUF files: plain\.gguf"):
        open_source(plain.parent)


# --- kept as they are


def test_kept_blocks_give_the_logits_of_the_dequantised_model(folder, tmp_path):
    """The default of a GGUF file. Bytes are kept, so what differs is how products are computed."""
    path = write_gguf(folder, tmp_path / "a.gguf", {"token_embd": Q8_0} | dict.fromkeys(MATRICES, Q4_0))
    export(path, tmp_path / "kept")
    export(path, tmp_path / "float", FP32)
    kept, plain = Bundle.open(tmp_path / "kept"), Bundle.open(tmp_path / "float")
    assert kept.manifest.precision == "keep"
    ids = np.random.default_rng(3).integers(5, 512, 24)
    ours, theirs = (Runtime(bundle).session().prefill(ids) for bundle in (kept, plain))
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert kept.path("weights").stat().st_size < 0.45 * plain.path("weights").stat().st_size
    assert tensors_of(folder)  # the source is there and was not touched


def test_blocks_that_onnxruntime_does_not_have_are_named_in_the_report(folder, tmp_path):
    """Their values are kept, as numbers of 4 bytes: who expects the size of the file should know."""
    path = write_gguf(folder, tmp_path / "a.gguf", {"token_embd": Q8_0, "ffn_down": Q5_0})
    report = export(path, tmp_path / "kept", ExportOptions(context=512))
    [note] = report.notes
    weights = sum(value.size for name, value in tensors_of(folder).items() if "down_proj" in name)
    assert (
        f"no blocks like those of Q5_0 ({weights / 1e6:.1f} M weights): they are stored without loss as float" in note
    )
    assert report.graphs["decoder"]["dtypes"]["float"] > 4 * weights
    assert export(path, tmp_path / "int8", ExportOptions(precision="int8", context=512)).notes == ()
