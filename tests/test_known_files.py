"""Facts about files that came before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from siglance.engine.known_files import NOTHING_KNOWN, KnownFiles, file_key


def test_keys_stand_for_the_bytes_and_the_part():
    keys = [file_key(b"a"), file_key(b"b"), file_key(b"a", 1), file_key(b"a", 2), file_key(b"1a"), file_key(b"")]
    assert all(len(key) == 32 for key in keys)
    assert file_key(b"a") == file_key(b"a")
    assert len(set(keys)) == len(keys)


def test_kinds_of_facts_are_apart():
    known = KnownFiles()
    known.put((3, 4), b"file")
    known.put(b"content", b"file")
    assert known.get(tuple, b"file") == (3, 4)
    assert known.get(bytes, b"file") == b"content"
    assert known.get(bytes, b"file", "view") is None
    assert known.get(tuple, b"other") is None
    known.clear()
    assert (len(known), known.get(tuple, b"file")) == (0, None)


def test_the_ones_used_last_stay():
    known = KnownFiles(3)
    for name in (b"a", b"b", b"c"):
        known.put((1, 1), name)
    assert known.get(tuple, b"a") is not None
    known.put((1, 1), b"d")
    assert [known.get(tuple, name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_nothing_is_known_by_default():
    NOTHING_KNOWN.put((1, 1), b"file")
    assert (len(NOTHING_KNOWN), NOTHING_KNOWN.get(tuple, b"file")) == (0, None)


def test_threads():
    known = KnownFiles(50)

    def work(seed: int) -> None:
        for number in range(500):
            known.put((seed, number), b"%d" % (number % 70))
            assert isinstance(known.get(tuple, b"%d" % (number % 70)), tuple | None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(known) == 50
