"""The whole measurement of one bundle, and of two against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..bundle import Bundle
from ..graph import usable_cores
from ..runtime import PREFILL_CHUNK
from .memory import Memory, measure_memory
from .overhead import Overhead, measure_overhead
from .probes import Probes
from .subject import Options, Request, Round, Subject
from .traffic import Cost, Format, Traffic

__all__ = ["Comparison", "Limit", "Measured", "Spread", "compare", "limit", "measure", "speeds"]

Clock = Callable[[], float]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time that this machine needs for a cost, in seconds: the slower of memory and arithmetic."""

    memory: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def bound_by(self) -> str:
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that is known of one bundle.

    Limits and overhead are None on devices where they are not measured: a GPU's kernels run beside the processor, and
    what its profile shows is how long it took to start them.
    """

    subject: Subject
    rounds: list[Round]
    requests: list[Request]
    overhead: Overhead | None
    memory: Memory | None
    costs: dict[str, Cost]  # "decode" (one step), "prefill" (the prompt), "vision" (a picture)
    limits: dict[str, Limit] | None
    probes: Probes | None

    def speeds(self) -> dict[str, Spread]:
        """Tokens a second."""
        return speeds(self.subject, self.rounds)


def speeds(subject: Subject, rounds: Sequence[Round]) -> dict[str, Spread]:
    """Tokens a second: decode, prefill, and soft tokens of pictures where the bundle sees."""
    found = {
        "decode": Spread.of([len(one.steps) / sum(one.steps) for one in rounds]),
        "prefill": Spread.of([subject.options.prompt_tokens / one.prefill for one in rounds]),
    }
    seen = [one.vision for one in rounds if one.vision is not None]
    if seen:
        count = subject.soft_tokens
        found["vision"] = Spread.of([count / seconds for seconds in seen])
    return found


def measure(bundle: Bundle, options: Options, report: Report, clock: Clock = time.perf_counter) -> Measured:
    """Measure a bundle; `report` is told what is being done."""
    report("loading")
    subject = Subject(bundle, options, clock=clock)
    report("warming up")
    subject.warm_up()
    rounds, requests = [], []
    probes = Probes(options.threads or usable_cores(), clock) if subject.device == "cpu" else None
    for index in range(options.repeats):
        report(f"round {index + 1} of {options.repeats}")
        if probes is not None:
            probes.read()
        rounds.append(subject.round())
        requests.append(subject.request())
    costs, ids = _costs(subject), subject.ids()
    subject.close()
    report("measuring memory")
    memory = measure_memory(bundle, options)
    overhead = limits = None
    if probes is not None:
        report("measuring the machine")
        overhead = measure_overhead(bundle, options, ids, probes, clock)
        limits = {name: limit(cost, probes, _rows(subject, name)) for name, cost in costs.items()}
    return Measured(
        subject=subject,
        rounds=rounds,
        requests=requests,
        overhead=overhead,
        memory=memory,
        costs=costs,
        limits=limits,
        probes=probes,
    )


def _costs(subject: Subject) -> dict[str, Cost]:
    options, traffic = subject.options, Traffic(subject.bundle)
    costs = {
        # The step in the middle of those that are measured.
        "decode": traffic.step(options.prompt_tokens + options.new_tokens // 2),
        "prefill": traffic.prompt(options.prompt_tokens, PREFILL_CHUNK),
    }
    if subject.patches:
        costs["vision"] = traffic.vision(subject.patches)
    return costs


def _rows(subject: Subject, name: str) -> int:
    """Rows of the matrix products of a stage."""
    prompt = min(subject.options.prompt_tokens, PREFILL_CHUNK)
    return {"decode": 1, "prefill": prompt, "vision": subject.patches}[name]


def limit(cost: Cost, probes: Probes, rows: int) -> Limit:
    """The least time for a cost, of a run with so many rows.

    Products of one row run at the rate of their format. Of many rows, at that or at float32's, whichever is better,
    because a matrix may be turned into floats first; attention runs at float32's.
    """
    arithmetic, floats = 0.0, 0.0
    if rows > 1:
        floats = max(probes.product(Format(32), cost.main_shape(format)[0], rows) for format in cost.products)
        arithmetic = cost.attention / floats
    for format, operations in cost.products.items():
        rate = probes.product(format, cost.main_shape(format)[0], rows)
        arithmetic += operations / max(rate, floats)
    return Limit(cost.nbytes / probes.bandwidth(), arithmetic)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Speed of B over that of A, for each pair of neighbouring rounds."""

    speeds: tuple[dict[str, Spread], dict[str, Spread]]
    ratios: dict[str, Spread]

    def slower(self, threshold: float) -> dict[str, float]:
        """The ratios of what is slower in B by more than `threshold` percent."""
        return {name: found.median for name, found in self.ratios.items() if found.median < 1 - threshold / 100}


def compare(subjects: tuple[Subject, Subject], report: Report) -> Comparison:
    """Measure two bundles in alternation: A B A B. What only one of them can do is left out."""
    repeats = subjects[0].options.repeats
    for subject in subjects:
        report(f"warming up {subject.bundle.folder.name}")
        subject.warm_up()
    rounds: tuple[list[Round], list[Round]] = ([], [])
    for index in range(repeats):
        for subject, found in zip(subjects, rounds, strict=True):
            report(f"round {index + 1} of {repeats}: {subject.bundle.folder.name}")
            found.append(subject.round())
    first, second = ([speeds(subject, [one]) for one in found] for subject, found in zip(subjects, rounds, strict=True))
    both = [name for name in first[0] if name in second[0]]
    ratios = {
        name: Spread.of([b[name].median / a[name].median for a, b in zip(first, second, strict=True)]) for name in both
    }
    return Comparison((speeds(subjects[0], rounds[0]), speeds(subjects[1], rounds[1])), ratios)
