"""Why CUDA cannot be used, from made-up installations: no card is needed to be told what is wrong."""

from __future__ import annotations

import sys

import onnxruntime
import pytest

from siglance.engine import cuda, graph
from siglance.engine.bundle import Bundle
from siglance.engine.cuda import Wheel, captures_runs, driver_version, installed_wheels, load_libraries, problem
from siglance.engine.errors import BundleError, DeviceError
from siglance.engine.graph import Device, Graph, has_device, resolve_device
from siglance.engine.runtime import Runtime

CUDA_13 = Wheel("1.31.1", "13.0")
CUDA_12 = Wheel("1.26.0", "12.9")
GPU = ["onnxruntime-gpu"]


# --- the driver


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:54:38 UTC 2025\n", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build\n", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  595.44  Release\nGCC version:  gcc 12.2.0\n",
            "595.44",
        ),
    ],
)
def test_the_kernel_module_names_the_driver(tmp_path, text, version):
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version", ["no-such-program"]) == version


def says(text: str, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({code})"]


def test_nvidia_smi_is_asked_where_there_is_no_kernel_module(tmp_path):
    nowhere = tmp_path / "version"
    assert driver_version(nowhere, says("550.90.07\n550.90.07")) == "550.90.07"
    assert driver_version(nowhere, says("NVIDIA-SMI has failed because it couldn't communicate", 9)) is None
    assert driver_version(nowhere, says("No devices were found")) is None
    assert driver_version(nowhere, [str(tmp_path / "nvidia-smi")]) is None
    nowhere.write_text("something else altogether")
    assert driver_version(nowhere, says("550.90.07")) == "550.90.07"


# --- what is wrong


def test_nothing_is_wrong():
    assert problem(CUDA_13, GPU, "580.65.06") is None
    assert problem(CUDA_13, GPU, "595.12") is None
    assert problem(CUDA_12, GPU, "525.60.13") is None
    assert problem(Wheel("1.40", "14.1"), GPU, "600.1") is None


@pytest.mark.parametrize(
    ("wheel", "wheels", "driver", "parts"),
    [
        (CUDA_13, GPU, "535.183.01", ["1.31.1", "CUDA 13.0", "580", "535.183.01", "Update the driver"]),
        (CUDA_12, GPU, "470.1", ["CUDA 12.9", "525", "470.1"]),
        (CUDA_13, GPU, None, ["no NVIDIA driver"]),
        (Wheel("1.32.0", ""), ["onnxruntime"], "580.1", ["without CUDA", "siglance[gpu]"]),
        (
            CUDA_13,
            ["onnxruntime", "onnxruntime-gpu"],
            "580.1",
            ["both", "pip uninstall -y onnxruntime onnxruntime-gpu"],
        ),
        (Wheel("1.32.0", ""), ["onnxruntime", "onnxruntime-gpu"], None, ["both"]),
    ],
)
def test_what_is_wrong_and_what_to_do(wheel, wheels, driver, parts):
    text = problem(wheel, wheels, driver)
    assert text is not None
    for part in parts:
        assert part in text


def test_the_wheel_of_this_environment_is_seen():
    assert "onnxruntime" in installed_wheels() or "onnxruntime-gpu" in installed_wheels()


def test_what_onnxruntime_prints_is_kept_for_the_message(capsys):
    def preload() -> None:
        print("Failed to load libcublasLt.so.13: cannot open shared object file")
        print("Please follow https://example.org")

    assert load_libraries(preload) == "Failed to load libcublasLt.so.13: cannot open shared object file"
    assert load_libraries(lambda: None) == ""

    def missing() -> None:
        raise RuntimeError("no such directory")

    assert load_libraries(missing) == "no such directory"
    assert capsys.readouterr().out == ""


# --- devices


def pretend(monkeypatch, *, driver: str | None, wheels: list[str] = GPU, built: str = "13.0") -> None:
    """Pretend that the GPU wheel is installed; its CUDA provider does not load here, as on a machine without a card."""
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(cuda, "installed_wheels", lambda: wheels)
    monkeypatch.setattr(onnxruntime, "cuda_version", built, raising=False)
    monkeypatch.setattr(graph, "_load_cuda", lambda: "Failed to load libcudart.so.13")
    if built:
        names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


@pytest.fixture
def cpu_session(monkeypatch):
    """Sessions that were asked for CUDA come up on the CPU, as onnxruntime's do."""
    real = onnxruntime.InferenceSession
    asked: list[object] = []

    def open_session(path, options, providers, **_):
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    return asked


def test_cuda_without_its_wheel_says_what_to_install(monkeypatch):
    pretend(monkeypatch, driver="580.1", wheels=["onnxruntime"], built="")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"has only cpu: .*without CUDA.*siglance\[gpu\]"):
            resolve_device(name, "cuda")
    with pytest.raises(DeviceError, match="without CUDA"):
        resolve_device("auto", "cuda")
    assert resolve_device("auto", "cpu") == Device("cpu")


