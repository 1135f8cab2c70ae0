"""Build a CUDA that does nothing, for the onnxruntime-gpu of this environment: `python build.py FOLDER HEADERS`.

Needs gcc, nm and readelf, and a folder that has CUDA's headers somewhere. CUDA's own libraries must not be installed
in the environment: onnxruntime would load them instead.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
# onnxruntime's provider needs these at load, whether or not it calls any of their functions.
NEEDED = ("libcublas", "libcublasLt", "libcudart", "libcurand", "libcuda")
# The headers want a file of another package for the compiler's own annotations, which mean nothing here.
ANNOTATIONS = (
    "__host__ __device__ __global__ __device_builtin__ __device_builtin_texture_type__ __cudart_builtin__ CUDARTAPI "
    "__device_builtin_surface_type__ CUDART_CB CUDARTAPI_CDECL __specialization_static"
)


def main(folder: Path, with_headers: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    provider = next(_files("onnxruntime-gpu", "libonnxruntime_providers_cuda.so"))
    headers = next(with_headers.rglob("cuda_runtime_api.h")).parent
    _annotations(folder / "include" / "crt")
    needed = _needed(provider)
    for name, symbols in _symbols(provider, needed).items():
        written = {"libcudart": ["null_cudart.c"]}.get(name.split(".so")[0], [])
        _build(folder, name, [HERE / file for file in written], symbols, [folder / "include", headers])
    _build(folder, "libcudnn.so.9", [HERE / "null_cudnn.c"], [], [])


def _files(package: str, name: str):
    for file in importlib.metadata.files(package) or ():
        if file.name == name:
            yield Path(str(file.locate())).resolve()
    raise SystemExit(f"{package} is not installed here, or has no {name}")


def _annotations(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"#define {name}\n" for name in ANNOTATIONS.split()]
    lines += [f"#define {name}(n) __attribute__((aligned(n)))\n" for name in ("__builtin_align__", "__align__")]
    (folder / "host_defines.h").write_text("".join(lines))


def _needed(provider: Path) -> list[str]:
    listing = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True).stdout
    return [name for name in re.findall(r"NEEDED.*\[(.+)\]", listing) if name.split(".so")[0] in NEEDED]


def _symbols(provider: Path, needed: list[str]) -> dict[str, list[str]]:
    """Names of the functions that the provider takes from each library; the driver's have no version."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = defaultdict(list, {name: [] for name in needed})
    for line in listing.stdout.splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in found:
            found[library].append(name)
        elif re.match(r"cu[A-Z]", name):
            found["libcuda.so.1"].append(name)
    return dict(found)


def _build(folder: Path, library: str, sources: list[Path], symbols: list[str], headers: list[Path]) -> None:
    text = "".join(source.read_text() for source in sources)
    rest = [name for name in symbols if not re.search(rf"\b{name}\s*\(", text)]
    stubs, versions = folder / f"{library}.c", folder / f"{library}.map"
    stubs.write_text("#include <stdlib.h>\n" + "".join(_stub(name) for name in rest))
    versions.write_text(f"{library} {{ global: *; }};\n")
    options = [f"-I{path}" for path in headers] + [f"-Wl,-soname,{library}"]
    if library != "libcuda.so.1":
        options.append(f"-Wl,--version-script={versions}")
    subprocess.run(
        ["gcc", "-w", "-O1", "-shared", "-fPIC", "-o", folder / library, *sources, stubs, *options], check=True
    )
    print(f"{library}: {len(symbols)} functions")


def _stub(name: str) -> str:
    if re.search(r"Create(_v2)?$", name):
        return f"int {name}(void **handle) {{ *handle = malloc(4096); return 0; }}\n"
    if name == "__cudaRegisterFatBinary":
        return f"void *{name}(void *binary) {{ return malloc(64); }}\n"
    if re.search(r"(Name|String)$", name):
        return f'const char *{name}(int code) {{ return "null driver"; }}\n'
    return f"int {name}() {{ return 0; }}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
