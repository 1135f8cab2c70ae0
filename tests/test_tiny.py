"""The tiny checkpoints: their options, their tokenizer and their chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from tokenizers import Tokenizer

from . import reference_model as reference
from . import tiny


def token_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 500, length)


def test_both_key_styles_describe_the_same_model(tmp_path: Path) -> None:
    for style in ("saved", "hub"):
        tiny.write_gemma3(
            tmp_path / f"gemma3-{style}", key_style=style, rope_scaling={"rope_type": "linear", "factor": 8}
        )
        tiny.write_gemma4(tmp_path / f"gemma4-{style}", key_style=style)
    for name, logits_of in (("gemma3", reference.gemma3_text_logits), ("gemma4", reference.gemma4_text_logits)):
        saved, hub = (
            logits_of(*reference.load_checkpoint(tmp_path / f"{name}-{style}"), token_ids(20))
            for style in ("saved", "hub")
        )
        np.testing.assert_array_equal(saved, hub)


def test_storage_options_hold_the_same_tensors(tmp_path: Path) -> None:
    """Shards split the file and change nothing; bfloat16 rounds; dead tensors are extra and unread."""
    whole, config = reference.load_checkpoint(written_gemma4(tmp_path / "whole"))
    shards, _ = reference.load_checkpoint(written_gemma4(tmp_path / "shards", shards=2))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert shards.keys() == whole.keys() == index["weight_map"].keys()
    assert all(np.array_equal(shards[name], whole[name]) for name in whole)

    rounded, _ = reference.load_checkpoint(written_gemma4(tmp_path / "rounded", storage="bfloat16"))
    assert all(np.allclose(rounded[name], whole[name], rtol=2**-8, atol=0) for name in whole)
    assert not np.array_equal(rounded["model.language_model.norm.weight"], whole["model.language_model.norm.weight"])

    dead, _ = reference.load_checkpoint(written_gemma4(tmp_path / "dead", dead_shared_kv=True))
    extra = dead.keys() - whole.keys()
    assert len(extra) == 3 * config["text_config"]["num_kv_shared_layers"]
    alive = {name: value for name, value in dead.items() if name not in extra}
    with_dead, without = (reference.gemma4_text_logits(w, config, token_ids(9)) for w in (dead, alive))
    np.testing.assert_array_equal(with_dead, without)


def written_gemma4(folder: Path, **options: object) -> Path:
    tiny.write_gemma4(folder, **options)
    return folder


def test_a_misspelt_configuration_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sliding_windows"):
        tiny.write_gemma3(tmp_path, sliding_windows=4)


@pytest.mark.parametrize("text", ["What is this?", " two  spaces\n\n\nlines", "naïve 日本 🦝", "<0x41> <bos", ""])
def test_tokenizer_gives_text_back(tmp_path: Path, text: str) -> None:
    config = tiny.write_gemma3(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    ids = tokenizer.encode(text).ids
    assert ids[0] == 2
    assert tokenizer.decode(ids) == text


def test_templates_give_the_published_layouts(tmp_path: Path) -> None:
    tiny.write_gemma3(tmp_path / "gemma3")
    tiny.write_gemma4(tmp_path / "gemma4")
    question = [{"type": "image"}, {"type": "text", "text": " What is this? "}]
    answer = "<|channel>thought\nhm<channel|>A cat. "
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]

    def render(name: str, messages: list, **variables: object) -> str:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((tmp_path / name / "chat_template.jinja").read_text())
        return template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True, **variables)

    assert render("gemma3", chat[:2]) == (
        "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What is this?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert render("gemma4", chat[1:2]) == "<bos><|turn>user\n<|image|>What is this?<turn|>\n<|turn>model\n"
    assert render("gemma4", chat, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\n<|image|>What is this?<turn|>\n"
        "<|turn>model\nA cat.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n"
    )
