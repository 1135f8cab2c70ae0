"""Calibration of one export, in a child process: opens the checkpoint again, and leaves blocks in files.

Functions here take and return values that JSON has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .calibration import Calibration
from .calibration_choice import Chosen, choose, goal_for
from .calibration_corpus import SEQUENCE, calibration_ids
from .checkpoint import Weights
from .families import ExportOptions, find_family
from .piecewise import LazyGraph
from .plan import Plan, Span, StateScales, Storage, StoredBlocks, plan_for
from .sources import open_source

__all__ = ["Request", "calibrate", "calibrated_plan"]

_TOKENS_PER_COLUMN = 8  # fewer leave the moments of a matrix's inputs to chance
_FEWEST_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a child process needs to open the checkpoint again, and where the texts of the new bundle are."""

    source: str
    revision: str | None
    tokenizer: str | None  # the file that the caller chose
    precision: str
    target: str
    context: int
    folder: str  # of the new bundle
    template: str | None  # file name of the chat template in it
    begin: str  # the token in front of every text

    def graphs(self) -> dict[str, Callable[[LazyGraph], None]]:
        """Functions that build the graphs of the model, by name, with rotary tables for one sequence of calibration."""
        checkpoint = open_source(
            self.source,
            revision=self.revision,
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
        )
        family = find_family(checkpoint.config)
        config, weights = family.read(checkpoint.config), Weights(checkpoint, family.prefixes)
        options = ExportOptions(precision=self.precision, target=self.target, context=min(SEQUENCE, self.context))
        return {
            name: lambda graph, build=build: build(graph, weights, config, options)
            for name, build in family.graphs(config).items()
        }

    def sequences(self, tokens: int, length: int) -> list[list[int]]:
        """About `tokens` ids of the calibration text, in sequences of `length`."""
        folder = Path(self.folder)
        template = None if self.template is None else folder / self.template
        return calibration_ids(folder / "tokenizer.json", template, self.begin, length, tokens)


def calibrate(request: dict[str, Any], folder: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Choose formats and quantise: the report, and under "spans" the formats, with the files in `folder`."""
    asked = Request(**request)
    plan = plan_for(asked.precision, asked.target)
    graphs = asked.graphs()
    progress("calibration")
    calibration = Calibration(
        graphs["embed"],
        graphs["decoder"],
        lambda columns, length: asked.sequences(max(_FEWEST_TOKENS, _TOKENS_PER_COLUMN * columns), length),
        plan.formats,
        Path(folder),
    )
    calibration.observe(progress)
    states = calibration.states.scales() if plan.state_bits == 8 else {}
    chosen = choose(calibration.measured(), goal_for(asked.precision))
    spans = calibration.quantise(chosen, progress)
    losses = [each.loss for each in chosen if each.loss is not None]
    weights = sum(each.measured.shape[0] * each.measured.columns for each in chosen)
    return {
        "tokens": calibration.tokens,
        "loss": round(sum(losses), 6) if losses else None,
        "bits_per_weight": round(8 * sum(each.nbytes for each in chosen) / max(1, weights), 3),
        "matrices": [_matrix_report(each, spans[each.measured.key][0].blocks is not None) for each in chosen],
        "layers_with_states_of_8_bits": list(states),
        "states": [{"layer": layer} | asdict(scales) for layer, scales in states.items()],
        "spans": {key: [asdict(span) | {"blocks": _path(span)} for span in each] for key, each in spans.items()},
    }


def calibrated_plan(plan: Plan, report: dict[str, Any]) -> Plan:
    """`plan` with what `calibrate` chose and stored."""
    chosen = {}
    for key, spans in report["spans"].items():
        found = []
        for span in spans:
            storage, path = Storage(**span["storage"]), span["blocks"]
            blocks = None if path is None else StoredBlocks(Path(path), storage)
            found.append(Span(span["start"], span["stop"], storage, blocks))
        chosen[key] = tuple(found)
    states = {each["layer"]: StateScales(tuple(each["keys"]), each["value"]) for each in report["states"]}
    return replace(plan, chosen=chosen, states=states)


def _path(span: Span) -> str | None:
    return None if span.blocks is None else str(span.blocks.path)


def _matrix_report(chosen: Chosen, has_blocks: bool) -> dict[str, Any]:
    matrix, storage = chosen.measured, chosen.storage
    losses = {str(each): round(loss, 6) for each, loss in matrix.losses.items() if loss is not None}
    if not has_blocks:
        reason = "only looked up: scales searched" if losses else "its inputs are not seen: scales searched"
    elif len(matrix.losses) == 1:
        reason = "the only format of this precision that fits"
    else:
        reason = "measured loss"
    return {
        "key": matrix.key,
        "rows": [matrix.start, matrix.stop],
        "columns": matrix.columns,
        "bits": storage.bits,
        "block": storage.block,
        "losses": losses,
        "reason": reason,
    }
