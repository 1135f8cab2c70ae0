"""`optimum-cli export siglance`: `siglance export` for people who live in optimum.

optimum looks for commands in the namespace package `optimum.commands.register`, of which every installed distribution
may bring a part. This file is ours: it is installed there (pyproject.toml maps the folder), so it has no `__init__.py`
beside it and imports siglance by name. optimum imports it at every start; siglance is imported when the command runs.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # pyright: ignore[reportMissingImports]
from optimum.commands.export.base import ExportCommand  # pyright: ignore[reportMissingImports]

__all__ = ["REGISTER_COMMANDS", "SiglanceExportCommand"]


class SiglanceExportCommand(BaseOptimumCLICommand):
    """Options as optimum spells them; the work, its report and its errors are those of `siglance export`."""

    COMMAND = CommandInfo(
        name="siglance",
        help="Export PaliGemma, Gemma 3 and Gemma 4 to a siglance bundle (ONNX, built without tracing).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        required = parser.add_argument_group("Required arguments")
        required.add_argument(
            "-m", "--model", required=True, help="A checkpoint: a folder, a GGUF file or an id on the Hugging Face hub."
        )
        required.add_argument("output", type=Path, help="The bundle folder, new or empty.")
        optional = parser.add_argument_group("Optional arguments")
        optional.add_argument("--precision", help="As `siglance export --precision`; see its help for the default.")
        optional.add_argument("--target", default="cpu", help="cpu or cuda.")
        optional.add_argument("--context", type=int, default=32768, help="Most tokens of prompt and reply together.")
        optional.add_argument("--tokenizer", type=Path, help="A tokenizer.json to use instead of the checkpoint's.")
        optional.add_argument("--revision", help="Branch, tag or commit of a hub id.")
        optional.add_argument("--accept-loss", action="store_true", help="Also if little is left of the model.")

    def run(self) -> None:
        from siglance.engine.cli import export  # pyright: ignore[reportMissingImports]
        from siglance.engine.errors import SiglanceError  # pyright: ignore[reportMissingImports]

        options: Any = self.args  # None only before the command line is read
        try:
            export(
                options.model,
                options.output,
                precision=options.precision,
                target=options.target,
                context=options.context,
                tokenizer=options.tokenizer,
                revision=options.revision,
                accept_loss=options.accept_loss,
            )
        except SiglanceError as error:
            raise SystemExit(f"siglance: {' '.join(str(error).split())}") from None


REGISTER_COMMANDS = [(SiglanceExportCommand, ExportCommand)]
