"""Files that are written whole or not at all, and folders whose every byte is known."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any, ClassVar

from jlstm.files import part_of, sync

MANIFEST = "manifest.json"


class Damaged(ValueError):
    """Raised when a folder's files are not those that were written."""


class InUse(ValueError):
    """Raised when another process works in the same folder."""


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    half = path.with_name(path.name + ".part")
    with open(half, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    sync(path.parent)


def begin(folder: Path) -> Path:
    """Makes an empty folder that will be renamed to ``folder`` when it is whole.

    Raises:
      FileNotFoundError: the folder around it is gone.
    """
    half = part_of(folder)
    if half.exists():
        shutil.rmtree(half)
    if folder.exists() and former_of(folder).exists():
        shutil.rmtree(former_of(folder))
    half.mkdir()
    return half


def former_of(folder: Path) -> Path:
    """Names the folder to which an old one is moved while it is replaced."""
    return folder.with_name(folder.name + ".former")


def seal(half: Path, folder: Path) -> None:
    """Gives a finished folder its manifest and, once all is on the disk, its name."""
    hashes, folders = {}, [half]
    for path in sorted(half.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            hashes[path.relative_to(half).as_posix()] = sha256(path)
            sync(path)
    write_json(half / MANIFEST, {"sha256": hashes})
    for path in reversed(folders):
        sync(path)
    if folder.exists():
        former = former_of(folder)
        shutil.rmtree(former, ignore_errors=True)
        os.rename(folder, former)
        os.rename(half, folder)
        sync(folder.parent)
        shutil.rmtree(former)
    else:
        os.rename(half, folder)
    sync(folder.parent)


def verify(folder: Path) -> None:
    """Compares every file of a folder with its manifest.

    Raises:
      Damaged: one is missing, or has other bytes.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        expected = dict(json.loads(text)["sha256"].items())
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{MANIFEST} cannot be read") from None
    if not expected or not text.endswith(b"}\n"):
        raise Damaged(f"{MANIFEST} is not complete")
    for name, digest in expected.items():
        try:
            found = sha256(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
            raise Damaged(f"{name} is missing") from None
        if found != digest:
            raise Damaged(f"{name} has changed since it was written")


def sha256(path: Path) -> str:
    """Hashes a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """Keeps other processes out of a folder until it is released.

    The operating system releases the lock when the process ends, however that happens.
    Within one process the lock may be taken several times.
    """

    _held: ClassVar[dict[Path, tuple[IO[str], int]]] = {}

    def __init__(self, folder: Path, where: str) -> None:
        """Takes the lock.

        Raises:
          InUse: another process has it.
        """
        self._path: Path | None = folder.resolve() / "lock"
        if self._path in self._held:
            file, count = self._held[self._path]
            self._held[self._path] = file, count + 1
            return
        file = open(self._path, "a+")  # noqa: SIM115
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise OSError(f"{where}: {folder} cannot be locked ({error})") from None
            raise InUse(
                f"{where}: another run, of process {owner}, is at work in {folder}; "
                "wait for its end, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._held[self._path] = file, 1

    def release(self) -> None:
        """Releases the lock once, and for other processes when nobody here holds it."""
        path, self._path = self._path, None
        if path is None or path not in self._held:
            return
        file, count = self._held[path]
        if count > 1:
            self._held[path] = file, count - 1
        else:
            del self._held[path]
            file.close()


def _forget() -> None:
    """Closes the locks in a forked child, which would keep them for its dead parent."""
    for file, _ in Lock._held.values():
        os.close(file.fileno())
    Lock._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _lock(file: IO[str]) -> None:
    if os.name == "nt":
        import msvcrt

        # A byte beyond what is written there, so that the owner can be read.
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
