"""A corpus that every machine has: the source of Python's standard library."""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jlstm.data.formats import digest, read_text

TOKEN_CLASSES = (
    "whitespace",
    "comment",
    "string",
    "number",
    "operator",
    "keyword",
    "name",
    "definition",
    "call",
    "decorator",
)
"""The classes that :func:`python_token_classes` tells apart, in order of their index.

A definition is the name after ``def`` or ``class``, a call is a name before ``(``, and
a decorator is the dotted name after ``@``, with the ``@``. Soft keywords such as
``match`` are names.
"""

_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_PRINTABLE = frozenset(map(chr, range(32, 127))) | {"\n"}
_SKIPPED = {tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_OPERATORS = tokenize.EXACT_TOKEN_TYPES
_SIMPLE = {
    tokenize.NEWLINE: "whitespace",
    tokenize.COMMENT: "comment",
    tokenize.STRING: "string",
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
}


def python_sources(limit: int | None = None) -> list[tuple[str, str]]:
    """Reads the Python files of the running interpreter's standard library.

    Tests, generated tables and demonstrations are left out. So are files with anything
    but printable ASCII and newlines, which leaves 96 symbols, and files that are not
    valid Python.

    Args:
      limit: the largest total number of characters; None reads all. Files are chosen by
        a hash of their names, so they are the same each time and come from all parts of
        the library.

    Returns:
      Pairs of module path (such as ``"asyncio/tasks.py"``) and source, sorted by path.

    Raises:
      ValueError: the library has no source files, or each is longer than the limit.

    Example:
      >>> files = jlstm.data.python_sources(limit=100_000)
      >>> sum(len(source) for _, source in files) <= 100_000
      True
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in _library_files(root)]
    chosen, room = [], limit
    for name in sorted(names, key=digest):
        if room is not None and room <= 0:
            break
        try:
            source = read_text(root / name)
        except ValueError:
            continue
        fits = room is None or len(source) <= room
        if fits and _PRINTABLE.issuperset(source) and _is_python(source):
            chosen.append((name, source))
            room = None if room is None else room - len(source)
    if not chosen:
        raise ValueError(
            f"python_sources: no file under {root} within limit={limit}; raise the "
            "limit, or use an interpreter that has its library's source"
        )
    return sorted(chosen)


def python_token_classes(source: str) -> np.ndarray:
    """Labels each character of Python source with the class of its token.

    The labels are those of Python's own ``tokenize``. An f-string is a string from its
    prefix to its last quote, on every version of Python.

    Args:
      source: the text of a file, ``T`` characters.

    Returns:
      ``[T]``, uint8, indices into :data:`TOKEN_CLASSES`.

    Raises:
      ValueError: ``tokenize`` refuses the source.

    Example:
      >>> labels = jlstm.data.python_token_classes("f(x)  # y")
      >>> [jlstm.data.TOKEN_CLASSES[i] for i in labels[[0, 1, 2, 4, 6]]]
      ['call', 'operator', 'name', 'whitespace', 'comment']
    """
    lines = [0, *itertools.accumulate(len(line) + 1 for line in source.split("\n"))]
    labels = np.zeros(len(source), np.uint8)
    tokens = _join_strings(_tokens(source))
    for token, (row, column), (last_row, last_column) in _classes(tokens):
        span = slice(lines[row - 1] + column, lines[last_row - 1] + last_column)
        labels[span] = TOKEN_CLASSES.index(token)
    return labels


Place = tuple[int, int]
Token = tuple[int, str, Place, Place]


def _tokens(source: str) -> list[Token]:
    """Tokenizes; refuses error tokens, for which newer versions of Python raise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(
            f"python_token_classes: the text must be valid Python: {error}"
        ) from error
    wrong = [
        token
        for token in tokens
        if token.type == tokenize.ERRORTOKEN
        or (token.type == tokenize.OP and token.string not in _OPERATORS)
    ]
    if wrong:
        raise ValueError(
            "python_token_classes: the text must be valid Python, got "
            f"{wrong[0].string!r} at {wrong[0].start}"
        )
    return [(token.type, token.string, token.start, token.end) for token in tokens]


def _join_strings(tokens: list[Token]) -> Iterator[Token]:
    """Joins the parts that an f-string has from Python 3.12 on into one string."""
    depth, start = 0, (0, 0)
    for kind, text, first, last in tokens:
        name = tokenize.tok_name[kind]
        if name.endswith("STRING_START"):
            start = start if depth else first
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield tokenize.STRING, "", start, last
        elif not depth and kind not in _SKIPPED:
            yield kind, text, first, last


def _classes(tokens: Iterator[Token]) -> Iterator[tuple[str, Place, Place]]:
    """Names the class of each token; that of a name depends on its neighbours."""
    end: Token = (tokenize.ENDMARKER, "", (0, 0), (0, 0))
    before, starts_line, decorates = "", True, False
    for (kind, text, first, last), after in itertools.pairwise([*tokens, end]):
        # Only at the start of a logical line does `@` begin a decorator.
        decorates = (starts_line and text == "@") or (
            decorates and (text == "." or kind == tokenize.NAME)
        )
        if decorates:
            label = "decorator"
        elif kind != tokenize.NAME:
            label = _SIMPLE[kind]
        elif keyword.iskeyword(text):
            label = "keyword"
        elif before in ("def", "class"):
            label = "definition"
        else:
            label = "call" if after[1] == "(" else "name"
        if kind != tokenize.COMMENT:
            before, starts_line = text, kind == tokenize.NEWLINE
        yield label, first, last


def _library_files(root: Path) -> list[Path]:
    return [
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith(("_sysconfigdata", "sitecustomize"))
        and not any(part.startswith("config-") for part in path.parts)
    ]


def _is_python(source: str) -> bool:
    """Tells whether source parses, which is far faster than to tokenize it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True
