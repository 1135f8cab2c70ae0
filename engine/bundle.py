"""A bundle on disk: find it, read its manifest, check its files. Nothing here loads a graph.

A bundle is untrusted input: file names stay inside the folder, sizes and SHA-256 sums are checked before anything is
opened, and nothing in it is executed except the graphs and the sandboxed chat template. Links are followed only inside
the cache of huggingface-hub, from a snapshot to the blobs of its own repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from .errors import BundleError
from .external_data import external_files
from .manifest import GRAPHS, MANIFEST_NAME, FileFact, Manifest, read_manifest

__all__ = ["Bundle", "cache_folder", "demo_folder", "find_bundle"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile("[0-9a-f]{40}")
MANIFEST_BYTES = 1 << 20  # a manifest is a few kilobytes; anything near this is not one


def cache_folder() -> Path | None:
    """Where bundles live by name: $SIGLANCE_HOME, or ~/.cache/siglance; None for a user who has no home."""
    try:
        return Path(os.environ.get("SIGLANCE_HOME") or Path.home() / ".cache" / "siglance")
    except RuntimeError:  # no $HOME, and no such user: containers run so
        return None


def demo_folder() -> Path:
    """The embedded demo bundle."""
    return Path(__file__).parent / "assets" / "demo"


def find_bundle(name: str | os.PathLike[str]) -> Path:
    """The folder of a bundle given as a path, as a name in the cache, or as "demo".

    Raises BundleError naming the places that were tried.
    """
    if not isinstance(name, str | os.PathLike):
        raise BundleError(f"a bundle is given by its path or its name, not by {type(name).__name__}")
    path = Path(name)
    if os.path.isfile(path / MANIFEST_NAME):  # unlike Path.is_file, false for whatever cannot be a path
        return path
    tried = [str(path)]
    if isinstance(name, str) and name and path.name == name and name not in (".", ".."):
        if name == "demo":
            return demo_folder()
        folder = cache_folder()
        cached = None if folder is None else folder / name
        if cached is not None and os.path.isfile(cached / MANIFEST_NAME):
            return cached
        tried.append(str(cached or "$SIGLANCE_HOME, which is not set"))
    raise BundleError(f"no bundle {str(name)!r}: no {MANIFEST_NAME} in {' or '.join(tried)}{_hint(name, path)}")


def _hint(name: str | os.PathLike[str], path: Path) -> str:
    """What somebody may have meant by a name that no bundle has."""
    export = f"siglance export {str(name)!r} -o FOLDER"
    if os.path.isfile(path / "config.json"):
        return f"; it is a checkpoint, which becomes a bundle by: {export}"
    if os.path.isfile(path):
        if path.suffix.lower() == ".gguf":
            return f"; it is a GGUF file, which becomes a bundle by: {export}"
        return "; it is a file, and a bundle is a folder (pictures are given with -i)"
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(path):
        return f"; if it is an id on the Hugging Face hub, it becomes a bundle by: {export}"
    return ""


class Bundle:
    """A verified bundle: `manifest`, and `path(name)` for its files."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, name: str | os.PathLike[str]) -> Bundle:
        """Find a bundle, read its manifest and check every file it lists. Raises BundleError naming what is wrong."""
        folder = find_bundle(name).resolve()
        path = folder / MANIFEST_NAME
        try:
            if path.stat().st_size > MANIFEST_BYTES:
                raise BundleError(f"{path} has {path.stat().st_size} bytes, a manifest has at most {MANIFEST_BYTES}")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from None
        bundle = cls(folder, read_manifest(text))
        stamps = _Stamps()
        for key, fact in bundle.manifest.files.items():
            _check_file(folder, key, fact, stamps)
        stamps.save()
        _check_weights(bundle)
        return bundle

    def path(self, key: str) -> Path:
        """The path of the file listed under `key`."""
        fact = self.manifest.files.get(key)
        if fact is None:
            raise BundleError(f"the bundle in {self.folder} has no file {key!r}")
        return self.folder / fact.path


def _check_file(folder: Path, key: str, fact: FileFact, stamps: _Stamps) -> None:
    if not fact.path or Path(fact.path).name != fact.path or "\\" in fact.path or fact.path in (".", ".."):
        raise BundleError(f"files.{key}: path {fact.path!r} must be a plain file name")
    path = folder / fact.path
    if os.path.islink(path) and not _is_cached(path):
        raise BundleError(
            f"files.{key}: {path} is a symbolic link to {os.path.realpath(path)}, and a bundle is a folder of regular "
            "files: copy it with its files (cp -rL; hf download --local-dir)"
        )
    if not os.path.isfile(path):
        raise BundleError(f"files.{key}: {path} is missing or not a regular file")
    size = path.stat().st_size
    if size != fact.size:
        raise BundleError(f"files.{key}: {path} has {size} bytes, the manifest says {fact.size}")
    if stamps.known(path, fact.sha256):
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"files.{key}: {path} cannot be read: {error.strerror}") from None
    if found != fact.sha256:
        raise BundleError(f"files.{key}: {path} has SHA-256 {found}, the manifest says {fact.sha256}")
    stamps.remember(path, fact.sha256)


def _is_cached(path: Path) -> bool:
    """Whether a link is one of the cache of huggingface-hub: from snapshots/COMMIT/... into blobs/ beside it."""
    for folder in path.parents:
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
            return Path(os.path.realpath(path)).parent == folder.parent.parent / "blobs"
    return False


def _check_weights(bundle: Bundle) -> None:
    """Raise BundleError for a graph with weights in a file that the manifest does not list, and so nothing checked."""
    listed = {fact.path for fact in bundle.manifest.files.values()}
    for key in GRAPHS:
        if key in bundle.manifest.files:
            path = bundle.path(key)
            if path.suffix != ".onnx":  # onnxruntime reads another format then
                raise BundleError(f"files.{key}: {path.name} must be an ONNX graph, *.onnx")
            for name in sorted(external_files(path) - listed):
                raise BundleError(f"{path.name} takes weights from {name!r}, which the manifest does not list")


class _Stamps:
    """Files whose hash was checked before and that have not changed since (path, inode, size, time of change).

    Hashing gigabytes at every start would cost seconds. Hashes find damage; they do not protect against somebody who
    can write the folder, because such a person can write the manifest too.
    """

    def __init__(self):
        folder = cache_folder()
        self._path = None if folder is None else folder / "verified.json"
        self._changed = False
        try:
            known = {} if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            known = {}
        self._known: dict[str, str] = known if isinstance(known, dict) else {}

    def known(self, path: Path, sha256: str) -> bool:
        return self._known.get(self._key(path)) == sha256

    def remember(self, path: Path, sha256: str) -> None:
        # Small files are hashed faster than they are looked up.
        if path.stat().st_size > 1 << 20:
            self._known[self._key(path)] = sha256
            self._changed = True

    def save(self) -> None:
        """Store what is new; a folder that cannot be written only costs time later."""
        if self._path is None or not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(self._known), encoding="utf-8")
            fresh.replace(self._path)
        except OSError:
            return

    @staticmethod
    def _key(path: Path) -> str:
        status = path.stat()
        return f"{path}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"
