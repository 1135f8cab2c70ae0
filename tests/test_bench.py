"""`siglance bench`: what it measures, how it compares, what it prints. Time is faked where a law needs it."""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from siglance.engine import cli
from siglance.engine.bench import command, measure, memory, overhead, probes, report, subject
from siglance.engine.bench.measure import Comparison, Spread
from siglance.engine.bench.probes import Probes
from siglance.engine.bench.subject import Options, Subject
from siglance.engine.bench.traffic import Cost, Format
from siglance.engine.bundle import Bundle
from siglance.engine.errors import InputError
from siglance.engine.reply import Timings

FP32, INT4 = Format(32), Format(4, 32, 4)
QUICK = {"prompt_tokens": 40, "new_tokens": 6, "repeats": 2, "threads": 1}


@pytest.fixture(scope="module")
def demo():
    return Bundle.open("demo")


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch):
    """Small arrays and few runs: these tests are about what is done with a rate."""
    monkeypatch.setattr(probes, "_SECONDS", 0.0)
    monkeypatch.setattr(probes, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(probes, "_GEMV_BYTES", (1 << 16, 1 << 18))
    monkeypatch.setattr(probes, "_GEMM_OUTPUTS", 64)


class Ticks:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["siglance", "bench", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return cast(int, left.value.code or 0), captured.out, captured.err


QUICK_ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]


# --- one bundle


@pytest.fixture(scope="module")
def facts(demo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "_SECONDS", 0.0)
        patch.setattr(probes, "_READ_BYTES", 1 << 20)
        return report.measured_json(measure.measure(demo, Options(**QUICK), lambda stage: None))


def test_the_json_has_what_is_promised(facts):
    json.dumps(facts)
    promised = {"decode", "prefill", "vision", "ttft_ms", "peak_mb", "machine", "versions", "device", "providers"}
    assert promised | {"threads", "bytes", "rates", "options", "bundle"} <= facts.keys()
    for stage in ("decode", "prefill", "vision"):
        speed = facts[stage]
        assert 0 < speed["min"] <= speed["tokens_per_second"] <= speed["max"]
        assert speed["percent_of_limit"] == pytest.approx(
            100 * speed["tokens_per_second"] / speed["limit"]["tokens_per_second"], rel=0.01
        )
    assert {"siglance", "onnxruntime", "numpy", "python"} <= facts["versions"].keys()
    assert facts["machine"]["cpu"]
    assert (facts["device"], facts["threads"]) == ("cpu", 1)
    assert facts["providers"]["decoder"] == ["CPUExecutionProvider"]
    assert facts["options"]["prompt_tokens"] == 40


def test_the_stages_are_parts_of_the_time_to_the_first_token(facts):
    ttft = facts["ttft_ms"]
    assert all(ttft[name] > 0 for name in ("decode_file", "resize", "vision", "prefill", "first_sample"))
    assert ttft["audio"] == 0
    assert sum(ttft[name] for name in report.STAGES) == pytest.approx(ttft["total"], rel=0.01)
    assert ttft["prompt_tokens"] >= 40


def test_a_step_is_kernels_and_runtime_and_python(facts):
    outside = facts["decode"]["outside_kernels"]
    assert outside["kernels_ms"] > 0
    assert outside["python_ms"] > 0
    assert outside["nodes"] > 100
    assert outside["step_ms"] == pytest.approx(
        outside["kernels_ms"] + outside["runtime_ms"] + outside["python_ms"], rel=0.01
    )
    assert outside["percent"] == pytest.approx(100 * (1 - outside["kernels_ms"] / outside["step_ms"]), rel=0.01)
    assert {"MatMul", "GroupQueryAttention"} <= outside["by_operator_ms"].keys()
    percentiles = facts["decode"]["per_token_ms"]
    assert percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"]


def test_memory_is_that_of_a_process_of_its_own(facts):
    memory = facts["memory"]
    assert facts["peak_mb"] == memory["peak_mb"] >= memory["resident_mb"] > 30
    assert memory["peak_mb"] >= memory["loaded_mb"]
    assert memory["peak_mb"] < 400  # this test process holds more than the demo needs


def test_bytes_are_those_of_the_traffic(facts):
    count = facts["bytes"]
    assert count["per_decode_token"] == sum(count["decode"].values())
    assert count["per_prompt_token"] < count["per_decode_token"]
    assert count["vision"] > 0


def test_the_table_says_the_same(facts, monkeypatch, capsys):
    console = Console(file=sys.stdout, width=200)
    monkeypatch.setattr(report, "_console", lambda: console)
    report.print_measured(facts)
    out = capsys.readouterr().out
    assert f"{facts['decode']['tokens_per_second']:g}" in out
    assert f"{facts['peak_mb']:g} MB" in out
    assert f"reads {facts['rates']['read_gb_per_second']:g} GB/s (" in out
    assert facts["machine"]["cpu"] in out
    assert "outside of kernels" in out
    assert "not measured" not in out
    bare = facts["decode"] | {"outside_kernels": None}
    report.print_measured(facts | {"rates": None, "device": "cuda", "memory": None, "decode": bare})
    out = capsys.readouterr().out
    assert "what cuda could do, and the time outside of its kernels, is not measured" in out
    assert "outside of kernels" not in out


def test_a_device_whose_limit_is_not_measured_has_none(demo, monkeypatch):
    """The rest is there: nothing takes the place of a limit that nobody measured."""

    class Card(Subject):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.device = "cuda"

    monkeypatch.setattr(measure, "Subject", Card)
    monkeypatch.setattr(measure, "measure_memory", lambda *_: None)
    found = report.measured_json(measure.measure(demo, Options(**QUICK), lambda stage: None))
    assert found["rates"] is found["decode"]["outside_kernels"] is None
    assert [found[stage]["percent_of_limit"] for stage in ("decode", "prefill", "vision")] == [None] * 3
    assert found["decode"]["tokens_per_second"] > 0
    assert found["peak_mb"] is None


def test_every_round_asks_something_new(demo):
    one = Subject(demo, Options(**QUICK | {"prompt_tokens": 100}))
    (first, ids), (second, other) = one.prepare(), one.prepare()
    assert first != second
    assert ids != other
    assert len(ids) == len(other) == len(one.ids()) == 100
    assert not np.array_equal(one.ids(), one.ids())
    assert not set(one.ids().tolist()[1:]) & set(demo.manifest.stop_ids)
    one.close()


def test_replies_have_the_length_that_was_asked_for(demo):
    """The demo would have ended its turn long before."""
    one = Subject(demo, Options(**QUICK | {"new_tokens": 300}))
    found = one.round()
    assert len(found.steps) == 300
    assert one.ask(*one.prepare()).timings.per_token > 0
    one.close()


def test_bundles_that_do_not_see_have_no_vision(tiny_model):
    bundle = tiny_model("gemma3").bundle
    one = Subject(bundle, Options(prompt_tokens=20, new_tokens=2))
    assert one.round().vision is None
    assert one.soft_tokens == one.patches == 0
    assert one.request().timings.vision == 0
    one.close()
    with pytest.raises(InputError, match="does not see"):
        Subject(bundle, Options(image_tokens=70))


def test_bundles_that_hear_are_asked_with_a_sound(tiny_model):
    one = Subject(tiny_model("gemma4_audio").bundle, Options(prompt_tokens=20, new_tokens=2))
    assert one.request().timings.audio > 0
    one.close()


# --- limits


class KnownProbes:
    """10 bytes a second; operations a second by format and rows."""

    def __init__(self, rates: dict[tuple[Format, bool], float]):
        self._rates = rates

    def bandwidth(self) -> float:
        return 10.0

    def product(self, format: Format, inputs: int, rows: int) -> float:
        return self._rates[format, rows > 1]


def test_the_limit_is_the_slower_of_memory_and_arithmetic():
    rates = {(INT4, False): 4.0, (FP32, False): 1.0, (INT4, True): 8.0, (FP32, True): 16.0}
    known = cast(Probes, KnownProbes(rates))
    cost = Cost(weight_bytes=30, state_bytes=20, attention=32)
    cost.product(INT4, (3, 4), 16)
    cost.product(FP32, (3, 4), 3)
    step = measure.limit(cost, known, 1)
    assert (step.memory, step.arithmetic) == (5.0, 16 / 4 + 3 / 1)
    assert (step.seconds, step.bound_by) == (7.0, "arithmetic")
    # Many rows: int4 at float32's rate, which is better; attention counts.
    prompt = measure.limit(cost, known, 512)
    assert (prompt.arithmetic, prompt.bound_by) == ((16 + 3 + 32) / 16, "memory")


@pytest.mark.parametrize("format", [FP32, INT4, Format(8, 128, 4), Format(16), Format(4, 32, 0)], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_rates_are_operations_by_the_clock(format, rows):
    """Every run takes a second: the rate is the operations of the largest matrix that was tried."""
    found = Probes(1, itertools.count(0.0).__next__)
    outputs = (1 << 18) * 8 // (format.bits * 128) // 64 * 64 if rows == 1 else 64
    assert found.product(format, 128, rows) == 2 * rows * 128 * outputs
    assert found.products() == {(format, 128, rows): 2 * rows * 128 * outputs}
    assert found.bandwidth() == 1 << 20


def test_the_bandwidth_is_the_median_of_those_beside_the_rounds(demo, monkeypatch):
    """A neighbour that reads during one probe does not change the limit."""
    rates = itertools.cycle([30e9, 1e9, 20e9])

    class Noisy(Probes):
        def _measure_bandwidth(self) -> float:
            return next(rates)

    monkeypatch.setattr(measure, "Probes", Noisy)
    monkeypatch.setattr(measure, "measure_memory", lambda *_: None)
    found = report.measured_json(measure.measure(demo, Options(**QUICK | {"repeats": 3}), lambda stage: None))
    assert found["rates"]["read_gb_per_second"] == 20.0
    assert found["rates"]["read_spread"] == {"median": 20.0, "min": 1.0, "max": 30.0}
    limit = found["decode"]["limit"]["memory_ms"] / 1e3
    assert limit == pytest.approx(found["bytes"]["per_decode_token"] / 20e9, rel=1e-3)
    assert Noisy(1).bandwidth() == 30e9  # measured once at least


def test_probes_compute_what_they_say():
    """The graph of a probe is the operator that it is taken for: its numbers are a product's."""
    matrix = np.random.default_rng(0).normal(0, 1, (64, 32)).astype(np.float32)
    node = probes._node("MatMul", ("x", "w"), "", {})
    weight = probes._tensor("w", 1, (64, 32), matrix)
    seen = []

    class Watched(Probes):
        def _best(self, model: bytes, x: np.ndarray, y: np.ndarray) -> float:
            seconds = super()._best(model, x, y)
            seen.append((x, y))
            return seconds

    x = np.ones((3, 64), np.float32)
    Watched(1)._best(probes._model([node], [weight], [3, 64], [3, 32]), x, np.empty((3, 32), np.float32))
    [(x, y)] = seen
    np.testing.assert_allclose(y, x @ matrix, rtol=1e-4, atol=1e-4)


def test_a_chain_adds_as_often_as_it_says():
    seen: list[np.ndarray] = []

    class Watched(Probes):
        def _best(self, model: bytes, x: np.ndarray, y: np.ndarray) -> float:
            super()._best(model, x, y)
            seen.append(y)
            return {2: 10.0, 402: 90.0}[int(y[0] - x[0])]

    run, node = Watched(1).runtime()
    assert node == 0.2
    assert run == pytest.approx(9.6)
    assert [int(y[0]) for y in seen] == [3, 403]


# --- the profile


def test_kernel_times_belong_to_the_run_they_are_in():
    def kernel(start: int, length: int, operator: str) -> dict[str, Any]:
        name = f"layer/{operator}_kernel_time"
        return {"cat": "Node", "name": name, "ts": start, "dur": length, "args": {"op_name": operator}}

    def whole(start: int, length: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": length, "args": {}}

    events = [
        *(whole(0, 100), kernel(10, 50, "MatMul")),  # the prompt, which is not asked for
        *(whole(200, 20), kernel(201, 5, "MatMul"), kernel(207, 0, "Add"), kernel(210, 9, "MatMul")),
        *(whole(300, 10), kernel(301, 3, "Add")),
        {"cat": "Node", "name": "layer/MatMul_fence_before", "ts": 301, "dur": 4, "args": {"op_name": "MatMul"}},
    ]
    first, second = overhead.kernel_times(events, 2, 0.0)
    assert first.seconds == pytest.approx(20e-6)
    assert first.kernels == pytest.approx({"MatMul": 15e-6, "Add": 0.5e-6})
    assert (first.nodes, second.nodes) == (3, 1)
    assert second.kernels == pytest.approx({"Add": 3.5e-6})
    # Control flow lasts as long as the kernels that it runs, which are counted.
    events += [whole(400, 30), kernel(401, 9, "MatMul"), kernel(401, 25, "If"), kernel(411, 12, "Add")]
    [branch] = overhead.kernel_times(events, 1, 0.0)
    assert (branch.nodes, branch.kernels) == (2, pytest.approx({"MatMul": 9.5e-6, "Add": 12.5e-6}))
    # What the profiler adds to every kernel is taken off again.
    [first, _, _] = overhead.kernel_times(events, 3, 2e-6)
    assert first.kernels == pytest.approx({"MatMul": 11e-6, "Add": 0.0})


def test_stages_are_those_of_the_median_request():
    def request(total: float) -> subject.Request:
        timings = Timings(
            decode_file=1, resize=2, vision=3, audio=0, prefill=4, first_token=total, per_token=total / 10, total=99
        )
        return subject.Request(timings, 50)

    found = report.stages([request(90), request(20), request(30)])
    assert (found["total"], found["first_sample"]) == (30, 20)
    assert found["spread"] == {"median": 30, "min": 20, "max": 90}
    assert found["per_token_after"] == 3


# --- two bundles


@pytest.fixture
def pair(demo, monkeypatch):
    """A function (slowdown of B by graph) -> two subjects of the demo on one clock that runs of graphs move."""
    ticks = Ticks()

    def make(slowdown: dict[str, float]) -> tuple[Subject, Subject]:
        subjects = tuple(Subject(demo, Options(**QUICK), seed=seed, clock=ticks) for seed in (0, 1))
        for one, slower in zip(subjects, ({}, slowdown), strict=True):
            for name, method in (("decoder", "run_bound"), ("vision", "run")):
                graph = getattr(one.runtime, name)
                took = 1.0 + slower.get(name, 0.0)
                monkeypatch.setattr(graph, method, _slowed(getattr(graph, method), ticks, took))
        return cast(tuple[Subject, Subject], subjects)

    return make


def _slowed(method: Any, ticks: Ticks, seconds: float) -> Any:
    def run(*arguments: Any) -> Any:
        ticks.now += seconds
        return method(*arguments)

    return run


def test_a_bundle_is_as_fast_as_itself(pair):
    found = measure.compare(pair({}), lambda stage: None)
    assert set(found.ratios) == {"decode", "prefill", "vision"}
    assert all(ratio == Spread(1.0, 1.0, 1.0) for ratio in found.ratios.values())
    assert found.speeds[0]["decode"].median == 1.0
    assert found.slower(0) == {}


@pytest.mark.parametrize("graph", ["decoder", "vision"])
def test_a_slower_copy_is_found(pair, graph):
    found = measure.compare(pair({graph: 0.25}), lambda stage: None)
    stages = {"decoder": {"decode", "prefill"}, "vision": {"vision"}}[graph]
    assert {name: ratio.median for name, ratio in found.ratios.items()} == {
        name: 0.8 if name in stages else 1.0 for name in found.ratios
    }
    assert found.slower(21) == {}
    assert found.slower(19) == dict.fromkeys(sorted(stages), 0.8)


def test_rounds_alternate(pair, monkeypatch):
    subjects = pair({})
    asked: list[int] = []
    for index, one in enumerate(subjects):
        monkeypatch.setattr(one, "round", lambda one=one, index=index: (asked.append(index), Subject.round(one))[1])
    measure.compare(subjects, lambda stage: None)
    assert asked == [0, 1, 0, 1]


@pytest.mark.parametrize(("slowdown", "code"), [(0.0, 0), (0.04, 0), (0.06, 1)])
def test_the_exit_code_says_whether_b_is_slower(pair, monkeypatch, capsys, slowdown, code):
    """5 percent are allowed unless another threshold is given."""
    subjects = iter(pair({"vision": slowdown}))
    monkeypatch.setattr(command, "Subject", lambda *_, **__: next(subjects))
    left, out, err = run(monkeypatch, capsys, "--compare", "demo", "demo", "--json", *QUICK_ARGUMENTS)
    assert left == code
    found = json.loads(out.splitlines()[-1])
    assert found["ratio"]["vision"]["median"] == pytest.approx(1 / (1 + slowdown), abs=1e-3)
    assert found["threshold_percent"] == 5
    assert found["versions"]["onnxruntime"]
    if code:
        [line] = err.splitlines()
        assert "demo is slower than demo by more than 5 %: vision at 0.943" in line
    else:
        assert not err


def test_the_table_of_a_comparison(monkeypatch, capsys):
    console = Console(file=sys.stdout, width=200)
    monkeypatch.setattr(report, "_console", lambda: console)
    speed = Spread(10.0, 9.0, 11.0)
    found = Comparison(({"decode": speed}, {"decode": speed}), {"decode": Spread(1.234, 1.0, 1.5)})
    report.print_comparison(report.comparison_json(found, ("one", "two"), Options(**QUICK)))
    out = capsys.readouterr().out
    assert "A = one, B = two" in out
    assert "1.234 (1.000 - 1.500)" in out


def test_two_bundles_can_be_scored_side_by_side(monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("red square blue circle " * 150, encoding="utf-8")
    monkeypatch.setattr(command, "compare", lambda *_: Comparison(({}, {}), {}))
    code, out, _ = run(
        monkeypatch, capsys, "--compare", "demo", "demo", "--perplexity", str(text), "--json", *QUICK_ARGUMENTS
    )
    found = json.loads(out.splitlines()[-1])["compare"]
    assert code == 0
    assert found["a"]["perplexity"]["top1_agreement"] is None
    assert found["b"]["perplexity"]["top1_agreement"] == 1.0
    assert found["a"]["perplexity"]["perplexity"] == found["b"]["perplexity"]["perplexity"] > 1


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--compare", "demo", "demo"], "one too many"),
        (["--threshold", "3"], "belongs to --compare"),
        (["--compare", "demo", "demo", "--threshold", "100"], "threshold is 100"),
        (["--compare", "demo", "demo", "--threshold", "nan"], "threshold is nan"),
        (["--repeats", "0"], "repeats is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--prompt-tokens", "2000"], "2000 prompt tokens and 128 new ones"),
        (["--image-tokens", "7"], "budget of 7"),
        (["--perplexity", "none.txt"], "none.txt"),
        (["nowhere"], "nowhere"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_options_are_refused_in_one_line(monkeypatch, capsys, arguments, message):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert message in line


def test_the_machine_is_named():
    found = report.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["platform"]


def test_the_child_process_that_fails_is_an_error():
    broken = cast(Bundle, SimpleNamespace(folder="/nowhere/at/all"))
    with pytest.raises(InputError, match=r"exit code 1.*nowhere"):
        memory.measure_memory(broken, Options(**QUICK))
