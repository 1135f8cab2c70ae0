"""The command line: options to calls, results to text. No logic of its own.

Exit codes: 0, 1 (an error, one line on stderr), 2 (usage), 3 (`verify` found the bundle wrong).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import typer

from . import output
from .attachments import Scene, attach, attach_all, parts_of, unseen
from .bundle import Bundle
from .chat_command import converse
from .engine import DEFAULT_MAX_TOKENS, Engine
from .errors import InputError, PromptError
from .limits import read_limits
from .option_files import read_format, read_ids, read_tools_file
from .options import (
    AllowDirOption,
    AllowHostOption,
    ApiKeyOption,
    BudgetOption,
    BundleArgument,
    BundlesArgument,
    CacheOption,
    DeviceOption,
    EndOption,
    FeatureCacheOption,
    FpsOption,
    FrequencyPenaltyOption,
    ImageOption,
    JsonOption,
    LimitOption,
    LogitBiasOption,
    LogprobsOption,
    MaxTokensOption,
    MinPOption,
    OutputOption,
    PagesOption,
    PanAndScanOption,
    PresencePenaltyOption,
    PromptOption,
    RawOption,
    RepetitionPenaltyOption,
    SeedOption,
    SoundOption,
    StartOption,
    Switch,
    SystemOption,
    TemperatureOption,
    ThinkingOption,
    ToolChoiceOption,
    ToolsOption,
    TopKOption,
    TopPOption,
    VersionOption,
)
from .program import run_program
from .reply import Reply
from .reply_writer import ReplyWriter, remarks
from .runtime import PREFILL_CHUNK
from .sampling import Sampling, read_logit_bias

__all__ = ["app", "main"]


app = typer.Typer(
    name="siglance",
    help="Vision-language models on this device: export them to ONNX, ask them about pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _program(version: VersionOption = False) -> None:
    """What is there beside commands."""


@app.command()
def run(
    bundle: BundleArgument = "demo",
    image: ImageOption = None,
    pages: PagesOption = None,
    fps: FpsOption = None,
    start: StartOption = None,
    end: EndOption = None,
    sound: SoundOption = False,
    prompt: PromptOption = "",
    system: SystemOption = None,
    image_tokens: BudgetOption = None,
    max_tokens: MaxTokensOption = DEFAULT_MAX_TOKENS,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    presence_penalty: PresencePenaltyOption = None,
    frequency_penalty: FrequencyPenaltyOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    logit_bias: LogitBiasOption = None,
    seed: SeedOption = None,
    candidates: Annotated[int, typer.Option(metavar="N", help="Several replies to one prompt.")] = 1,
    logprobs: LogprobsOption = None,
    schema: Annotated[Path | None, typer.Option(metavar="FILE", help="Answer in JSON by this JSON schema.")] = None,
    regex: Annotated[str | None, typer.Option(metavar="R", help="Answer with a text that this matches.")] = None,
    grammar: Annotated[Path | None, typer.Option(metavar="FILE", help="Answer by this Lark grammar.")] = None,
    detections: Annotated[bool, typer.Option("--detections", help="Answer with a list of labelled boxes.")] = False,
    stop: Annotated[list[str] | None, typer.Option(metavar="S", help="End the reply before this text.")] = None,
    raw: RawOption = False,
    pan_and_scan: PanAndScanOption = False,
    prompt_ids: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The whole prompt as a JSON list of token ids.")
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(metavar="N", help="Tokens of the prompt that run at once.")
    ] = PREFILL_CHUNK,
    logits: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npy", help="Also write the prompt's logits, float32 [prompt tokens, vocabulary]."),
    ] = None,
    tools: ToolsOption = None,
    tool_choice: ToolChoiceOption = "auto",
    thinking: ThinkingOption = False,
    cache: CacheOption = Switch.on,
    feature_cache: FeatureCacheOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    draw: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Draw the boxes of the reply.")] = None,
) -> None:
    """Ask a question about pictures, or complete a text."""
    ids = None if prompt_ids is None else read_ids(prompt_ids)
    limits = read_limits(limit or ())
    attached = attach_all(image, pages, Scene(fps, start, end, sound), limits)
    parts = parts_of(attached, prompt)
    if draw is not None and len(image or []) != 1:
        raise InputError(f"--draw draws on the picture of the prompt, which needs exactly one, not {len(image or [])}")
    if ids is None and not parts and not raw:
        raise PromptError("the prompt is empty: give a question with -p or a picture with -i")
    for option, path in (("--logits", logits), ("--draw", draw)):
        output.check_place(option, path)
    drawing = None if draw is None else output.picture_format("--draw", draw)
    canvas = None if draw is None else output.canvas(attached[0], limits)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=None if logit_bias is None else read_logit_bias(logit_bias),
        seed=seed,
    )
    format = read_format(schema, regex, grammar, detections)
    common = {"system": system, "image_tokens": image_tokens, "raw": raw, "pan_and_scan": pan_and_scan}
    common |= {"prompt_ids": ids, "tools": read_tools_file(tools), "thinking": thinking}
    with Engine.open(bundle, device=device, limits=limits, feature_cache_dir=feature_cache) as engine:
        rows = None if logits is None else engine.prompt_logits(parts, **common)
        reply: Reply | None = None
        writer = ReplyWriter(candidates)
        for chunk in engine.stream(
            parts,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop or [],
            format=format,
            candidates=candidates,
            logprobs=logprobs,
            tool_choice=tool_choice,
            prefill_chunk=prefill_chunk,
            cache=cache is Switch.on,
            **common,
        ):
            if not as_json:
                writer.write(chunk)
            reply = chunk.reply
        assert reply is not None
    if as_json:
        output.print_json(output.reply_json(reply))
    else:
        writer.end()
        for line in output.logprob_lines(reply):
            output.note(line)
        output.note(output.reply_summary(reply))
        if bundle == "demo":
            output.note(output.DEMO_NOTE)
    if logits is not None and rows is not None:
        output.write("--logits", logits, lambda file: np.save(file, rows))
    if draw is not None and drawing is not None and canvas is not None:
        picture = output.drawn(reply, canvas)
        output.write("--draw", draw, lambda file: picture.save(file, drawing))
    for remark in [*remarks(reply), *([] if image else unseen(prompt))]:
        output.note(remark)
    if not all(candidate.thought_finished for candidate in reply.candidates):
        raise typer.Exit(1)


@app.command()
def chat(
    bundle: BundleArgument = "demo",
    system: SystemOption = None,
    image_tokens: BudgetOption = None,
    max_tokens: MaxTokensOption = DEFAULT_MAX_TOKENS,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    fps: FpsOption = None,
    start: StartOption = None,
    end: EndOption = None,
    sound: SoundOption = False,
    tools: ToolsOption = None,
    tool_choice: ToolChoiceOption = "auto",
    thinking: ThinkingOption = False,
    cache: CacheOption = Switch.on,
    feature_cache: FeatureCacheOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Talk about pictures: a prompt that remembers what was said. /help lists its commands."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    limits = read_limits(limit or ())
    with Engine.open(bundle, device=device, limits=limits, feature_cache_dir=feature_cache) as engine:
        talk = engine.chat(
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
            image_tokens=image_tokens,
            tools=read_tools_file(tools),
            tool_choice=tool_choice,
            thinking=thinking,
            cache=cache is Switch.on,
        )
        if bundle == "demo":
            output.note(output.DEMO_NOTE)
        scene = Scene(fps, start, end, sound)
        converse(engine, talk, name=engine.manifest.name, attach=lambda argument: attach(argument, None, scene, limits))


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A checkpoint: a Hugging Face folder, a GGUF file, or an id on the Hugging Face hub.")
    ],
    out: OutputOption,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="auto (the default), fp32, fp16 (cuda), int8, int4, keep (the default of a GGUF)."
        ),
    ] = None,
    target: Annotated[str, typer.Option(metavar="T", help="cpu or cuda.")] = "cpu",
    context: Annotated[int, typer.Option(metavar="N", help="Most tokens of prompt and reply together.")] = 32768,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json to use instead of the checkpoint's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="R", help="Branch, tag or commit of a hub id.")] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights for the official model SOURCE: to measure size and speed.")
    ] = False,
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Also if rounding ruins the model.")] = False,
) -> None:
    """Turn a checkpoint into a bundle."""
    # The one place where the runtime reaches for the exporter: its packages come with the [export] extra.
    try:
        from ..export.exporter import export as export_checkpoint
        from ..export.families import ExportOptions
    except ModuleNotFoundError as error:
        raise InputError(f"export needs the package {error.name!r}: pip install 'siglance[export]'") from None
    options = ExportOptions(precision=precision, target=target, context=context, accept_loss=accept_loss)
    with output.progress() as report:
        result = export_checkpoint(
            source, out, options, revision=revision, tokenizer=tokenizer, random=random, progress=report
        )
    print("\n".join(result.lines()))
    for remark in result.notes:
        output.note(f"  note: {remark}")


@app.command()
def serve(
    bundles: BundlesArgument = None,
    host: Annotated[str, typer.Option(metavar="H", help="Address or name to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="P", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: ApiKeyOption = None,
    allow_dir: AllowDirOption = None,
    allow_host: AllowHostOption = None,
    queue: Annotated[int, typer.Option(metavar="N", min=0, help="Requests that may wait, for each bundle.")] = 64,
    feature_cache: FeatureCacheOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    timeout: Annotated[float, typer.Option(metavar="S", min=1, help="Seconds that a client may keep silent.")] = 30.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what is asked and answered into the log.")
    ] = False,
) -> None:
    """Answer over HTTP as Gemini, OpenAI and NVIDIA NIM do."""
    try:
        from .server import command
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs the package {error.name!r}: pip install 'siglance[server]'") from None
    settings = command.settings_of(host, port, queue, api_key, allow_dir, allow_host, limit, log_prompts, timeout)
    command.serve(bundles or ["demo"], settings, device=device, feature_cache=feature_cache)


@app.command()
def verify(bundle: BundleArgument = "demo", device: DeviceOption = "auto", as_json: JsonOption = False) -> None:
    """Replay the self-test of a bundle on this device."""
    with Engine.open(bundle, device=device) as engine:
        report = engine.verify()
    if as_json:
        print(json.dumps(output.verify_json(report)))
    else:
        print(f"{report.result}: largest logit difference {report.max_logit_difference:.2g}")
        for case in report.cases:
            print(f"  {case.name}: {case.max_logit_difference:.2g}, best token agrees {case.argmax_agreement:.0%}")
    if report.result == "wrong":
        raise typer.Exit(3)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="BUNDLE|FILE.onnx", help="A bundle, or one graph file.")] = "demo",
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle or a graph declares. That is inputs, outputs, wires, state and sizes."""
    from .inspect import inspect_bundle, inspect_graph, render

    path = Path(target)
    facts = inspect_graph(path) if path.suffix == ".onnx" else inspect_bundle(Bundle.open(target))
    print(json.dumps(facts, indent=1) if as_json else render(facts))


