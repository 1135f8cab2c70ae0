"""From a checkpoint folder to a bundle folder.

The bundle is built in a temporary sibling folder and renamed at the end: an export that fails or is killed leaves
nothing that looks like a bundle. The source is only read. The finished bundle is opened and run once in a child process
so that this process's memory stays small.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..engine.errors import BundleError, ExportError
from ..engine.manifest import (
    FORMAT,
    MANIFEST_NAME,
    FileFact,
    Manifest,
    PromptFacts,
    write_manifest,
)
from ..engine.template import ChatTemplate
from .builder import GraphBuilder, WeightsFile
from .calibration_run import Request, calibrate, calibrated_plan
from .checkpoint import Checkpoint, Weights
from .child import in_child
from .cuda_rules import broken_rules
from .families import ExportOptions, Facts, Family, find_family
from .generation import sampling_facts, stop_ids
from .graph_losses import check_losses
from .output_folder import check_output, output_folder
from .plan import Plan, plan_for
from .random_checkpoint import RandomCheckpoint, RandomWeights
from .self_check import record_self_test, special_tokens, tokenizer_ids
from .sources import open_source

__all__ = ["ExportReport", "export"]

# Of a checkpoint whose matrices are not quantised.
DEFAULT_PRECISION = "auto"

_TOKEN = re.compile(r"<[^<>\s]+>")  # the tokens in what surrounds a picture, which may have line breaks in it too


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written: the folder, nodes and weight bytes per graph, parts of the checkpoint that were left out, and
    `notes`, what the user of the bundle should know.

    `graphs` maps names to {"nodes", "weight_bytes", "dtypes": bytes by dtype} and, where matrices are not float32, what
    that costs: {"cosine"}, for the decoder also {"argmax_agreement"} (see `graph_losses`). A weight that several graphs
    use counts in each of them and in `total_bytes`, the size of the folder, once.
    """

    folder: Path
    family: str
    precision: str
    graphs: dict[str, dict[str, Any]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    total_bytes: int

    def lines(self) -> list[str]:
        """The report for people, without the notes."""
        head = f"{self.folder}: {self.family}, {self.precision}, {self.total_bytes / 1e6:.1f} MB"
        graphs = [f"  {name}: {self._graph_line(name)}" for name in self.graphs]
        return [head, *graphs, *(f"  left out: {part}" for part in self.left_out)]

    def _graph_line(self, name: str) -> str:
        facts = self.graphs[name]
        line = f"{facts['nodes']} nodes, {facts['weight_bytes'] / 1e6:.1f} MB of weights"
        if "cosine" in facts:
            line += f", cosine {facts['cosine']:.4f}"
        if "argmax_agreement" in facts:
            line += f", best token as in float32 {facts['argmax_agreement']:.0%}"
        return line


def export(
    source: Path | str,
    output: Path,
    options: ExportOptions | None = None,
    *,
    revision: str | None = None,
    tokenizer: Path | None = None,
    random: bool = False,
    name: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportReport:
    """Export the checkpoint that `source` names to the bundle folder `output`, which is new or empty.

    `source` is a Hugging Face folder, a GGUF file or a hub id (of branch, tag or commit `revision`); `tokenizer` is a
    tokenizer.json to use instead of the checkpoint's own. With `random`, `source` is the hub id of an official model,
    whose built-in configuration is filled with random weights and tokens. `progress` is called with the name of each
    stage as it begins. The context is never longer than what the model was made for; the report says so. Raises
    ExportError for anything that cannot be exported; nothing is left behind in that case.
    """
    options = options or ExportOptions()
    if options.context < 1:
        raise ExportError(f"context {options.context} must be at least 1 token")
    check_output(output)
    checkpoint: Checkpoint
    if random:
        if revision is not None or tokenizer is not None:
            raise ExportError("a random model has no revision, and its own tokenizer")
        checkpoint = RandomCheckpoint(str(source))
    else:
        checkpoint = open_source(source, revision=revision, tokenizer=tokenizer)
    if checkpoint.folder is not None and output.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise ExportError(f"{output} is inside the checkpoint's folder, which is only read; choose another place")
    plan = plan_for(options.precision or ("keep" if checkpoint.quantised else DEFAULT_PRECISION), options.target)
    family = find_family(checkpoint.config)
    config = family.read(checkpoint.config)
    for check in (stop_ids, sampling_facts, _begin):  # the manifest needs them when everything else is done
        check(checkpoint)
    checkpoint.names()
    # A child process opens the same files: a hub id may have been downloaded to a folder.
    local = checkpoint.folder or (Path(source) if os.path.exists(source) else None)
    place = (str(source), checkpoint.revision) if local is None else (str(local), None)
    again = _Source(*place, None if tokenizer is None else str(tokenizer))
    name = name or output.resolve().name
    try:
        with output_folder(output) as folder:
            report = _write(checkpoint, family, config, options, plan, again, folder, name, progress)
    except OSError as error:
        raise ExportError(f"the bundle cannot be written to {output.parent}: {error}") from None
    return dataclasses.replace(report, folder=output)


@dataclass(frozen=True, slots=True)
class _Source:
    """How a child process opens the checkpoint again."""

    source: str
    revision: str | None
    tokenizer: str | None


def _write(
    checkpoint: Checkpoint,
    family: Family,
    config: Any,
    options: ExportOptions,
    plan: Plan,
    source: _Source,
    folder: Path,
    name: str,
    progress: Callable[[str], None],
) -> ExportReport:
    progress("tokenizer")
    texts = checkpoint.write_texts(folder)
    if "chat_template" in texts:
        _check_template(folder / texts["chat_template"])
    request = Request(
        **dataclasses.asdict(source),
        precision=plan.precision,
        target=options.target,
        context=options.context,
        folder=str(folder),
        template=texts.get("chat_template"),
        begin=_begin(checkpoint),
    )
    random = isinstance(checkpoint, RandomCheckpoint)
    weights = RandomWeights(checkpoint) if random else Weights(checkpoint, family.prefixes)
    with _calibrated(plan, None if random else request, folder.parent, progress) as (plan, calibration):
        summaries, weights_fact = _write_graphs(family, weights, config, options, plan, folder, name, progress)
    facts = family.finish(checkpoint, weights, config, options)
    weights.check_all_used()
    if facts.layout == "media_first" and "chat_template" in texts:
        # The model has no turns; a repository may carry a template all the same.
        (folder / texts.pop("chat_template")).unlink()
    files = {graph_name: _file_fact(folder / f"{graph_name}.onnx") for graph_name in summaries}
    files["weights"] = weights_fact
    files |= {key: _file_fact(folder / file) for key, file in texts.items()}
    facts = _without_missing_videos(facts, folder)
    manifest = _manifest(checkpoint, family, options, plan, facts, files, folder, name)
    notes = (*facts.notes, *_notes(checkpoint, plan, options, manifest.context))
    facts = dataclasses.replace(facts, notes=notes)
    progress("self-test")
    # The manifest travels as text; its file is written last, so that a killed export leaves no siglance.json.
    # Blocks are multiplied as they are only after packing; float weights stay mapped instead of being copied.
    prepack = plan.decoder_bits < 16 or plan.keep
    compared = plan.precision != "fp32" and not random
    request = dataclasses.replace(request, template=texts.get("chat_template"))
    tried = in_child(
        record_self_test,
        *(str(folder), write_manifest(manifest), prepack),
        dataclasses.asdict(request) if compared else None,
    )
    if not options.accept_loss:
        check_losses(tried["graphs"])
    summaries = {key: facts | tried["graphs"].get(key, {}) for key, facts in summaries.items()}
    (folder / "self_test.json").write_text(tried["self_test"], encoding="utf-8")
    provenance = _provenance(checkpoint, options, plan, summaries, facts) | {"calibration": calibration}
    (folder / "export.json").write_text(json.dumps(provenance, indent=1) + "\n")
    files |= {key: _file_fact(folder / f"{key}.json") for key in ("self_test", "export")}
    (folder / MANIFEST_NAME).write_text(write_manifest(dataclasses.replace(manifest, files=files)), encoding="utf-8")
    return ExportReport(
        folder=folder,
        family=family.name,
        precision=plan.precision,
        graphs=summaries,
        left_out=facts.left_out,
        notes=facts.notes,
        total_bytes=sum(path.stat().st_size for path in folder.iterdir()),
    )


@contextmanager
def _calibrated(
    plan: Plan, request: Request | None, folder: Path, progress: Callable[[str], None]
) -> Iterator[tuple[Plan, dict[str, Any] | None]]:
    """The plan with what calibration finds, and its report; None where there is nothing to calibrate.

    Blocks stand in files inside `folder` until the end of the context.
    """
    if not plan.measured_bits:
        yield plan, None
        return
    if request is None:
        yield plan, {"skipped": "the weights are random: 4 bits everywhere, not calibrated"}
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="calibration.") as temporary:
        report = in_child(calibrate, dataclasses.asdict(request), temporary, progress=progress)
        plan = calibrated_plan(plan, report)
        yield plan, {key: value for key, value in report.items() if key not in ("spans", "states")}


def _write_graphs(
    family: Family,
    weights: Weights,
    config: Any,
    options: ExportOptions,
    plan: Plan,
    folder: Path,
    name: str,
    progress: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], FileFact]:
    """Write all graphs and the file of their weights; returns summaries of the graphs by name."""
    summaries = {}
    progress("weights")
    with WeightsFile(folder / "weights.bin") as data:
        for graph_name, build in family.graphs(config).items():
            progress(graph_name)
            graph = GraphBuilder(graph_name, data, plan)
            build(graph, weights, config, options)
            if options.target == "cuda" and graph_name != "embed":  # which runs on the host
                _check_cuda(graph)
            graph.save(folder / f"{graph_name}.onnx", name)
            summaries[graph_name] = graph.summary()
    return summaries, FileFact(path="weights.bin", size=data.path.stat().st_size, sha256=data.sha256)


