"""Fetching the real checkpoint, without a network: whoever asks at the same time gets one whole folder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from . import checkpoint


def test_two_at_once_fetch_it_once(tmp_path, monkeypatch):
    calls = []
    inside, other_has_begun = threading.Event(), threading.Event()

    def download(target):
        calls.append("download")
        inside.set()
        assert other_has_begun.wait(60)
        target.write_bytes(b"weights")

    def convert(gguf, out):
        calls.append("convert")
        assert gguf.read_bytes() == b"weights"
        out.mkdir()
        (out / "config.json").write_text("{}")

    def second():
        assert inside.wait(60)
        other_has_begun.set()
        return checkpoint.fetch(tmp_path)

    monkeypatch.setattr(checkpoint, "_download", download)
    monkeypatch.setattr(checkpoint, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(checkpoint.fetch, tmp_path), pool.submit(second)]
        folders = [future.result(timeout=60) for future in waiting]
    assert folders == [tmp_path / "hf"] * 2
    assert (folders[0] / "config.json").is_file()
    assert calls == ["download", "convert"]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", checkpoint.GGUF_NAME, "lock"}
