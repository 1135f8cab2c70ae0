"""The demo model's tokenizer and chat template, built by hand: a small vocabulary with Gemma 4's special tokens.

Byte-pair merges are not learnt here. Each piece the replies are made of ("circle", `"label": "`, "340") is given a
chain of merges that grows it from the left, one character at a time, so that it always comes out as one token. The rest
falls back to single characters, and what is not printable ASCII to bytes: any UTF-8 text survives a round trip.
"""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .scenes import COLOURS, SHAPES, SIGN_WORDS
from .tasks import COORDINATE_STEP, NO_SIGN

VOCABULARY_SIZE = 768

# The ids of the published Gemma 4 tokenizer, where they fit a vocabulary this small.
SPECIAL_TOKENS: dict[str, int] = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": VOCABULARY_SIZE - 7,
    "<|audio>": VOCABULARY_SIZE - 6,
    "<|image|>": VOCABULARY_SIZE - 5,
    "<|audio|>": VOCABULARY_SIZE - 4,
    "<image|>": VOCABULARY_SIZE - 3,
    "<audio|>": VOCABULARY_SIZE - 2,
    "<|video|>": VOCABULARY_SIZE - 1,
}
NEWLINE_ID, TWO_NEWLINES_ID = 107, 108
FIRST_BYTE_ID = 109

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what a space looks like inside the vocabulary
COORDINATES = tuple(str(value) for value in range(0, 1001, COORDINATE_STEP))

# Words that get a token of their own, bare and after a space.
_WORDS = (*COLOURS, *SHAPES, "describe", "detect", "count", "read", "There", "sign", "and", "is", "all", NO_SIGN)
_WHOLE_ONLY = ("user", "model", "system", *SIGN_WORDS)
_JSON_PIECES = ('[{"box_2d": [', '"}, {"box_2d": [', '], "label": "', '"}]', "[]", ", ", ", a", " a")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- macro render(content) -%}
{%- if content is string -%}{{- content | trim -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == "text" -%}{{- part.text | trim -}}
{%- elif part.type == "image" -%}{{- "<|image|>" -}}
{%- elif part.type == "audio" -%}{{- "<|audio|>" -}}
{%- elif part.type == "video" -%}{{- "<|video|>" -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set role = "model" if message.role == "assistant" else "system" if message.role == "developer" else message.role -%}
{{- "<|turn>" + role + "\\n" + render(message.content) + "<turn|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|turn>model\\n" -}}{%- endif -%}
"""


def expand_images(prompt: str, soft_tokens: list[int]) -> str:
    """`prompt` with the i-th `<|image|>` replaced by its bracketed run of `soft_tokens[i]` placeholders."""
    head, *tails = prompt.split("<|image|>")
    if len(tails) != len(soft_tokens):
        raise ValueError(f"{len(tails)} image placeholders in the prompt, {len(soft_tokens)} images given")
    for count, tail in zip(soft_tokens, tails, strict=True):
        head += "<|image>" + "<|image|>" * count + "<image|>" + tail
    return head


def _merges() -> list[tuple[str, str]]:
    """Merge rules in order of precedence; see the module docstring."""
    merges: dict[tuple[str, str], None] = {("\n", "\n"): None}
    for tens in "123456789":  # "40" before "34": then "340" is "3" + "40", and only multiples of ten ever merge
        merges[tens, "0"] = None
    for number in COORDINATES:
        if len(number) >= 3:
            cut = len(number) - 1 if number.endswith("00") else 1
            merges[number[:cut], number[cut:]] = None
    pieces = sorted((piece.replace(" ", SPACE) for piece in (*_JSON_PIECES, *_WORDS)), key=len, reverse=True)
    for piece in (*_WHOLE_ONLY, *pieces):  # longest first: "square" must win over the "re" of "red"
        for end in range(1, len(piece)):
            merges[piece[:end], piece[end]] = None
    for word in _WORDS:
        merges[SPACE, word] = None
    return list(merges)


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id; ids that nothing claims are filled with `<unusedN>`."""
    ids = dict(SPECIAL_TOKENS)
    ids["\n"], ids["\n\n"] = NEWLINE_ID, TWO_NEWLINES_ID
    ids |= {f"<0x{byte:02X}>": FIRST_BYTE_ID + byte for byte in range(256)}
    free = iter(range(FIRST_BYTE_ID + 256, SPECIAL_TOKENS["<|image>"]))
    # The coordinates come first and in order, so that training can address them as one block.
    characters = [SPACE, *(chr(code) for code in range(33, 127))]
    for token in (*COORDINATES, *characters, *(left + right for left, right in merges)):
        if token not in ids:
            ids[token] = next(free)
    taken = set(ids.values())
    unused = (number for number in range(VOCABULARY_SIZE) if number not in taken)
    ids |= {f"<unused{position}>": number for position, number in enumerate(unused)}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def build() -> Tokenizer:
    """The tokenizer, from nothing."""
    merges = _merges()
    tokenizer = Tokenizer(BPE(_vocabulary(merges), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


@lru_cache(maxsize=1)
def shared() -> Tokenizer:
    """One tokenizer for all of training and scoring."""
    return build()


def encode(text: str) -> list[int]:
    """Token ids of rendered prompt text; special tokens are recognised, none is added."""
    return shared().encode(text, add_special_tokens=False).ids


def first_coordinate_id() -> int:
    """Id of "0"; the other coordinates follow in order."""
    first = shared().token_to_id(COORDINATES[0])
    assert first is not None
    return first


def prompt_parts(question: str, soft_tokens: int) -> tuple[str, str]:
    """The rendered prompt of one image and one question, cut after the image: what questions share, and the rest.

    `tests/test_demo_scenes.py` checks that the two together are what the chat template renders.
    """
    return (
        expand_images("<bos><|turn>user\n<|image|>", [soft_tokens]),
        f"{question}<turn|>\n<|turn>model\n",
    )


def write(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    build().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "processor_class": "Gemma4Processor",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
