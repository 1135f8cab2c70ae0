"""What an engine does to the process it is in, and to those that are forked from it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from siglance.engine import Engine, processes
from siglance.engine.errors import InputError


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 8, id="no quota"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000"}, 2, id="docker run --cpus=2"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 2, id="rounded up"),
        pytest.param("0::/\n", {"cpu.max": "10000 100000"}, 1, id="at least one"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000"}, 8, id="never more than there are"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, id="a group above"),
        pytest.param("0::/host/only\n", {"cpu.max": "200000 100000"}, 2, id="a path of the host"),
        pytest.param("0::/\n", {}, 8, id="root of the machine"),
        pytest.param(
            "5:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            3,
            id="version 1",
        ),
        pytest.param(
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            8,
            id="version 1, no quota",
        ),
        pytest.param("nonsense\n", {"cpu.max": "words"}, 8, id="unreadable"),
        pytest.param(None, {}, 8, id="no control groups"),
    ],
)
def test_a_container_gets_threads_for_the_cpu_time_it_has(
    groups: str | None, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(processes, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processes, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert processes.usable_cores() == cores


_DAEMON = """
import sys, threading
from siglance.engine import Engine, Text
engine, stopped = Engine.open(threads=1), threading.Event()
def ask():
    for chunk in engine.stream(Text("describe"), max_tokens=2000, stop_ids=[], cancelled=lambda: asked.set()):
        pass
def work():
    while True:
        ask()
asked = threading.Event()
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
asked.wait()
print(len(engine.generate(Text("count")).token_ids) > 0)
"""


def test_a_program_ends_while_daemon_threads_ask():
    """A thread that came back from C++ to an interpreter that is gone would take the process down with it."""
    done = subprocess.run([sys.executable, "-c", _DAEMON], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_the_end_waits_for_daemon_threads_and_keeps_them(monkeypatch):
    """Not for those that are elsewhere, and whoever ends the program still has its turns."""
    monkeypatch.setattr(processes, "_ended", threading.Event())
    turn, inside, release, again = processes.GraphTurn(), threading.Event(), threading.Event(), threading.Event()

    def in_the_engine(run):
        """A call that has a frame of the engine's folder below it."""
        exec(compile("run()", f"{processes._HERE}/graph.py", "exec"), {"run": run})

    def one():
        with turn:
            inside.set()
            release.wait(10)
            processes.OwnProcess().check()  # as the engine does while it has the turn, which others still want
        with turn:
            again.set()

    threading.Thread(target=in_the_engine, args=[one], daemon=True).start()
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    inside.wait(10)
    assert processes._is_busy()
    ending = threading.Thread(target=processes._end)
    ending.start()
    processes._ended.wait(10)
    assert ending.is_alive()
    release.set()
    ending.join(10)
    assert not ending.is_alive()
    assert not processes._is_busy()
    assert not again.is_set()
    in_the_engine(one)
    assert again.is_set()


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 10**6])
def test_a_number_of_threads_that_is_none_is_refused(threads: object):
    """A million would take all memory of the machine."""
    with pytest.raises(InputError, match=r"threads is .*between 1 and 1024"):
        Engine.open("demo", threads=threads)  # pyright: ignore


def _run(script: str, home: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["", "import onnxruntime"])
def test_nothing_is_recorded_about_what_runs(first: str, tmp_path: Path):
    """onnxruntime would keep a database of events in the user's folder, and send them from a thread of its own."""
    script = f"""
{first}
import os
from siglance.engine import Engine
with Engine.open("demo", threads=1) as engine:
    engine.generate("count", max_tokens=1)
    print(os.environ["ORT_DISABLE_TELEMETRY"], len(os.listdir("/proc/self/task")))
"""
    switch, threads = _run(script, tmp_path).split()
    assert switch == "1"
    if not first:  # else it began before us, and is told to stop
        assert threads in ("1", "2"), "onnxruntime's Python module keeps one thread, telemetry another"
        assert not list(tmp_path.rglob("*"))


def test_without_onnxruntime_the_error_names_the_extras(tmp_path: Path):
    script = """
import sys
sys.modules["onnxruntime"] = None
try:
    import siglance.engine
except ModuleNotFoundError as error:
    print(error)
"""
    assert _run(script, tmp_path) == (
        "siglance needs onnxruntime: pip install 'siglance[cpu]', or 'siglance[gpu]' for an NVIDIA card\n"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_opens_its_own_engine_and_ends_in_peace(tmp_path: Path):
    """Its threads are not there; freeing an engine of the parent would wait for them, or crash."""
    script = """
import os, sys
from siglance.engine import Engine
from siglance.engine.errors import InputError
engine = Engine.open("demo", threads=4)
engine.generate("count", max_tokens=1)
child = os.fork()
if child == 0:
    try:
        engine.generate("count")
    except InputError as error:
        print(error, flush=True)
    engine.close()
    with Engine.open("demo", threads=1) as own:
        print(own.generate("count", max_tokens=1).finish_reason, flush=True)
    del engine
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    refusal, own, status = _run(script, tmp_path).splitlines()
    assert "open it in each process" in refusal
    assert own == "length"
    assert status == "7"


def test_an_engine_is_not_sent_to_another_process():
    with Engine.open("demo", threads=1) as engine, pytest.raises(TypeError, match="open it in each process"):
        pickle.dumps(engine)
