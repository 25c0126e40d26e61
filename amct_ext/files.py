"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

FILE_MODE = 0o640
FOLDER_MODE = 0o750


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
    old file or the new one. A symbolic link stays a link, its target is replaced. Errors: OSError.
    """
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, FILE_MODE)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
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
            return False
    except FileNotFoundError:
        pass
    write_atomic(path, wanted)
    return True


def keep_old(path: str | os.PathLike[str], data: bytes) -> Path | None:
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
