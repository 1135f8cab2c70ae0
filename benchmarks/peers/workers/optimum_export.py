"""fp32 ONNX with optimum-onnx: CHECKPOINT TARGET."""

from __future__ import annotations

import sys

from optimum.exporters.onnx import main_export


def main() -> None:
    checkpoint, target = sys.argv[1:]
    main_export(checkpoint, output=target, task="text-generation-with-past", do_validation=False)


if __name__ == "__main__":
    main()
