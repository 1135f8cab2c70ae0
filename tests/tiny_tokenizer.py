"""A Gemma-style tokenizer of a few hundred tokens and the chat templates, for the tiny checkpoints of `tiny.py`.

Token texts are the official ones; token ids are not (pad, eos, bos, unk and mask excepted). The templates give the
layout of the published ones, without tool declarations.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BASE_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # ids 0 to 4 in every Gemma vocabulary
GEMMA3_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
GEMMA4_TOKENS = (
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
# Words that become single tokens. "\n\n" and "▁▁" are tokens in the real vocabularies too, so pieces merge across them.
WORDS = (
    *(
        "\n\n\n",
        "▁▁▁",
        "▁the",
        "▁and",
        "▁of",
        "▁is",
        "▁in",
        "▁what",
        "▁this",
        "▁image",
        "▁cat",
        "▁dog",
        "▁red",
        "▁blue",
    ),
    *("user", "model", "system", "thought", "hello", "world", "What", "Describe", "The"),
)

GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- set ns = namespace(system='') -%}
{%- macro render(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- else -%}
    {%- for item in content -%}
      {%- if item.type == 'image' -%}{{ '<start_of_image>' }}
      {%- elif item.type == 'text' -%}{{ item.text | trim }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
  {%- set ns.system = render(messages[0].content) + '\\n\\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif -%}
  {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {%- if loop.first -%}{{ ns.system }}{%- endif -%}
  {{ render(message.content) + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

GEMMA4_TEMPLATE = """\
{{ bos_token }}
{%- macro without_thoughts(text) -%}
  {%- for part in text.split('<channel|>') -%}{{ part.split('<|channel>')[0] }}{%- endfor -%}
{%- endmacro -%}
{%- macro render(content, role) -%}
  {%- if content is string -%}
    {{- (without_thoughts(content) if role == 'model' else content) | trim -}}
  {%- else -%}
    {%- for item in content -%}
      {%- if item.type in ('image', 'audio', 'video') -%}{{ '<|' + item.type + '|>' }}
      {%- elif item.type == 'text' -%}{{ render(item.text, role) }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set has_system = messages[0].role in ('system', 'developer') -%}
{%- if enable_thinking or has_system -%}
  {{ '<|turn>system\\n' }}
  {%- if enable_thinking -%}{{ '<|think|>\\n' }}{%- endif -%}
  {%- if has_system -%}{{ render(messages[0].content, 'system') }}{%- set messages = messages[1:] -%}{%- endif -%}
  {{ '<turn|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = 'model' if message.role == 'assistant' else message.role -%}
  {{ '<|turn>' + role + '\\n' + render(message.content, role) + '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""


def write_tokenizer(folder: Path, special_tokens: tuple[str, ...], vocab_size: int) -> dict[str, int]:
    """Write a Gemma-style tokenizer.json of exactly `vocab_size` tokens; return the ids of the special tokens.

    The layout is the one of `GemmaTokenizer` in transformers: byte-pair merges with byte fallback, spaces become "▁",
    no prefix space, nothing splits after normalisation, and `<bos>` in front unless special tokens are switched off.
    """
    special = [*BASE_TOKENS, *special_tokens]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁"]
    pieces += [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for length in range(1, len(word)):
            pair = (word[:length], word[length])
            if "".join(pair) not in pieces:
                merges.append(pair)
                pieces.append("".join(pair))
    if len(pieces) > vocab_size:
        raise ValueError(f"vocab_size must be at least {len(pieces)}, not {vocab_size}")
    unused = [f"<unused{index}>" for index in range(vocab_size - len(pieces))]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *unused])}

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in unused])
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "padding_side": "left"}
    facts |= {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return {token: vocabulary[token] for token in special}
