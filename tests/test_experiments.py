"""Guarantees that experiments run, leave what is promised, and refuse bad input."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from jlstm import train

FOLDER = Path(__file__).parent.parent / "experiments"
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"report"})
KEYS = {
    "experiment",
    "preset",
    "metric",
    "value",
    "floor",
    "floor_name",
    "published",
    "seconds",
    "device",
    "seed",
    "test_evaluations",
}


def load(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def _users_settings():
    """Scripts run under JAX's default rules, as users run them."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def smoke(name, path, **changes):
    module = load(name)
    config = dataclasses.replace(module.PRESETS["smoke"], preset="smoke", workdir=path)
    return module, module.main(dataclasses.replace(config, **changes))


@pytest.mark.core
@pytest.mark.parametrize(
    "name", ["char_lm", pytest.param("highlight", marks=pytest.mark.slow)]
)
def test_smoke_preset_leaves_its_results(name, tmp_path):
    check_smoke(name, tmp_path)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"char_lm", "highlight"}))
def test_other_smoke_presets_leave_their_results(name, tmp_path):
    check_smoke(name, tmp_path)


def check_smoke(name, path):
    _, result = smoke(name, path)
    assert set(result) >= KEYS
    assert json.loads((path / "result.json").read_text()) == result
    assert math.isfinite(result["value"])
    assert math.isfinite(result["floor"])
    for file in ("config.json", "env.json"):
        assert json.loads((path / file).read_text())
    assert list(path.glob("metrics*.jsonl"))
    assert list((path / "plots").glob("*.png"))


@pytest.mark.parametrize("name", NAMES)
def test_script_is_one_readable_file(name):
    source = (FOLDER / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 300
    tree = ast.parse(source)
    assert f"python experiments/{name}.py" in (ast.get_docstring(tree) or "")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [n for n in names if n.startswith("_") and not n.startswith("__")]


def test_char_lm_generates_from_a_finished_run(tmp_path, capsys):
    module, _ = smoke("char_lm", tmp_path)
    config = dataclasses.replace(module.PRESETS["smoke"], workdir=tmp_path)
    out = module.main(dataclasses.replace(config, generate="def "))
    assert out["text"].startswith("def ")
    assert len(out["text"]) == len("def ") + config.sample
    capsys.readouterr()
    refused(module, ["--workdir", str(tmp_path), "--generate", "def ☃"])
    message = capsys.readouterr().err
    assert "'☃' at position 4" in message
    assert message.count("\n") == 1


def refused(module, arguments):
    with pytest.raises(SystemExit) as stop:
        train.run(module.main, module.PRESETS, arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no file"),
        (b"", "is empty"),
        (b"caf\xe9", "not UTF-8"),
        (b"too short", "too few"),
    ],
    ids=["missing", "empty", "not UTF-8", "short"],
)
def test_char_lm_refuses_bad_data_in_one_line(content, expected, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    refused(load("char_lm"), ["--preset", "smoke", "--data", str(path)])
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--hiden-size", "3"], "hiden-size"),
        (["--preset", "huge"], "'huge' is not one of quick, smoke, cpu, paper"),
        (["--hidden-size", "big"], "hidden-size"),
        (["--hidden-size", "-1"], "hidden_size: must be a positive int, got -1"),
        (["--generate", "def "], "needs the --workdir of a finished run"),
        (["--preset", "smoke", "--implementation", "fast"], "must be one of"),
    ],
)
def test_char_lm_refuses_bad_options_in_one_line(arguments, expected, capsys):
    refused(load("char_lm"), arguments)
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
