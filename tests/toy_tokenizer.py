"""A small tokenizer in memory, built like Gemma's: BPE with byte fallback, and the special tokens of Gemma 4.

Like the real one it has added tokens that are not special ("\\n\\n" and longer, some HTML tags), no prefix space, and
a post-processor that would add a BOS of its own if it were asked to.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Replace as DecodeReplace
from tokenizers.decoders import Sequence as DecodeSequence
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

GEMMA4_SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),  # ids 0 to 4 in every family
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
GEMMA3_SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
LOCATIONS = ("<loc0000>", "<loc0001>", "<loc1023>")  # PaliGemma's
PLAIN_ADDED = ("\n\n", "\n\n\n", "\n\n\n\n", "<h3>", "</h3>", "<table>")
CHARACTERS = "".join(map(chr, range(32, 127))).replace(" ", "") + "\n\t▁éßñ…你好世界שלוםа\u0301\u200d"
WORDS = ("▁the", "▁what", "▁is", "hello", "▁world", "user", "model", "stop", "▁fox", "own", "turn", "image", "bos")


def toy_tokenizer() -> Tokenizer:
    """Build the tokenizer. Characters outside CHARACTERS (emoji, most of CJK) take the byte fallback."""
    tokens = [*GEMMA4_SPECIAL, *GEMMA3_SPECIAL, *LOCATIONS, *PLAIN_ADDED]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += dict.fromkeys(CHARACTERS)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split(" ", "merged_with_previous")
    tokenizer.decoder = DecodeSequence([DecodeReplace("▁", " "), ByteFallback(), Fuse()])
    tokenizer.add_special_tokens([*GEMMA4_SPECIAL, *GEMMA3_SPECIAL, *LOCATIONS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED])
    begin = vocabulary["<bos>"]
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return tokenizer
