"""Files are replaced in one step or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from amct_ext.common import files
from amct_ext.common.files import write_atomic, write_if_changed


def test_modes_do_not_depend_on_the_umask(tmp_path: Path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a" / "b" / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b" / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert write_if_changed(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"data"


FORK = multiprocessing.get_context("fork")


def kill_a_writer(path: Path) -> None:
    """A process that is killed where it would have renamed its temporary file."""

    def write() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_atomic(path, "half" * 1000)

    child = FORK.Process(target=write)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["file", "n" * 254, "\u540d" * 84], ids=["short", "long", "in bytes"])
def test_what_killed_writers_left_is_taken_over(tmp_path: Path, name: str):
    path = tmp_path / name
    for _ in range(2):
        kill_a_writer(path)
        assert len(os.listdir(tmp_path)) == 1
    write_atomic(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == [name]
    kill_a_writer(path)
    assert not write_if_changed(path, "new")  # nothing to write: the remainder goes all the same
    assert os.listdir(tmp_path) == [name]


def test_writers_beside_each_other_take_turns(tmp_path: Path):
    path = tmp_path / "file"
    texts = [str(i) * (200_000 + i) for i in range(4)]

    def write(text: str) -> None:
        for _ in range(5):
            write_atomic(path, text)
            assert path.read_text() in texts

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    children = [FORK.Process(target=write, args=(text,)) for text in texts]
    for worker in children + threads:
        worker.start()
    for worker in children + threads:
        worker.join()
    assert all(child.exitcode == 0 for child in children)
    assert path.read_text() in texts and os.listdir(tmp_path) == ["file"]


def test_a_file_that_is_being_written_is_not_swept_away(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, "text")
    with files._temporary(path) as (_, temporary):
        assert not write_if_changed(path, "text")
        assert os.path.exists(temporary)
        os.unlink(temporary)


@pytest.mark.parametrize("made", ["folder", "link", "second name", "no locks", "a writer that hangs"])
def test_a_temporary_name_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str):
    """Another temporary file is taken; what stood there is not touched."""
    path, in_the_way, other = tmp_path / "file", tmp_path / ".file.tmp", tmp_path / "other"
    other.write_text("precious")
    if made == "folder":
        in_the_way.mkdir()
    elif made == "link":
        in_the_way.symlink_to(other)
    elif made == "second name":
        os.link(other, in_the_way)
    else:
        error = OSError("no locks available") if made == "no locks" else BlockingIOError()
        monkeypatch.setattr(files, "_LOCK_TIMEOUT", 0.02)
        monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(error))
    write_atomic(path, "new")
    assert path.read_text() == "new" and other.read_text() == "precious"
    assert {"file", "other"} <= set(os.listdir(tmp_path)) <= {"file", "other", ".file.tmp"}
