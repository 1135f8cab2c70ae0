"""Soft tokens by content, in memory and on disk. What the engine makes of it is in test_cache.py."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.engine import Engine
from siglance.engine.errors import InputError
from siglance.engine.feature_cache import FeatureCache, FeatureFolder, content_key
from siglance.kernels.patches import Patches, patchify

SHAPE = (4, 3)
FILE = 32 + 4 * 4 * 3  # bytes


def features(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def folder(path: Path, bundle: str = "bundle", max_bytes: int = 10**6) -> FeatureFolder:
    return FeatureFolder(path / "features", bundle, max_bytes)


def files(path: Path) -> list[Path]:
    return sorted((path / "features").iterdir())


# --- keys


def test_equal_input_of_the_vision_graph_has_equal_keys():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 48, 3)).astype(np.uint8)
    key = content_key(patchify(pixels, 16, 3))
    assert len(key) == 32
    assert content_key(patchify(np.asfortranarray(pixels), 16, 3)) == key
    other = pixels.copy()
    other[95, 47, 2] ^= 1
    assert content_key(patchify(other, 16, 3)) != key


def test_the_same_pixels_in_another_layout_are_other_content():
    """A flat picture has equal patches whatever its sides are; their positions differ."""
    flat = np.full((48, 96, 3), 7, np.uint8)
    keys = {content_key(patchify(pixels, 16, 3)) for pixels in (flat, flat.transpose(1, 0, 2), flat[:, :48])}
    assert len(keys) == 3


def test_bytes_do_not_move_between_arrays():
    values, positions = np.zeros((2, 8), np.uint8), np.zeros((2, 2), np.int64)
    one, two = Patches(values, positions), Patches(values.reshape(4, 4), positions)
    assert content_key(one) != content_key(two)


# --- memory


def test_what_was_put_is_had():
    cache = FeatureCache(10**6)
    values = features(1)
    assert cache.get(b"a", SHAPE) is None
    cache.put(b"a", values)
    assert cache.get(b"a", SHAPE) is values
    assert cache.get(b"b", SHAPE) is None
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get(b"a", SHAPE)) == (0, 0, None)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40), st.integers(0, 5))
def test_law_the_ones_used_last_are_there(operations, room):
    """Against a list: the bound holds after every operation, and exactly the latest used fit under it."""
    cache, order = FeatureCache(room * features(0).nbytes), []
    for put, number in operations:
        key = bytes([number])
        if put:
            cache.put(key, features(number))
        found = cache.get(key, SHAPE) is not None
        assert found == (key in order or (put and room > 0))
        if found:
            order = [*(other for other in order if other != key), key][-room:]
        assert cache.nbytes == len(cache) * features(0).nbytes == len(order) * features(0).nbytes


# --- disk


def test_files_outlive_the_process(tmp_path):
    FeatureCache(10**6, folder(tmp_path)).put(b"a", features(1))
    again = FeatureCache(10**6, folder(tmp_path))
    np.testing.assert_array_equal(again.get(b"a", SHAPE), features(1))
    assert again.get(b"a", SHAPE) is again.get(b"a", SHAPE)  # from memory now
    assert again.get(b"b", SHAPE) is None
    [file] = files(tmp_path)
    assert file.stat().st_size == FILE
    assert os.name == "nt" or (file.stat().st_mode & 0o077, file.parent.stat().st_mode & 0o077) == (0, 0)


def test_disk_without_memory(tmp_path):
    cache = FeatureCache(0, folder(tmp_path))
    cache.put(b"a", features(1))
    np.testing.assert_array_equal(cache.get(b"a", SHAPE), features(1))
    assert cache.nbytes == 0


def test_never_across_bundles(tmp_path):
    folder(tmp_path, "one").write(b"a", features(1))
    other = folder(tmp_path, "two")
    assert other.read(b"a", SHAPE) is None
    other.write(b"a", features(2))
    np.testing.assert_array_equal(folder(tmp_path, "one").read(b"a", SHAPE), features(1))
    np.testing.assert_array_equal(other.read(b"a", SHAPE), features(2))


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "another value": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "another digest": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "no values": lambda data: data[:32],
    "something else": lambda data: b"\x80\x04\x95" + os.urandom(len(data) - 3),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_good_as_none_and_is_replaced(tmp_path, damage):
    folder(tmp_path).write(b"a", features(1))
    [file] = files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    cache = FeatureCache(10**6, folder(tmp_path))
    assert cache.get(b"a", SHAPE) is None
    cache.put(b"a", features(1))
    np.testing.assert_array_equal(folder(tmp_path).read(b"a", SHAPE), features(1))
    assert files(tmp_path) == [file]


def test_the_file_of_another_picture_is_damage(tmp_path):
    """A file under the wrong name would be another picture's answer."""
    one = folder(tmp_path)
    one.write(b"a", features(1))
    [file] = files(tmp_path)
    one.write(b"b", features(2))
    [other] = set(files(tmp_path)) - {file}
    other.write_bytes(file.read_bytes())
    assert one.read(b"b", SHAPE) is None
    assert one.read(b"a", (3, 4)) is not None  # the values are those of the picture, whatever their shape
    assert one.read(b"a", (4, 4)) is None


