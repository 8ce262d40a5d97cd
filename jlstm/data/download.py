"""Downloads of files whose hash is known, and archives that need not be trusted."""

from __future__ import annotations

import bz2
import dataclasses
import errno
import gzip
import hashlib
import http.client
import io
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import IO, Any

BLOCK = 1 << 20
COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
DAMAGE = (
    EOFError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


def fetch(
    url: str,
    *,
    sha256: str,
    path: str | Path,
    max_bytes: int = 8 << 30,
    timeout: float = 60.0,
) -> Path:
    """Downloads a file once, and checks that it has the expected hash.

    The file appears at ``path`` only when it is complete and has the hash. If it is
    there already, the network is not used. The environment variable
    ``JLSTM_OFFLINE=1`` forbids all use of the network.

    Args:
      url: the address: ``https://``, ``file://``, or ``http://`` on this machine. This
        holds for redirects as well.
      sha256: the expected SHA-256 of the file, 64 hexadecimal digits.
      path: where to put the file; missing folders are made.
      max_bytes: the largest size that is downloaded; 8 GiB by default.
      timeout: for how many seconds the server may send nothing.

    Returns:
      The path of the file.

    Raises:
      ValueError: the download, or a file that is at ``path`` already, has another hash
        (that file is left alone); the download is too large; or the URL is not allowed.
      OSError: the network is forbidden, does not answer, or the answer is cut short.

    Example:
      >>> import hashlib, pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> count = (folder / "source").write_bytes(b"abc")
      >>> url, sha256 = (folder / "source").as_uri(), hashlib.sha256(b"abc").hexdigest()
      >>> jlstm.data.fetch(url, sha256=sha256, path=folder / "copy").read_bytes()
      b'abc'
    """
    path, expected = Path(path), sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise ValueError(f"fetch: sha256 must be 64 hex digits, got {sha256!r}")
    _check_url(url)
    if path.exists():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _check_hash(
            path,
            path.stat().st_size,
            found,
            expected,
            "remove the file to fetch it again",
        )
        return path
    by_hand = f"or put the file with SHA-256 {expected} at {path}"
    offline = os.environ.get("JLSTM_OFFLINE", "") not in ("", "0")
    if offline and not url.lower().startswith("file:"):
        raise OSError(
            f"fetch: {url}: JLSTM_OFFLINE forbids downloads; unset it, {by_hand}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        size, found = _download(url, part, max_bytes, timeout)
        _check_hash(
            url, size, found, expected, "the file has changed, or sha256 is wrong"
        )
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise OSError(f"fetch: {url}: {error}; try again, {by_hand}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def extract(
    archive: str | Path,
    folder: str | Path,
    *,
    max_bytes: int = 8 << 30,
    max_files: int = 100_000,
    max_ratio: float = 200,
) -> Path:
    """Unpacks a zip or tar archive, plain or compressed as ``.gz``, ``.bz2``, ``.xz``.

    The folder appears only when everything is in it. The archive need not be trusted:
    it can write nowhere else, and no more than the limits allow. It may contain only
    files and folders, which get the modes ``0o644`` and ``0o755``. Names that clash on
    some systems, because they differ only in case, are refused on all.

    Args:
      archive: the path of the archive. Its format is read from its content.
      folder: where to unpack. It must be empty or not exist.
      max_bytes: the largest total size of all files, unpacked; 8 GiB by default.
      max_files: the largest number of files and folders.
      max_ratio: the largest ratio of unpacked to packed bytes, beyond 1 MiB. It applies
        to the whole archive and to each member of a zip, and stops archives that are
        small on disk and huge when unpacked.

    Returns:
      The path of the folder.

    Raises:
      FileNotFoundError: there is no such archive.
      ValueError: the folder is not empty, the archive is damaged, a member is not
        allowed, or a limit is exceeded; the message names the member.

    Example:
      >>> import pathlib, tempfile, zipfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with zipfile.ZipFile(folder / "a.zip", "w") as file:
      ...     file.writestr("texts/a.txt", "abc")
      >>> unpacked = jlstm.data.extract(folder / "a.zip", folder / "a")
      >>> (unpacked / "texts" / "a.txt").read_text()
      'abc'
    """
    archive, folder = Path(archive), Path(folder).resolve()
    if not archive.is_file():
        raise FileNotFoundError(f"extract: no file at {archive}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"extract: {folder} exists already; choose an empty folder")
    half = _beside(folder)
    half.mkdir(parents=True)
    size = archive.stat().st_size
    try:
        half.chmod(0o755)
        _unpack(archive, _Target(half, size, max_bytes, max_files, max_ratio))
        if folder.exists():
            folder.rmdir()
        half.rename(folder)
    except _Refused as error:
        message = f"extract: {archive}: {error}; nothing is unpacked"
        raise ValueError(message) from None
    except (*DAMAGE, OSError) as error:
        # Decompressors raise OSError without a number; zipfile seeks where headers say.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        message = (
            f"extract: {archive} is not a valid archive: {str(error) or 'cut off'}"
        )
        raise ValueError(message) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder


def _beside(path: Path) -> Path:
    """Names the temporary file beside ``path``, differently for each process."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost")
    if not (
        (parts.scheme == "https" and parts.hostname)
        or (parts.scheme == "http" and local)
        or (parts.scheme == "file" and (local or not parts.netloc))
    ):
        raise ValueError(
            "fetch: the URL must be https://, file://, or http:// of this machine, got "
            f"{url!r}"
        )


def _check_hash(
    what: Path | str, size: int, found: str, expected: str, advice: str
) -> None:
    if found != expected:
        raise ValueError(
            f"fetch: {what} has SHA-256 {found} ({size} bytes), expected {expected}; "
            f"{advice}"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _check_url(newurl)
            if req.type == "https" and not newurl.lower().startswith("https:"):
                raise ValueError(f"fetch: {newurl!r} is not an https:// URL")
        except ValueError as error:
            fp.close()
            raise ValueError(f"{error}, after a redirect from {req.full_url}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, part: Path, max_bytes: int, timeout: float) -> tuple[int, str]:
    opener = urllib.request.build_opener(_Redirects())
    digest, size = hashlib.sha256(), 0
    with opener.open(url, timeout=timeout) as response, open(part, "xb") as file:
        declared = response.headers.get("Content-Length", "")
        length = int(declared) if declared.isdecimal() else None
        if length is None or length <= max_bytes:
            while block := response.read(min(BLOCK, max_bytes + 1 - size)):
                size += len(block)
                digest.update(block)
                file.write(block)
        if max(size, length or 0) > max_bytes:
            raise ValueError(
                f"fetch: {url} has more than max_bytes={max_bytes}; raise it if the "
                "file may be that long"
            )
        if length is not None and size != length:
            raise OSError(f"the answer is cut off: got {size} of {length} bytes")
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


class _Refused(Exception):
    """Raised for something that an archive must not contain."""


@dataclasses.dataclass
class _Target:
    """The folder to unpack to, and what has been unpacked so far."""

    folder: Path
    packed: int
    max_bytes: int
    max_files: int
    max_ratio: float

    def __post_init__(self) -> None:
        self.written = 0
        # By name in lower case: the first spelling of the name, and whether a folder.
        self.seen: dict[str, tuple[str, bool]] = {}
        self.named: set[str] = set()

    def place(self, name: str, *, is_folder: bool) -> Path:
        """Checks a member's name, makes its folders, and returns its path."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        drive = any(PureWindowsPath(part).drive for part in parts)
        if name.startswith("/") or ".." in parts or drive:
            raise _Refused(f"{name!r} leads out of the folder")
        if "\\" in name or "\0" in name or not (parts or is_folder):
            raise _Refused(f"{name!r} is not a valid file name")
        if len(parts) > 64:
            raise _Refused(f"{name[:40]!r}... is nested in more than 64 folders")
        path = ""
        for depth, part in enumerate(parts, 1):
            path = f"{path}/{part}" if path else part
            entry = (path, is_folder or depth < len(parts))
            first = self.seen.setdefault(path.casefold(), entry)
            if first != entry:
                raise _Refused(f"{name!r} clashes with {first[0]!r}")
            if len(self.seen) > self.max_files:
                raise _Refused(f"has more than max_files={self.max_files}")
            if first is entry and entry[1]:
                (self.folder / path).mkdir()
                (self.folder / path).chmod(0o755)
        if path.casefold() in self.named:
            raise _Refused(f"{name!r} occurs twice")
        self.named.add(path.casefold())
        return self.folder / path

    def write(self, name: str, source: IO[bytes], size: int, packed: int) -> None:
        """Writes a file of a claimed size, and counts the bytes that really come."""
        path, written = self.place(name, is_folder=False), 0
        with open(path, "xb") as file:
            while block := source.read(BLOCK):
                written += len(block)
                self.written += len(block)
                if self.written > self.max_bytes:
                    raise _Refused(f"{name!r} exceeds max_bytes={self.max_bytes}")
                for unpacked, of in ((written, packed), (self.written, self.packed)):
                    if unpacked > max(BLOCK, self.max_ratio * of):
                        raise _Refused(f"{name!r} exceeds max_ratio={self.max_ratio}")
                file.write(block)
        path.chmod(0o644)
        if written != size:
            raise EOFError(f"{name!r} has {written} bytes, not {size}")


def _unpack(archive: Path, target: _Target) -> None:
    with open(archive, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    for magic, opener in COMPRESSED.items():
        if head.startswith(magic):
            return _unpack_tar(archive, opener, target)
    try:
        # Not is_tarfile, which reads names of any length that a header claims. Before
        # is_zipfile, which would take a tar that ends with a zip for that zip.
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if not zipfile.is_zipfile(archive):
            raise _Refused("is neither zip nor tar, or is cut off") from None
        return _unpack_zip(archive, target)
    return _unpack_tar(archive, open, target)


def _unpack_zip(archive: Path, target: _Target) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(f"{name!r} is a link or a device")
            if member.flag_bits & 1:
                raise _Refused(f"{name!r} is encrypted")
            # For other methods, zipfile unpacks a whole block at once, of any ratio.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _Refused(f"{name!r} is compressed by a method other than deflate")
            if name.endswith("/"):
                target.place(name, is_folder=True)
                continue
            with file.open(member) as source:
                target.write(name, source, member.file_size, member.compress_size)


def _unpack_tar(archive: Path, opener: Callable[..., Any], target: _Target) -> None:
    limit = target.max_bytes + tarfile.RECORDSIZE * (target.max_files + 1)
    with opener(archive, "rb") as raw:
        stream = _Forward(raw, limit)
        file: Any = tarfile.TarFile(fileobj=stream, encoding="utf-8")
        while member := file.next():
            file.members.clear()  # else they add up
            if member.isdir():
                target.place(member.name, is_folder=True)
                continue
            source = file.extractfile(member) if member.isfile() else None
            if source is None or member.issparse():
                raise _Refused(f"{member.name!r} is a link, a device or a sparse file")
            with source:
                target.write(member.name, source, member.size, target.packed)
        # tarfile takes a broken header for the end of the archive.
        if stream.last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(
                f"neither a member nor the end at byte {file.offset}"
            )
        while stream.read(BLOCK):  # to the checksum, where there is one
            pass


class _Forward(io.RawIOBase):
    """A stream that can only be read forwards, in small pieces.

    A header may claim that its names are gigabytes long, or that data begin before it.
    """

    def __init__(self, raw: IO[bytes], limit: int) -> None:
        self._raw, self._limit, self._at = raw, limit, 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= BLOCK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = data = self._raw.read(size)
        self._at += len(data)
        if self._at > self._limit:
            raise _Refused(
                f"has more than {self._limit} bytes, the limit that follows from "
                "max_bytes and max_files"
            )
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset < self._at:
            raise tarfile.ReadError("data before their header")
        while self._at < offset and self.read(min(offset - self._at, BLOCK)):
            pass
        return self._at
