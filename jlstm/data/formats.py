"""Readers of text files, and splits of them."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path


def read_text(path: str | Path) -> str:
    r"""Reads a UTF-8 text file, plain or compressed with gzip.

    All ends of lines become ``\n``.

    Args:
      path: the path of the file. With the suffix ``.gz`` it is decompressed.

    Returns:
      The text.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the path is a folder, or the file is empty, not UTF-8, or not a
        valid gzip file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_text: no file at {path}")
    if path.is_dir():
        raise ValueError(f"read_text: {path} is a folder; name a file in it")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"read_text: {path} is not a valid gzip file: {error}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_text: {path} is not UTF-8: byte {data[error.start]:#04x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from error
    if not text:
        raise ValueError(f"read_text: {path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_files(
    files: Sequence[tuple[str, str]], fractions: Sequence[float], *, seed: int = 0
) -> tuple[list[tuple[str, str]], ...]:
    """Splits named texts into parts, such as training, validation and test.

    Each part has about the given fraction of all characters. A file always goes to one
    part as a whole, because lines of one file are too similar to test on. The part
    depends on the names of the files and the seed, not on their order.

    Args:
      files: pairs ``(name, text)``, all names different.
      fractions: one for each part, with sum 1, such as ``(0.8, 0.1, 0.1)``.
      seed: another seed gives another split.

    Returns:
      One list of files for each part, sorted by name.

    Raises:
      ValueError: the fractions do not sum to 1, a name comes twice, or a part would
        have no file.

    Example:
      >>> files = [(name, 10 * name) for name in "abcdefghij"]
      >>> [len(part) for part in jlstm.data.split_files(files, (0.8, 0.2))]
      [8, 2]
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"split_files: fractions must be positive with sum 1, got {fractions}"
        )
    if len({name for name, _ in files}) < len(files):
        raise ValueError("split_files: names must all be different, got one twice")
    total = sum(len(text) for _, text in files)
    parts: tuple[list[tuple[str, str]], ...] = tuple([] for _ in fractions)
    part, before, bound = 0, 0, fractions[0] * total
    for name, text in sorted(files, key=lambda file: digest(f"{seed}/{file[0]}")):
        # A file belongs to the part in which its middle lies.
        while before + len(text) / 2 > bound and part < len(parts) - 1:
            part += 1
            bound += fractions[part] * total
        parts[part].append((name, text))
        before += len(text)
    if not all(parts):
        raise ValueError(
            f"split_files: {len(files)} files are too few for fractions {fractions}: "
            f"the parts have {[len(part) for part in parts]}; give more files"
        )
    return tuple(sorted(part) for part in parts)


def digest(name: str) -> bytes:
    """Gives a key that sorts names in a random order, the same on every machine."""
    return hashlib.sha256(name.encode()).digest()