@app.command()
def bench(
    bundle: Annotated[
        str | None,
        typer.Argument(metavar="[BUNDLE]", help="Folder of a bundle, or a name in the cache; else the demo."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompts.")] = 512,
    image_tokens: BudgetOption = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the replies.")] = 128,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds, of which the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads; else one for each usable core.")] = None,
    perplexity: Annotated[
        Path | None, typer.Option(metavar="TEXT_FILE", help="Also measure how well the bundle predicts this text.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Measure two bundles in alternation instead; exit with 1 if B is slower."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="P", help="With --compare: by more than so many percent; else 5.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the speed and memory of a bundle. And how far both are from what this machine could do."""
    from .bench.command import bench_command

    options = {"prompt_tokens": prompt_tokens, "image_tokens": image_tokens, "new_tokens": new_tokens}
    options |= {"repeats": repeats, "threads": threads, "device": device}
    with output.progress() as report:
        slower = bench_command(bundle, compare, threshold, perplexity, as_json, report, **options)
    if slower is not None:
        output.note(f"siglance: {slower}")
        raise typer.Exit(1)


@app.command("count-tokens")
def count_tokens(
    bundle: BundleArgument = "demo",
    image: ImageOption = None,
    pages: PagesOption = None,
    fps: FpsOption = None,
    start: StartOption = None,
    end: EndOption = None,
    sound: SoundOption = False,
    prompt: PromptOption = "",
    system: SystemOption = None,
    image_tokens: BudgetOption = None,
    tools: ToolsOption = None,
    thinking: ThinkingOption = False,
    raw: RawOption = False,
    pan_and_scan: PanAndScanOption = False,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the tokens of a prompt by modality. The model does not run."""
    limits = read_limits(limit or ())
    attached = attach_all(image, pages, Scene(fps, start, end, sound), limits)
    with Engine.open(bundle, limits=limits) as engine:
        counts = engine.count_tokens(
            parts_of(attached, prompt),
            system=system,
            image_tokens=image_tokens,
            tools=read_tools_file(tools),
            thinking=thinking,
            raw=raw,
            pan_and_scan=pan_and_scan,
        )
    if as_json:
        print(json.dumps(counts))
    else:
        print("\n".join(f"{name} {count}" for name, count in counts.items()))


def main() -> NoReturn:
    """Run the program `siglance`."""
    run_program(app)