def _check_template(path: Path) -> None:
    """Raise ExportError for a chat template that no engine would open."""
    try:
        ChatTemplate(path.read_text(encoding="utf-8"))
    except BundleError as error:
        raise ExportError(str(error)) from None


def _check_cuda(graph: GraphBuilder) -> None:
    """Raise ExportError for a graph that CUDA cannot run, or only wrongly or on the CPU."""
    broken = broken_rules(graph.graph)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ExportError(f"the graph {graph.name!r} does not suit --target cuda: {'; '.join(broken[:3])}{more}")


def _without_missing_videos(facts: Facts, folder: Path) -> Facts:
    """Facts without videos if the tokenizer has no special token for the frames of one."""
    if facts.video_prompt is None:
        return facts
    soft = facts.video_prompt.soft
    if soft in in_child(special_tokens, str(folder / "tokenizer.json")):
        return facts
    left_out = (*facts.left_out, f"video: the tokenizer has no special token {soft!r}")
    requires = tuple(name for name in facts.requires if not name.startswith("video:"))
    return dataclasses.replace(facts, video=None, video_prompt=None, requires=requires, left_out=left_out)


def _manifest(
    checkpoint: Checkpoint,
    family: Family,
    options: ExportOptions,
    plan: Plan,
    facts: Facts,
    files: dict[str, FileFact],
    folder: Path,
    name: str,
) -> Manifest:
    text = checkpoint.config.get("text_config") or checkpoint.config
    begin = _begin(checkpoint)
    prompt = PromptFacts(
        begin=begin,
        layout=facts.layout,
        end=facts.prompt_end,
        image=facts.image_prompt,
        video=facts.video_prompt,
        audio=facts.audio_prompt,
    )
    spelled = "".join(each.item + each.before + each.soft + each.after for each in prompt.placeholders.values())
    required = [begin, *_TOKEN.findall(spelled)]
    ids = in_child(tokenizer_ids, str(folder / "tokenizer.json"), (*required, *facts.turn_ends))
    missing = [token for token in required if token not in ids]
    if missing:
        raise ExportError(f"tokenizer.json has no token {', '.join(map(repr, missing))}")
    return Manifest(
        format=FORMAT,
        family=family.name,
        name=name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        target=options.target,
        precision=plan.precision,
        requires=facts.requires,
        modalities=("text", *(kind for kind in ("image", "video", "audio") if getattr(facts, kind) is not None)),
        context=min(facts.context or int(text.get("max_position_embeddings", options.context)), options.context),
        stop_ids=tuple(sorted(stop_ids(checkpoint) | {ids[token] for token in facts.turn_ends if token in ids})),
        files=files,
        image=facts.image,
        video=facts.video,
        audio=facts.audio,
        prompt=prompt,
        reply=facts.reply,
        state=facts.state,
        sampling=sampling_facts(checkpoint),
    )


