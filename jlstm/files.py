"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears, or replaces another, at once; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = part_of(path)
    try:
        half.write_bytes(data)
        sync(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    sync(path.parent)


def part_of(path: Path) -> Path:
    """Names what another file or folder is while it is made."""
    return path.with_name(path.name + ".part")


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    if path.is_dir():
        # Some systems cannot open a folder, or have no fsync of one.
        with contextlib.suppress(PermissionError):
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def _fsync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
