"""The house: imports go one way, public names resolve, and signatures are one shape."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jlstm

ROOT = Path(__file__).parents[1]
LEAVES = ("flax", "saved", "export", "testing", "convert", "diagnostics")
# What a package of jlstm may import; "" stands for `import jlstm` itself.
ORDER = (
    "types",
    "extras",
    "files",
    "weights",
    "init",
    "cells",
    "kernels",
    "door",
    "layers",
    ("models", "decode"),
)
FREE = {
    "train": {
        "train",
        "types",
        "extras",
        "files",
        "weights",
        "kernels",
    },  # for the loss in C++
    "data": {"data"},
    "__init__": None,
    "bench": None,
    "doctor": None,
}

SIGNATURES = {
    "init_carry": ["params", "batch_shape"],
    "step": ["params", "carry", "x"],
    "apply": ["params", "xs", "carry"],
    "last": ["params", "xs", "carry"],
    "prepare": ["params", "xs"],
    "project": ["params", "x"],
    "mix": ["params", "carry", "zx"],
    "update": ["params", "carry", "zx", "zh"],
    "retime": ["lengths", "mask", "resets"],
}
OPTIONAL_PACKAGES = (
    "equinox",
    "flatbuffers",
    "flax.nnx",
    "grain",
    "haiku",
    "jax.experimental.rnn",
    "keras",
    "matplotlib",
    "orbax",
    "rich",
    "safetensors",
    "tensorstore",
    "torch",
    "tyro",
)


def allowed() -> dict[str, set[str] | None]:
    """Maps a package of jlstm to those that it may import; None means any."""
    seen: set[str] = set()
    table: dict[str, set[str] | None] = dict(FREE)
    for rank in ORDER:
        names = {rank} if isinstance(rank, str) else set(rank)
        for name in names:
            table[name] = seen | {name}
        seen = seen | names
    table |= {name: seen | {name} for name in LEAVES}
    return table | {"__main__": {"bench", "doctor"}}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the line and the full dotted name of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def package(path: Path) -> str:
    return path.relative_to(ROOT / "jlstm").parts[0].removesuffix(".py")


MODULES = ("jlstm", "jlstm.bench.run", "jlstm.convert", "jlstm.diagnostics")
SOURCES = sorted((ROOT / "jlstm").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    table = allowed()
    assert package(path) in table, f"{package(path)}: has no place in ORDER"
    may = table[package(path)]
    for line, name in imports(path):
        head, _, rest = name.partition(".")
        if head != "jlstm" or may is None:
            continue
        target = rest.partition(".")[0]
        assert target in may, f"{path}:{line}: imports jlstm.{target}"


def test_imports_of_bench_are_of_the_command_line_alone():
    for path in SOURCES:
        if package(path) in ("bench", "__main__"):
            continue
        for line, name in imports(path):
            assert not name.startswith("jlstm.bench"), f"{path}:{line}: imports {name}"


def test_imports_of_the_data_package_are_free_of_jax():
    for path in (ROOT / "jlstm" / "data").rglob("*.py"):
        for line, name in imports(path):
            assert name.partition(".")[0] != "jax", f"{path}:{line}: imports {name}"


def test_imports_of_experiments_are_public():
    for path in EXPERIMENTS:
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "jlstm":
                continue
            assert parts[1:2] != ["kernels"], f"{path}:{line}: imports {name}"
            private = [part for part in parts if part.startswith("_")]
            assert not private, f"{path}:{line}: imports {name}"


def test_public_names_resolve_once_and_are_not_private():
    assert len(jlstm.__all__) == len(set(jlstm.__all__))
    for name in jlstm.__all__:
        assert not name.startswith("_")
        assert getattr(jlstm, name) is not None
    imported = {}
    exec("from jlstm import *", imported)
    assert set(jlstm.__all__) <= set(imported)


def configs() -> list[type]:
    """The exported classes that are cells, layers or models."""
    values = (getattr(jlstm, name) for name in jlstm.__all__)
    classes = [value for value in values if inspect.isclass(value)]
    return [c for c in classes if hasattr(c, "init_carry")]


def test_configs_are_all_found():
    found = {c.__name__ for c in configs()}
    assert {"LSTM", "GRU", "Elman", "Precision", "RNN", "Stack", "Conv"} <= found
    assert {"Classifier", "Tagger", "LanguageModel", "Cell", "Layer"} <= found


@pytest.mark.parametrize("config", configs(), ids=lambda c: c.__name__)
def test_signatures_begin_as_the_protocols_do(config):
    sequence = hasattr(config, "apply")
    assert sequence != hasattr(config, "step"), "a cell or a layer, not both"
    expected = {**SIGNATURES, "init": ["key", "xs" if sequence else "x"]}
    for method, names in expected.items():
        if not hasattr(config, method):
            continue
        raw = inspect.getattr_static(config, method)
        parameters = list(
            inspect.signature(getattr(config, method)).parameters.values()
        )
        if not isinstance(raw, staticmethod):
            assert parameters.pop(0).name == "self"
        by_place = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        positional = [p for p in parameters if p.kind in by_place]
        assert [p.name for p in positional] == names, f"{config.__name__}.{method}"
        for parameter in parameters[len(names) :]:
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        by_keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        words = {"lengths", "mask", "resets", "key"}
        assert by_keyword <= words, f"{config.__name__}.{method}: {by_keyword - words}"


@pytest.mark.parametrize("config", configs(), ids=lambda c: c.__name__)
def test_configs_are_frozen_dataclasses(config):
    if config in (jlstm.Cell, jlstm.Layer):
        return
    assert dataclasses.is_dataclass(config)
    assert config.__setattr__ is not object.__setattr__, "not frozen"
    assert config.__hash__ is not None


@pytest.mark.parametrize("module", MODULES)
def test_import_loads_no_optional_package(module):
    code = (
        "import sys, jax, flax.struct, optax\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        f"found = set({OPTIONAL_PACKAGES!r}) & (set(sys.modules) - before)\n"
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