def _notes(checkpoint: Checkpoint, plan: Plan, options: ExportOptions, context: int) -> list[str]:
    """What differs from what one may have expected."""
    notes = []
    if context < options.context:
        notes.append(f"the context is {context} tokens, all that the model was made for, and not {options.context}")
    widened = checkpoint.widened() if plan.keep else {}
    if widened:
        kinds = ", ".join(f"{kind} ({count / 1e6:.1f} M weights)" for kind, count in widened.items())
        notes.append(
            f"onnxruntime has no blocks like those of {kinds}: they are stored without loss as "
            f"{plan.dtype.name.lower()}, which is larger and slower; another precision quantises anew"
        )
    return notes


def _begin(checkpoint: Checkpoint) -> str:
    """The token in front of every prompt."""
    begin = checkpoint.json("tokenizer_config.json").get("bos_token") or "<bos>"
    begin = begin.get("content") if isinstance(begin, dict) else begin
    if not isinstance(begin, str):
        raise ExportError(f"tokenizer_config.json: bos_token {begin!r} is not a token")
    return begin


def _provenance(
    checkpoint: Checkpoint, options: ExportOptions, plan: Plan, summaries: dict[str, dict[str, Any]], facts: Facts
) -> dict[str, Any]:
    packages = ("onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "safetensors", "tokenizers", "siglance")
    versions = {package: _version(package) for package in packages}
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "architectures": checkpoint.config.get("architectures"),
        "options": dataclasses.asdict(options) | {"precision": plan.precision},
        "graphs": summaries,
        "left_out": list(facts.left_out),
        "notes": list(facts.notes),
        "versions": {package: version for package, version in versions.items() if version}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # of the two onnxruntime packages only one is installed
        return None


def _file_fact(path: Path) -> FileFact:
    with path.open("rb") as file:
        return FileFact(
            path=path.name, size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
        )