@pytest.mark.parametrize(
    ("driver", "wheels", "reason"),
    [
        ("535.183.01", GPU, "needs an NVIDIA driver of version 580 or later; this machine has 535.183.01"),
        (None, GPU, "no NVIDIA driver"),
        ("580.1", ["onnxruntime", "onnxruntime-gpu"], "both installed"),
        ("580.1", GPU, r"Failed to load libcudart\.so\.13"),
    ],
)
def test_a_session_that_came_up_on_the_cpu_is_refused(tiny_model, monkeypatch, cpu_session, driver, wheels, reason):
    """Case 56: the provider is listed, the session is the CPU's, and nobody is told."""
    bundle = tiny_model("gemma3").bundle
    cpu_session.clear()
    pretend(monkeypatch, driver=driver, wheels=wheels)
    assert has_device("cuda") == (driver is not None)
    for capture in (False, True):
        with pytest.raises(DeviceError, match=f"came up on CPUExecutionProvider instead of .*{reason}"):
            Graph(bundle.path("decoder"), Device("cuda"), capture=capture)
    assert len(cpu_session) == 2  # refused at once, not tried in other ways
    with pytest.raises(DeviceError, match=reason):
        Runtime(bundle, device="cuda", foreign=True)


def test_a_graph_that_cannot_be_captured_runs_without_and_says_why(tiny_model, monkeypatch):
    """Only onnxruntime knows; a graph is asked for with capture and then without."""
    real = onnxruntime.InferenceSession
    asked: list[dict[str, str]] = []

    class OnCuda:
        def __init__(self, path, options, providers, enable_fallback):
            assert not enable_fallback  # else onnxruntime would print, and take the CPU
            asked.append(providers[0][1])
            if "enable_cuda_graph" in asked[-1] and self.refuses:
                raise RuntimeError("This session cannot use the graph capture feature\nmore")
            self._session = real(path, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def __getattr__(self, name):
            return getattr(self._session, name)

    bundle = tiny_model("gemma3").bundle
    pretend(monkeypatch, driver="580.1")
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCuda)
    OnCuda.refuses = True
    decoder = Graph(bundle.path("decoder"), Device("cuda", 1), capture=True)
    assert [facts.get("enable_cuda_graph") for facts in asked] == ["1", None]
    assert [facts["device_id"] for facts in asked] == ["1", "1"]
    assert not decoder.captures
    assert decoder.uncaptured_because == "This session cannot use the graph capture feature"
    OnCuda.refuses = False
    decoder = Graph(bundle.path("decoder"), Device("cuda"), capture=True)
    assert decoder.captures
    assert decoder.uncaptured_because is None
    assert not Graph(bundle.path("decoder"), Device("cuda")).captures
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("driver", "text", "kind", "message"),
    [
        ("535.1", "CUDA failure 35: insufficient driver", DeviceError, "cannot run on cuda:2: .*580 or later"),
        ("580.1", "CUDA failure 100: no CUDA-capable device", DeviceError, "cannot run on cuda:2: CUDA failure 100"),
        ("580.1", "Protobuf parsing failed.", BundleError, "cannot be loaded: Protobuf"),
    ],
)
def test_a_session_that_does_not_come_up(tiny_model, monkeypatch, driver, text, kind, message):
    """What onnxruntime says of the device, and what it says of the file."""
    bundle = tiny_model("gemma3").bundle
    pretend(monkeypatch, driver=driver)

    def refuse(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(kind, match=message):
        Graph(bundle.path("decoder"), Device("cuda", 2), capture=True)


def test_capture_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("SIGLANCE_CUDA_GRAPH", raising=False)
    assert captures_runs()
    for value, on in (("1", True), ("0", False)):
        monkeypatch.setenv("SIGLANCE_CUDA_GRAPH", value)
        assert captures_runs() == on
    monkeypatch.setenv("SIGLANCE_CUDA_GRAPH", "no")
    with pytest.raises(DeviceError, match="SIGLANCE_CUDA_GRAPH is 'no'"):
        captures_runs()


def test_tables_are_looked_up_on_the_host(tiny_model, monkeypatch):
    """The embed graph of a bundle for GPUs stays on the CPU: its tables may be larger than the card."""
    devices: dict[str, str] = {}
    real = Graph.__init__

    def note(self, path, device, **options):
        devices[path.stem] = device.kind
        real(self, path, Device("cpu"), **options | {"capture": False})

    bundle = tiny_model("gemma4").bundle
    pretend(monkeypatch, driver="580.1")
    monkeypatch.setattr(Graph, "__init__", note)
    monkeypatch.setattr(Runtime, "keep_states_on", lambda self, device: devices.update(state=device.kind))
    Runtime(Bundle(bundle.folder, bundle.manifest), device="cuda", foreign=True)
    assert devices == {"embed": "cpu", "decoder": "cuda", "vision": "cuda", "state": "cuda"}
