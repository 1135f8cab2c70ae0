"""int4 for onnxruntime-genai with its own model builder: CHECKPOINT TARGET.

The builder of 0.18 knows the flat rotary settings that transformers had before version 5. They are filled in from
`rope_parameters`; as they stand the builder ends with KeyError 'rope_type', or takes the local theta for all layers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from onnxruntime_genai.models import builder
from transformers import AutoConfig


class _FlatConfig:
    """AutoConfig with the settings where the builder looks for them."""

    @staticmethod
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        config = AutoConfig.from_pretrained(*arguments, **options)
        by_layer = config.rope_parameters
        config.rope_theta = by_layer["full_attention"]["rope_theta"]
        config.rope_local_base_freq = by_layer["sliding_attention"]["rope_theta"]
        config.rope_parameters = {"rope_type": "default"}
        return config


def main() -> None:
    checkpoint, target = sys.argv[1:]
    builder.AutoConfig = _FlatConfig
    Path(target).mkdir(parents=True)
    # int4_accuracy_level=4: products with int8 activations, as ours and llama.cpp's.
    source = ["", checkpoint, target, "int4", "cpu", f"{target}.cache"]
    builder.create_model(*source, **builder.parse_extra_options(*source, ["int4_accuracy_level=4"]))


if __name__ == "__main__":
    main()
