"""Checkpoints by name, from a hub on loopback that answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from huggingface_hub import constants

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.export.hub import is_hub_name
from siglance.export.sources import open_source

from . import tiny
from .tiny_gguf import write_gguf

NAME, COMMIT, OLDER = "acme/tiny-gemma", "c0ffee" + "0" * 34, "beef" + "0" * 36
FP32 = ExportOptions(precision="fp32")


class FakeHub:
    """One repository. `refused` is (status, X-Error-Code) for every request; `log` is the paths asked for."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.revisions = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
        self.refused: tuple[int, str] | None = None
        self.log: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.log.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(unquote(self.path.partition("?")[0]))
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.refused:
            return self.refused[0], {"X-Error-Code": self.refused[1]}, b"{}"
        api = f"/api/models/{NAME}"
        if path == api or path.startswith(f"{api}/revision/"):
            commit = self.revisions.get(path.removeprefix(f"{api}/revision/") if path != api else "main")
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {}, json.dumps({"id": NAME, "sha": commit, "siblings": []}).encode()
        if path.startswith(f"{api}/tree/"):
            if path.removeprefix(f"{api}/tree/") not in self.revisions:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, file = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            if file not in self.files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            data = self.files[file]
            return 200, {"X-Repo-Commit": self.revisions[revision], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("checkpoint") / "folder"
    tiny.write_gemma3(target, query_pre_attn_scalar=16)
    return target


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The hub, and an empty cache. The library reads its settings from the environment once, so they are set here."""
    server = FakeHub({path.name: path.read_bytes() for path in folder.iterdir()})
    server.files |= {"onnx/model.safetensors": b"another format", "README.md": b"# tiny", "model.bin": b"pickle"}
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


def refused(name: str = NAME, **options) -> str:
    with pytest.raises(ExportError) as error:
        open_source(name, **options).names()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_bundle_from_the_hub_names_its_commit(hub, folder, tmp_path, capfd):
    export(NAME, tmp_path / "bundle", FP32, name="tiny")
    export(folder, tmp_path / "local", FP32, name="tiny")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.source, manifest.revision) == (NAME, COMMIT)
    provenance = json.loads((tmp_path / "bundle" / "export.json").read_text())
    assert (provenance["source"], provenance["revision"]) == (NAME, COMMIT)
    assert manifest.files["weights"] == Bundle.open(tmp_path / "local").manifest.files["weights"]
    assert capfd.readouterr().err == "", "progress is for terminals"


def test_only_what_is_needed_is_downloaded_and_from_one_commit(hub):
    checkpoint = open_source(NAME)
    assert not any(".safetensors" in line for line in hub.log), "weights before anybody knows whether they are wanted"
    hub.revisions["main"] = OLDER  # somebody pushes in between
    checkpoint.names()
    fetched = {line.split("/resolve/")[1] for line in hub.log if line.startswith("GET") and "/resolve/" in line}
    wanted = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert fetched == {f"{COMMIT}/{name}" for name in (*wanted, "model.safetensors")}


def test_shards_are_downloaded(hub, tmp_path):
    tiny.write_gemma3(tmp_path / "sharded", shards=3)
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    ours, theirs = open_source(NAME), open_source(tmp_path / "sharded")
    assert ours.names() == theirs.names()
    np.testing.assert_array_equal(ours.read("model.norm.weight"), theirs.read("model.norm.weight"))


def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    hub.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(ExportError, match="'llama' is not supported"):
        export(NAME, tmp_path / "bundle")
    assert not any(".safetensors" in line for line in hub.log)


@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_resolved_to_its_commit(hub, revision):
    checkpoint = open_source(NAME, revision=revision)
    checkpoint.names()
    assert checkpoint.revision == OLDER


def test_the_cache_serves_without_a_network(hub, monkeypatch):
    open_source(NAME).names()
    hub.close()
    asked = len(hub.log)
    assert open_source(NAME).revision == COMMIT
    assert open_source(NAME).names()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source(NAME, revision="main").names()
    assert len(hub.log) == asked


def test_a_cache_without_the_weights_says_so(hub, monkeypatch):
    open_source(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused()
    assert NAME in message
    assert "cannot be asked" in message


def test_no_network_and_no_cache(hub, monkeypatch):
    hub.close()
    assert "cannot be asked" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be asked" in refused()


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ((403, "GatedRepo"), rf"{NAME} is gated: accept its terms at http://127\S+/{NAME}, then log in"),
        ((401, "GatedRepo"), "is gated"),
        ((404, "RepoNotFound"), rf"'{NAME}' is neither a folder or file on this machine nor a model at http://127"),
        ((401, "RepoNotFound"), "neither a folder or file on this machine nor a model .* a private one needs a login"),
        ((503, ""), f"{NAME} is not complete in the cache of this machine, and the hub cannot be asked: .*503"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, answer, named):
    hub.refused = answer
    assert re.search(named, refused())


def test_no_such_revision(hub):
    assert f"{NAME} on the hub has no revision 'v9'" in refused(revision="v9")
    assert f"has no revision '{'d' * 40}'" in refused(revision="d" * 40)


def test_weights_that_are_gated_while_the_rest_is_not(hub):
    checkpoint = open_source(NAME)
    hub.refused = (403, "GatedRepo")
    with pytest.raises(ExportError, match="is gated"):
        checkpoint.names()


def test_a_repository_without_weights(hub):
    del hub.files["model.safetensors"]
    assert "no *.safetensors" in refused()


def test_a_gguf_file_in_a_repository(hub, folder, tmp_path):
    hub.files["q/tiny.gguf"] = write_gguf(folder, tmp_path / "tiny.gguf").read_bytes()
    export(f"{NAME}/q/tiny.gguf", tmp_path / "bundle", FP32, revision="v1")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.source, manifest.revision) == (f"{NAME}/q/tiny.gguf", OLDER)
    assert "no such file" in refused(f"{NAME}/q/other.gguf")


def test_a_repository_of_gguf_files_says_what_to_name(hub):
    hub.files = {"README.md": b"", "tiny-q4_0.gguf": b""}
    assert f"has no config.json; name one of its GGUF files: {NAME}/tiny-q4_0.gguf" in refused()


def test_a_path_wins_over_a_hub_id(hub, folder, tmp_path, monkeypatch):
    (tmp_path / "acme").mkdir()
    (tmp_path / NAME).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert open_source(NAME).revision is None
    assert hub.log == []
    with pytest.raises(ExportError, match="is on this machine and has no revision 'v1'"):
        open_source(NAME, revision="v1")


@pytest.mark.parametrize(
    "text", ["nowhere", "/no/where", "./a/b", "a/b/c", "a/../b.gguf", "a b/c", "a/", "~/x", "a/b--c"]
)
def test_what_is_neither_a_path_nor_an_id_says_both(hub, text):
    assert not is_hub_name(text)
    assert "neither a folder or file on this machine nor a hub id (owner/name)" in refused(text)
    assert hub.log == []


def test_a_full_disk(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = refused()
    assert "No space left on device" in message
    assert "cache" in message


def test_control_c_while_downloading(hub, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("siglance.export.hub.snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(NAME, tmp_path / "new" / "bundle")
    assert not (tmp_path / "new").exists()


def test_the_cache_is_only_read(hub, tmp_path):
    """An output inside the snapshot would be writing into the library's cache."""
    checkpoint = open_source(NAME)
    assert checkpoint.folder is not None
    with pytest.raises(ExportError, match="inside the checkpoint's folder"):
        export(NAME, Path(checkpoint.folder) / "bundle")


def test_a_snapshot_named_by_its_path_is_the_repository_at_its_commit(hub, folder, tmp_path, monkeypatch):
    """Its own name is a hash, and so is the name of the blob that its files are links to."""
    hub.files["q/tiny.gguf"] = write_gguf(folder, tmp_path / "tiny.gguf").read_bytes()
    checkpoint = open_source(NAME)
    checkpoint.names()
    gguf = open_source(f"{NAME}/q/tiny.gguf")
    hub.close()
    place = checkpoint.folder
    assert place is not None
    for found, name in (
        (open_source(place), NAME),
        (open_source(f"{place}/"), NAME),
        (open_source(place / "q" / "tiny.gguf"), f"{NAME}/q/tiny.gguf"),
    ):
        assert (found.source, found.revision) == (name, COMMIT)
    assert gguf.source == f"{NAME}/q/tiny.gguf"
    monkeypatch.chdir(place)
    assert open_source(".").source == NAME
    export(place, tmp_path / "bundle", FP32)
    export(place / "q" / "tiny.gguf", tmp_path / "q4", ExportOptions(precision="int8"))
    assert Bundle.open(tmp_path / "q4").manifest.revision == COMMIT


@pytest.mark.parametrize("path", ["models--a--b/main", "datasets--a--b/snapshots/" + "a" * 40, "snapshots/" + "a" * 40])
def test_a_folder_that_is_no_snapshot_keeps_its_name(folder, tmp_path, path):
    shutil.copytree(folder, tmp_path / path)
    found = open_source(tmp_path / path)
    assert (found.source, found.revision) == (Path(path).name, None)
