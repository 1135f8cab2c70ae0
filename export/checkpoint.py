"""Where weights come from: the protocol of a checkpoint, the Hugging Face folder, and `Weights`, what a family sees.

Checkpoints are only read. Tensors are read one at a time, and large tables in slices of rows, so that peak memory is a
few tensors whatever the size of the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from ..engine.errors import ExportError
from ..engine.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from ..kernels.quantize import Blocks
    from .plan import Storage

__all__ = [
    "Checkpoint",
    "FolderCheckpoint",
    "Weights",
    "copy_tokenizer",
    "refuse_others",
    "refuse_pointer",
    "write_template",
]

SLICE_BYTES = 32 << 20  # rows of a large table are read in slices of about this size
_SINGLE_FILE = "model.safetensors"
# Buffers that older versions of transformers saved: they follow from the configuration.
_BUFFERS = re.compile(r".*\.(rotary_emb\w*\.\w*inv_freq|embeddings\.position_ids|embed_tokens\.embed_scale)")
_ADAPTER = "adapter_model.safetensors"
_POINTER = b"version https://git-lfs"
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


class Checkpoint(Protocol):
    """A model on disk, under the names and values that a Hugging Face folder would have.

    All methods raise ExportError naming the file or the tensor for anything unusable.
    """

    @property
    def source(self) -> str:
        """What the model was exported from: the name of a folder or file (never a path), or a hub id."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit of a hub id; None for what has no revisions."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder that makes up the checkpoint, if it is one."""
        ...

    @property
    def quantised(self) -> bool:
        """Whether matrices are stored in blocks; an export then keeps them as they are unless told otherwise."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The values of config.json."""
        ...

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """The values of another JSON file of the folder; an empty object when it is absent and not required."""
        ...

    def names(self) -> set[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32."""
        ...

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        """Tensor `name` [rows, ...] as float32, in consecutive slices of rows."""
        ...

    def blocks(self, name: str) -> Blocks | None:
        """Matrix `name` in the blocks it is stored in, or None when it is stored in a way that blocks cannot repeat."""
        ...

    def widened(self) -> dict[str, int]:
        """Weights of quantised matrices that `blocks` cannot give, by the name of their format."""
        ...

    def write_texts(self, folder: Path) -> dict[str, str]:
        """Write the tokenizer, and the chat template if there is one, to `folder`; returns manifest key -> file."""
        ...


class FolderCheckpoint:
    """A folder holding `config.json`, `*.safetensors` and tokenizer files.

    Weights files are not looked at before they are asked for. `source` and `revision` say where the folder came from if
    that is not the folder itself; `tokenizer` is a tokenizer.json to use instead of the folder's own.
    """

    def __init__(
        self, folder: Path, *, source: str | None = None, revision: str | None = None, tokenizer: Path | None = None
    ):
        if not folder.is_dir():
            raise ExportError(f"no such checkpoint folder: {folder}")
        self.folder = folder
        self.source = source or folder.resolve().name
        self.revision = revision
        self.quantised = False
        self._tokenizer = tokenizer or folder / "tokenizer.json"
        if not (folder / "config.json").is_file():
            refuse_others(folder, str(folder))
        self.config: dict[str, Any] = self.json("config.json", required=True)

    def json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """The JSON object in file `name`, or an empty one when the file is absent and not required."""
        path = self.folder / name
        if not path.is_file():
            if required:
                raise ExportError(f"{self.folder} has no {name}")
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ExportError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(value, dict):
            raise ExportError(f"{path} must hold a JSON object, not {type(value).__name__}")
        return value

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` without reading it."""
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as float32 (bfloat16 and float16 widen without loss)."""
        with self._open(name) as file:
            return np.asarray(file.get_tensor(name)).astype(np.float32)

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        """Tensor `name` [rows, ...] as float32, in consecutive slices of rows."""
        shape = self.shape(name)
        step = max(1, SLICE_BYTES // (4 * int(np.prod(shape[1:], dtype=np.int64))))
        for start in range(0, shape[0], step):
            # Reopened for every slice: a mapping that stays open keeps every page it touched resident.
            with self._open(name) as file:
                yield np.asarray(file.get_slice(name)[start : min(start + step, shape[0])]).astype(np.float32)

    def blocks(self, name: str) -> None:
        """Safetensors hold plain numbers."""

    def widened(self) -> dict[str, int]:
        """None are quantised."""
        return {}

    def write_texts(self, folder: Path) -> dict[str, str]:
        """Copy tokenizer.json; the template is chat_template.jinja, or else stands in a JSON file."""
        return copy_tokenizer(self._tokenizer, folder) | write_template(self._template(), folder)

    def _template(self) -> str | None:
        """The chat template. Tokenizers and processors of different ages keep it in different places."""
        path = self.folder / "chat_template.jinja"
        try:
            template = path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read as text: {error}") from None
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            template = template or self.json(name).get("chat_template")
        if not isinstance(template, list):
            return template if isinstance(template, str) else None
        # Older tokenizers have several, each with a name.
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        if not isinstance(named.get("default"), str):
            raise ExportError(
                f"{self.folder} has the chat templates {sorted(map(str, named))}, of which none is called 'default': "
                "put the one to use into chat_template.jinja"
            )
        return named["default"]

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor name -> file."""
        return self._read_headers()

    def _read_headers(self) -> dict[str, Path]:
        """Tensor name -> file, from the headers of all safetensors files (sharded or not)."""
        # A single file goes before an index, and an index before whatever else is there, as in transformers.
        single = (self.folder / _SINGLE_FILE).is_file()
        index = None if single else self.json("model.safetensors.index.json").get("weight_map")
        if index is not None and not (
            isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
        ):
            raise ExportError(
                f"{self.folder / 'model.safetensors.index.json'}: weight_map must map names to file names"
            )
        names = sorted(set(index.values())) if index else [path.name for path in self.folder.glob("*.safetensors")]
        names = [_SINGLE_FILE] if single else sorted(names)
        if not names or (names == [_ADAPTER] and index is None):
            refuse_others(self.folder, str(self.folder))
            raise ExportError(f"{self.folder} has no *.safetensors file")
        files: dict[str, Path] = {}
        for name in names:
            path = self.folder / name
            if path.parent != self.folder or not path.is_file():
                whose = ", which its index names" if index else ""
                raise ExportError(f"{self.folder} has no weights file {name!r}{whose}")
            with _open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    if _BUFFERS.fullmatch(key):
                        continue
                    dtype = file.get_slice(key).get_dtype()
                    if dtype not in _DTYPES:
                        raise ExportError(f"tensor {key!r} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
                    if ".lora_A." in key:
                        raise ExportError(f"{name} has tensors of an adapter that is not merged, such as {key!r}")
                    if key in files:
                        raise ExportError(f"tensor {key!r} is in {files[key].name} and in {name}")
                    files[key] = path
        return files

    def _open(self, name: str) -> Any:
        if name not in self._files:
            raise ExportError(f"the checkpoint has no tensor {name!r}")
        return _open_safetensors(self._files[name])


def copy_tokenizer(path: Path, folder: Path) -> dict[str, str]:
    """Copy the tokenizer.json at `path` to `folder`; returns manifest key -> file name."""
    if not path.is_file():
        advice = (
            "; a tokenizer.model alone is not enough: save it with transformers' fast tokenizer, or give --tokenizer"
        )
        raise ExportError(f"{path.parent} has no {path.name}{advice}")
    refuse_pointer(path)
    shutil.copyfile(path, folder / "tokenizer.json")
    return {"tokenizer": "tokenizer.json"}


def write_template(template: Any, folder: Path) -> dict[str, str]:
    """Write the chat template, if it is a text, to `folder`; returns manifest key -> file name."""
    if not isinstance(template, str):
        return {}
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return {"chat_template": "chat_template.jinja"}


def refuse_pointer(path: Path) -> None:
    """Raise ExportError for what Git leaves in the place of a large file."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ExportError(f"{path} is a pointer of Git LFS and not the file itself: git lfs pull")


def refuse_others(folder: Path, name: str) -> None:
    """Raise ExportError for a folder, called `name`, without config.json or safetensors that holds something else."""
    if (folder / MANIFEST_NAME).is_file():
        raise ExportError(f"{name} is a bundle already; export takes a checkpoint")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = re.search(r'"base_model_name_or_path"\s*:\s*"([^"]*)"', adapter.read_text("utf-8", errors="replace"))
        raise ExportError(
            f"{name} holds an adapter (LoRA) for {base[1] if base else 'another model'!r}, not a model: merge it "
            "into that (peft: merge_and_unload) and save the result"
        )
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles and (folder / "config.json").is_file():
        raise ExportError(
            f"{name} has its weights in {pickles[0]}: only *.safetensors are read, because such files can hold any "
            "code; save the model again with transformers"
        )


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise ExportError(f"{path} is not a complete safetensors file: {error}") from None


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """`values`, unless one of them is NaN or infinite. A single number may be: a bound that bounds nothing."""
    if values.size > 1 and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise ExportError(f"tensor {name!r} has values that are not finite")
    return values


class Weights:
    """The tensors of a checkpoint under canonical names, with a record of which ones were used.

    `prefixes` maps a canonical prefix to the prefixes that checkpoints use for it, e.g. ("text.", ("model.", ...)).
    `random` says that there is no checkpoint behind this: matrices are drawn in the format they are stored in.
    """

    random = False

    def __init__(self, checkpoint: Checkpoint, prefixes: dict[str, tuple[str, ...]]):
        self._checkpoint = checkpoint
        self._prefixes = prefixes
        self._names = checkpoint.names()
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        return any(candidate in self._names for candidate in self._candidates(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._resolve(name))

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Tensor `name` as float32; a shape other than `shape` is an ExportError."""
        resolved = self._resolve(name)
        self._expect(resolved, shape)
        return _finite(resolved, self._checkpoint.read(resolved))

    def read_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Tensor `name` [rows, ...] as float32 in slices of rows."""
        resolved = self._resolve(name)
        self._expect(resolved, shape)
        return (_finite(resolved, rows) for rows in self._checkpoint.read_rows(resolved))

    def blocks(self, name: str, shape: tuple[int, ...] | None = None) -> Blocks | None:
        """Matrix `name` in the blocks that the checkpoint stores it in, or None when it is not stored in blocks."""
        resolved = self._resolve(name)
        self._expect(resolved, shape)
        return self._checkpoint.blocks(resolved)

    def random_blocks(self, name: str, shape: tuple[int, int], storage: Storage) -> Blocks | None:
        """Random blocks for `shape` rows and columns of tensor `name`; None when there is a checkpoint to read."""
        return None

    def scalar(self, name: str) -> float:
        """A tensor of one element."""
        value = self.read(name)
        if value.size != 1:
            raise ExportError(f"tensor {name!r} has shape {value.shape}, expected one element")
        return float(value.reshape(()))

    def drop(self, name: str) -> None:
        """Mark a tensor that checkpoints carry but the model does not use; absent is fine."""
        self._used.update(candidate for candidate in self._candidates(name) if candidate in self._names)

    def drop_copy(self, name: str, original: str) -> None:
        """Mark a tensor that checkpoints carry although the model uses `original` in its place; absent is fine.

        Raises ExportError if it is another matrix: what was trained is not what the configuration says then.
        """
        for copy in (candidate for candidate in self._candidates(name) if candidate in self._names):
            self._used.add(copy)
            source = self._resolve(original)
            same = self._checkpoint.shape(copy) == self._checkpoint.shape(source)
            if not same or not all(
                np.array_equal(*rows)
                for rows in zip(self._checkpoint.read_rows(copy), self._checkpoint.read_rows(source), strict=True)
            ):
                raise ExportError(
                    f"config.json ties {copy!r} to {source!r}, but the checkpoint has both and they differ: set "
                    "tie_word_embeddings to false to use both"
                )

    def drop_matching(self, pattern: re.Pattern[str]) -> int:
        """Mark all tensors whose checkpoint name starts with `pattern` as left out on purpose; returns their number."""
        matching = {name for name in self._names if pattern.match(name)}
        self._used |= matching
        return len(matching)

    def check_all_used(self) -> None:
        """Raise ExportError naming the tensors that no graph used: the model would not be the checkpoint's model."""
        left = sorted(self._names - self._used)
        if left:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ExportError(f"the checkpoint has {len(left)} tensors that this model does not use: {shown}")

    def _candidates(self, name: str) -> list[str]:
        for prefix, spellings in self._prefixes.items():
            if name.startswith(prefix):
                return [spelling + name[len(prefix) :] for spelling in spellings]
        return [name]

    def _resolve(self, name: str) -> str:
        candidates = self._candidates(name)
        for candidate in candidates:
            if candidate in self._names:
                self._used.add(candidate)
                return candidate
        raise ExportError(f"the checkpoint has no tensor {' or '.join(map(repr, candidates))}")

    def _expect(self, resolved: str, shape: tuple[int, ...] | None) -> None:
        found = self._checkpoint.shape(resolved)
        if shape is not None and found != shape:
            raise ExportError(f"tensor {resolved!r} has shape {list(found)}, the configuration needs {list(shape)}")