def test_values_that_are_not_finite_are_not_read(tmp_path):
    values = features(1)
    values[1, 1] = np.nan
    folder(tmp_path).write(b"a", values)
    assert folder(tmp_path).read(b"a", SHAPE) is None


def test_the_folder_is_bounded_and_the_oldest_files_go(tmp_path):
    one = folder(tmp_path, max_bytes=8 * FILE)
    for number in range(8):
        one.write(bytes([number]), features(number))
        os.utime(files(tmp_path)[0].parent / one._name(bytes([number])), ns=(number, number))
    assert one.read(b"\0", SHAPE) is not None  # used now
    one.write(b"\x08", features(8))
    there = [number for number in range(9) if one.read(bytes([number]), SHAPE) is not None]
    assert there == [0, 3, 4, 5, 6, 7, 8]
    for number in range(9, 40):
        one.write(bytes([number]), features(number))
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 8 * FILE
    assert one.read(bytes([39]), SHAPE) is not None


def test_files_of_others_count_but_only_ours_go(tmp_path):
    one = folder(tmp_path, "one", max_bytes=3 * FILE)
    two = folder(tmp_path, "two", max_bytes=3 * FILE)
    (tmp_path / "features" / "notes.txt").write_text("not ours")
    for number in range(6):
        one.write(bytes([number]), features(number))
        two.write(bytes([number]), features(number))
    assert (tmp_path / "features" / "notes.txt").read_text() == "not ours"
    again = folder(tmp_path, "one", max_bytes=3 * FILE)
    again.write(b"new", features(7))
    assert sum(file.stat().st_size for file in files(tmp_path) if file.suffix == ".features") <= 3 * FILE
    assert again.read(b"new", SHAPE) is not None


def test_what_a_killed_process_left_goes(tmp_path):
    one = folder(tmp_path)
    old, young = tmp_path / "features" / "x.part", tmp_path / "features" / "y.part"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    one.write(b"a", features(1))
    assert not old.exists()
    assert young.exists()


def test_larger_than_the_bound(tmp_path):
    folder(tmp_path, max_bytes=FILE - 1).write(b"a", features(1))
    assert files(tmp_path) == []


def test_a_disk_that_is_full_costs_the_file_and_not_the_request(tmp_path, monkeypatch, caplog):
    cache = FeatureCache(10**6, folder(tmp_path))

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "siglance"):
        patch.setattr(os, "replace", full)
        cache.put(b"a", features(1))
        cache.put(b"b", features(2))
    assert [record.getMessage() for record in caplog.records] == [
        "soft tokens are not kept on disk: [Errno 28] No space left on device"
    ]
    assert files(tmp_path) == []
    assert cache.get(b"a", SHAPE) is not None


def test_a_folder_that_is_gone(tmp_path, caplog):
    cache = FeatureCache(0, folder(tmp_path))
    (tmp_path / "features").rmdir()
    assert cache.get(b"a", SHAPE) is None
    cache.put(b"a", features(1))
    assert "not kept on disk" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(InputError, match=r"feature_cache_dir .*features' cannot be used"):
        folder(tmp_path)


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(InputError, match="feature_cache_dir is empty"):
        Engine.open("demo", feature_cache_dir="")


def test_threads_and_processes_share_a_folder(tmp_path):
    """A reader sees a whole file or none, whoever writes."""
    script = (
        "import sys, numpy as np\n"
        "from siglance.engine.feature_cache import FeatureFolder\n"
        "one = FeatureFolder(sys.argv[1], 'bundle', 20 * 80)\n"
        "for number in range(300):\n"
        "    key = bytes([number % 30])\n"
        "    one.write(key, np.full((4, 3), number % 30, np.float32))\n"
    )
    path = str(tmp_path / "features")
    with subprocess.Popen([sys.executable, "-P", "-c", script, path]) as process, ThreadPoolExecutor(4) as pool:

        def work(seed: int) -> None:
            one = FeatureFolder(path, "bundle", 20 * FILE)
            for number in range(seed, 300 + seed):
                values = one.read(bytes([number % 30]), SHAPE)
                assert values is None or (values == number % 30).all()
                one.write(bytes([number % 30]), np.full(SHAPE, number % 30, np.float32))

        list(pool.map(work, range(4)))
    assert process.returncode == 0
    assert not [file for file in files(tmp_path) if file.suffix == ".part"]
