"""Files put in place, locks, and temporary places that another user could have prepared."""

import os

import pytest

from megalite.files import locked, read_bounded

pytestmark = pytest.mark.fast


def test_of_two_one_holds_the_lock_of_a_directory(tmp_path):
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert first and not second


def test_reading_is_bounded(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    os.mkfifo(tmp_path / "pipe")
    assert read_bounded(tmp_path / "file", 10) == bytes(10)
    for name, limit in (("file", 9), ("pipe", 9), (".", 9)):
        with pytest.raises(OSError):
            read_bounded(tmp_path / name, limit)
    with pytest.raises(OSError, match="not a plain file"):
        read_bounded("/dev/zero", 9)
