"""Files put in place, locks, and temporary places that another user could have prepared."""

import os
import tempfile

import pytest

from megalite.data.cache import _open_lock
from megalite.errors import UserError
from megalite.files import locked, private_folder, read_bounded

pytestmark = pytest.mark.fast


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"megalite-{os.getuid()}"


@pytest.mark.parametrize("trap", ["link", "file", "open to others"])
def test_a_folder_that_someone_else_prepared_is_refused(temporary, tmp_path, trap):
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        temporary.symlink_to(tmp_path / "elsewhere")
    elif trap == "file":
        temporary.write_text("")
    else:
        temporary.mkdir()
        temporary.chmod(0o777)
    with pytest.raises(UserError, match=f"{temporary} is not a folder that only this user"):
        private_folder()


def test_a_lock_where_the_file_system_knows_none(temporary, tmp_path, monkeypatch):
    """It lies in the user's own folder, and is not followed through a link to another file."""

    def none(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    os.close(_open_lock(tmp_path / "index.lock"))
    (made,) = temporary.iterdir()
    assert temporary.stat().st_mode & 0o777 == 0o700
    made.unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    made.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        _open_lock(tmp_path / "index.lock")
    assert victim.read_text() == "precious"


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
