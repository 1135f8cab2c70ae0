"""Options that several commands of the command line share."""

from __future__ import annotations

from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AllowDirOption",
    "AllowHostOption",
    "ApiKeyOption",
    "BudgetOption",
    "BundleArgument",
    "BundlesArgument",
    "CacheOption",
    "DeviceOption",
    "EndOption",
    "FeatureCacheOption",
    "FpsOption",
    "FrequencyPenaltyOption",
    "ImageOption",
    "JsonOption",
    "LimitOption",
    "LogitBiasOption",
    "LogprobsOption",
    "MaxTokensOption",
    "MinPOption",
    "OutputOption",
    "PagesOption",
    "PanAndScanOption",
    "PresencePenaltyOption",
    "PromptOption",
    "RawOption",
    "RepetitionPenaltyOption",
    "SeedOption",
    "SoundOption",
    "StartOption",
    "Switch",
    "SystemOption",
    "TemperatureOption",
    "ThinkingOption",
    "ToolChoiceOption",
    "ToolsOption",
    "TopKOption",
    "TopPOption",
    "VersionOption",
]


class Switch(Enum):
    """A choice of the command line."""

    on = "on"
    off = "off"


def _named_path(text: str) -> Path:
    """A path of the command line. An empty one, as of a variable that is not set, would be the working directory."""
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


BundlesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Folders of bundles, or names in the cache; else the demo.", metavar="[BUNDLE]..."),
]
BundleArgument = Annotated[str, typer.Argument(help="Folder of a bundle, or a name in the cache.", metavar="[BUNDLE]")]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "-i",
        "--image",
        metavar="FILE[@BUDGET]",
        help="A picture, video, sound or PDF, - for one that is piped in; with a token budget (of a picture or frame) "
        "of its own if you like.",
    ),
]
PagesOption = Annotated[
    str | None,
    typer.Option("--pages", metavar="A-B", help="Pages of the PDFs, such as 3, 1-3 or 1-3,7. Otherwise all."),
]
FpsOption = Annotated[
    float | None,
    typer.Option("--fps", metavar="F", help="Frames a second of the videos. Otherwise the bundle's own, 1 as a rule."),
]
StartOption = Annotated[
    float | None, typer.Option("--start", metavar="S", help="Second at which videos and sounds begin.")
]
EndOption = Annotated[float | None, typer.Option("--end", metavar="S", help="Second at which videos and sounds end.")]
SoundOption = Annotated[bool, typer.Option("--sound", help="Give the model the sound of the videos too.")]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=N",
        help="Let larger files in: bytes, pixels, pages, page_seconds, page_memory, video_bytes, frames, "
        "video_seconds, video_memory, audio_length, audio_seconds, audio_memory.",
    ),
]
PromptOption = Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="The question, after the pictures.")]
SystemOption = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="Text of a system turn.")]
BudgetOption = Annotated[
    int | None, typer.Option("--image-tokens", metavar="N", help="Token budget of pictures without their own.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Complete the text as it stands, without the chat template.")]
PanAndScanOption = Annotated[
    bool, typer.Option("--pan-and-scan", help="Show long pictures in crops too, if the model knows that (Gemma 3).")
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens of the reply.")]
TemperatureOption = Annotated[float | None, typer.Option("--temperature", metavar="F", help="0 is greedy.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Keep the N best tokens; 0 keeps all.")]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", metavar="F", help="Keep the best tokens up to this probability.")
]
MinPOption = Annotated[float | None, typer.Option("--min-p", metavar="F", help="Drop tokens below F times the best.")]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option("--presence-penalty", metavar="F", help="-2 to 2, off the logit of tokens that the reply has."),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty", metavar="F", help="-2 to 2, off the logit for each time that the reply has a token."
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="F",
        help="0.01 to 100, divides the logit of tokens of the prompt and the reply.",
    ),
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=F", help="Add -100 to 100 to the logit of a token."),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="N", help="Report log-probabilities, and of the N best tokens at each place."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same text.")]
CacheOption = Annotated[
    Switch, typer.Option("--cache", help="Go on from what earlier requests left, and keep encoded pictures.")
]
OutputOption = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", parser=_named_path, help="The bundle folder, new or empty.")
]
FeatureCacheOption = Annotated[
    Path | None,
    typer.Option("--feature-cache", metavar="DIR", parser=_named_path, help="Keep encoded pictures in this folder."),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="D", help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ToolsOption = Annotated[
    Path | None,
    typer.Option("--tools", metavar="FILE", help="Functions that the model may call: a JSON list of declarations."),
]
ToolChoiceOption = Annotated[
    str,
    typer.Option(
        "--tool-choice",
        metavar="C",
        help="Whether the model may call: auto (it decides), none, required (it must), or the function that it must "
        "call.",
    ),
]
ThinkingOption = Annotated[bool, typer.Option("--thinking", help="Let the model think before it answers.")]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", metavar="K", envvar="SIGLANCE_API_KEY", help="Ask for this key; give several to allow each."
    ),
]
AllowDirOption = Annotated[
    list[Path] | None,
    typer.Option("--allow-dir", metavar="D", help="Let requests name files in this folder; without it none."),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", metavar="H", help="Let requests name files on this host, NAME or NAME:PORT; without it none."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"siglance {metadata.version('siglance')}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version of siglance.")
]
