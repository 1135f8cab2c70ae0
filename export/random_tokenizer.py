"""A tokenizer for models with random weights: as large as the official one, with its special tokens under their ids.

The rest is made up: bytes, the characters of ASCII, and fillers. So a text has about one token per character.
"""

from __future__ import annotations

from typing import Any

__all__ = ["chat_template", "tokenizer"]

_BASE = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
_GEMMA3 = {
    **{"<start_of_turn>": 105, "<end_of_turn>": 106, "\n": 107, "\n\n": 108, "\n\n\n": 109},
    **{"<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144},
}
_GEMMA4 = {
    **{"<|tool>": 46, "<tool|>": 47, "<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50},
    **{"<tool_response|>": 51, '<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101},
    **{"<|turn>": 105, "<turn|>": 106, "\n": 107, "\n\n": 108, "<|image>": 255999, "<|audio>": 256000},
    **{"<|image|>": 258880, "<|audio|>": 258881, "<image|>": 258882, "<audio|>": 258883, "<|video|>": 258884},
}
_PALIGEMMA = {
    "\n": 108,
    **{f"<loc{place:04d}>": 256000 + place for place in range(1024)},
    **{f"<seg{code:03d}>": 257024 + code for code in range(128)},
    "<image>": 257152,
}
# Template of a conversation without tools; {0}, {1}: the tokens around a turn, {2}: a picture, {3}: a sound.
_TEMPLATE = (
    "{{{{ bos_token }}}}"
    "{{%- for message in messages -%}}"
    "{{{{ '{0}' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}}}"
    "{{%- if message.content is string -%}}{{{{ message.content | trim }}}}"
    "{{%- else -%}}{{%- for item in message.content -%}}"
    "{{{{ '{2}' if item.type == 'image' else '{3}' if item.type == 'audio' else item.text | trim }}}}"
    "{{%- endfor -%}}{{%- endif -%}}"
    "{{{{ '{1}\\n' }}}}"
    "{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ '{0}model\\n' }}}}{{%- endif -%}}"
)


def chat_template(config: dict[str, Any]) -> str | None:
    """The chat template of the family of `config`; None for PaliGemma, which has no turns."""
    kind = config["model_type"]
    if kind == "paligemma":
        return None
    if kind.startswith("gemma4"):
        return _TEMPLATE.format("<|turn>", "<turn|>", "<|image|>", "<|audio|>")
    return _TEMPLATE.format("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "")


def tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json for config.json `config`: byte-pair encoding with byte fallback, no merges."""
    kind = config["model_type"]
    special = _PALIGEMMA if kind == "paligemma" else _GEMMA4 if kind.startswith("gemma4") else _GEMMA3
    tokens = _BASE | special
    # Rows of the table beyond these are padding and have no token.
    size = 257153 if kind == "paligemma" else 262145 if "<image_soft_token>" in tokens else 262144
    taken = set(tokens.values())
    free = (identifier for identifier in range(5, size) if identifier not in taken)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    pieces += [] if "\n" in tokens else ["\n"]
    vocabulary = tokens | dict(zip(pieces, free, strict=False))
    vocabulary |= {f"▁word{identifier}": identifier for identifier in free}
    added = [
        {
            **{"id": identifier, "content": token, "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": True},
        }
        for token, identifier in tokens.items()
        if token.strip() and not token.startswith(("<loc", "<seg"))
    ]
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added},
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None},
            **{"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
            **{"vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": []},
        },
    }
