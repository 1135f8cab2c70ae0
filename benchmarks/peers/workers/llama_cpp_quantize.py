"""Quantise a GGUF file with llama.cpp: SOURCE TARGET FILE_TYPE EMBEDDING_TYPE (numbers of llama.h and ggml.h)."""

from __future__ import annotations

import sys

import llama_cpp


def main() -> None:
    source, target, file_type, embedding = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.token_embedding_type = params.output_tensor_type = int(embedding)
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize gave {status}")


if __name__ == "__main__":
    main()
