"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FILE_MODE = 0o640
FOLDER_MODE = 0o750
_MAX_STEM_BYTES = 240  # bytes of the target's name in that of its temporary file; names have at most 255
_LOCK_TIMEOUT = 20.0  # seconds that a writer waits for another one of the same file


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents with mode 750 (whatever the umask says)."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    folder.chmod(FOLDER_MODE)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace the file at `path` by `data` in one step; mode 640, missing folders are made with mode 750.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the name: a crash leaves the
    old file or the new one. There is one temporary name per target, locked while it is written: what a killed writer
    left is taken over by the next one, and writers beside each other take turns. A symbolic link stays a link, its
    target is replaced. Errors: OSError.
    """
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    with _temporary(target) as (handle, temporary):
        with os.fdopen(os.dup(handle), "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
        os.fsync(handle)
        os.fchmod(handle, FILE_MODE)
        os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_if_changed(path: str | os.PathLike[str], data: str | bytes) -> bool:
    """write_atomic, unless the file already holds exactly these bytes. Returns whether it wrote."""
    wanted = data.encode("utf-8") if isinstance(data, str) else data
    try:
        if Path(path).read_bytes() == wanted:
            _remove_stale(Path(os.path.realpath(path)))
            return False
    except FileNotFoundError:
        pass
    write_atomic(path, wanted)
    return True


def back_up(path: str | os.PathLike[str], data: bytes) -> Path | None:
    """Keep a file that is about to be replaced by `data`, unless it is empty or says the same, beside it.

    Returns where: `<name>.bak`, or `<name>.bak1` and so on where that is taken by another content; None where there was
    nothing to keep. Errors: OSError.
    """
    try:
        old = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    if not old.strip() or old == data:
        return None
    names = itertools.chain([""], map(str, itertools.count(1)))
    for beside in (Path(f"{os.fspath(path)}.bak{number}") for number in names):
        if not beside.exists():
            write_atomic(beside, old)
        if beside.read_bytes() == old:
            return beside
    raise AssertionError("unreachable: the numbers do not end")


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, str]]:
    """An empty file beside `target` for this writer alone; removed, unless it was renamed, where the block fails."""
    try:
        name = _temporary_name(target)
        handle = _open_locked(name)
    except OSError:  # a file system without locks, another user's file, a writer that hangs
        handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=target.parent)
    try:
        yield handle, name
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    finally:
        with contextlib.suppress(OSError):  # explicitly: a process forked meanwhile holds the handle too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _temporary_name(target: Path) -> str:
    return os.path.join(target.parent, f".{os.fsdecode(os.fsencode(target.name)[:_MAX_STEM_BYTES])}.tmp")


def _open_locked(name: str) -> int:
    """Open the file of this name, made where it is missing, locked and empty. Errors: OSError (no lock to be had)."""
    end = time.monotonic() + _LOCK_TIMEOUT
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _lock(handle):
                if time.monotonic() > end:
                    raise TimeoutError(f"'{name}' is locked by another writer")
                time.sleep(0.01)
            if _still_there(handle, name):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the writer before renamed it: it is the target now


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _still_there(handle: int, name: str) -> bool:
    """Whether the open file has this name. Errors: OSError where it is no plain file of one name."""
    opened = os.fstat(handle)
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
        raise OSError(f"'{name}' is no plain file")
    try:
        present = os.stat(name, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (opened.st_dev, opened.st_ino) == (present.st_dev, present.st_ino)


def _remove_stale(target: Path) -> None:
    """Remove what a killed writer left; a file that is being written stays."""
    name = _temporary_name(target)
    with contextlib.suppress(OSError):
        handle = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _lock(handle) and _still_there(handle, name):
                os.unlink(name)
        finally:
            os.close(handle)
