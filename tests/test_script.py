"""Experiments: clear command lines, work folders that never mix, and honest results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jlstm import train

SCRIPT = '''
"""Adds numbers."""

import dataclasses
from typing import Literal

from jlstm import train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    hidden_size: int = 64
    """Width of each layer."""
    rates: tuple[float, ...] = (0.1,)
    """Learning rates."""
    mood: Literal["fine", "value", "missing", "bug", "interrupt"] = "fine"
    """How the run goes."""


def main(config):
    match config.mood:
        case "value":
            raise ValueError("add: expected numbers, got letters")
        case "missing":
            open("no/such/file")
        case "bug":
            raise KeyError("oops")
        case "interrupt":
            raise KeyboardInterrupt
    print(train.describe(config))


PRESETS = {"smoke": Config(hidden_size=8), "cpu": Config()}

if __name__ == "__main__":
    train.run(main, PRESETS)
'''


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """A config for tests."""

    hidden_size: int = 64
    """Width of each layer."""
    rates: tuple[float, ...] = (0.1,)
    """Learning rates."""
    rate: train.Schedule = dataclasses.field(default_factory=train.Constant)
    """How they fall."""


PRESETS = {"smoke": Config(hidden_size=8), "cpu": Config()}


def parse(*argv):
    seen = []
    train.run(seen.append, PRESETS, list(argv))
    return seen[0]


def run_script(tmp_path, *argv, **env):
    file = tmp_path / "add.py"
    file.write_text(SCRIPT)
    root = str(Path(train.__file__).parents[2])
    return subprocess.run(
        [sys.executable, file, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "COLUMNS": "100", **env},
    )


def test_run_takes_the_first_preset_and_overrides_fields():
    assert parse() == Config(preset="smoke", hidden_size=8)
    assert parse("--preset", "cpu") == Config(preset="cpu")
    assert parse("--preset=cpu", "--hidden-size", "3", "--rates", "1", "2") == Config(
        preset="cpu", hidden_size=3, rates=(1.0, 2.0)
    )
    config = parse("--workdir", "a/b", "--seed", "3")
    assert (config.workdir, config.seed) == (Path("a/b"), 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "gpu"], "error: --preset: 'gpu' is not one of smoke, cpu"),
        (["--preset"], "expected one argument"),
        (
            ["--hiden-size", "3"],
            "options: --hiden-size, 3; did you mean --hidden-size?",
        ),
        (["--rate", "linear"], "did you mean rate:linear?"),
        (["rate:liner"], "did you mean rate:linear?"),
        (["--hidden-size", "q"], "--hidden-size: invalid literal for int"),
        (["extra"], "Unrecognized options: extra"),
    ],
)
def test_run_refuses_bad_options_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "---" not in captured.err  # of tyro's frame
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_script_help_shows_docs_and_presets(tmp_path):
    done = run_script(tmp_path, "--preset", "smoke", "--help")
    assert done.returncode == 0
    for text in ("Adds numbers.", "Presets: smoke, cpu.", "Width of each layer.", "8"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("add: got letters"), 2, "error: add: got letters\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_ends_on_bad_input_with_one_line(error, code, line, capsys, monkeypatch):
    def main(config):
        raise error

    monkeypatch.delenv("JLSTM_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        train.run(main, PRESETS, [])
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert err.endswith(line)
    assert err.count("\n") == 1


def test_run_shows_the_traceback_on_request(capsys, monkeypatch):
    def main(config):
        raise ValueError("bad")

    monkeypatch.setenv("JLSTM_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        train.run(main, PRESETS, [])
    assert "Traceback" in capsys.readouterr().err


def test_run_leaves_bugs_alone():
    def main(config):
        raise KeyError("oops")

    with pytest.raises(KeyError):
        train.run(main, PRESETS, [])


def test_more_devices_than_cores_are_noted(tmp_path):
    many = (os.cpu_count() or 1) + 1
    done = run_script(tmp_path, "--mesh", f"data={many}", "--mood", "value")
    assert done.stderr.startswith(f"--mesh: {many} devices share the {many - 1} cores")


def test_script_exits_with_code_and_one_line(tmp_path):
    done = run_script(tmp_path, "--mood", "value")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: add: expected numbers, got letters\n"


def test_describe_counts_parameters():
    params = {"w": jnp.ones((40, 50)), "b": np.ones(3)}
    text = train.describe(Config(hidden_size=7), params)
    assert "hidden_size=7" in text
    assert text.endswith("parameters: 2,003")


def test_workdir_describes_the_run(tmp_path):
    workdir = train.Workdir(Config(workdir=tmp_path / "run", seed=4), "add")
    config = json.loads((workdir.path / "config.json").read_text())
    assert config["experiment"] == "add"
    assert (config["seed"], config["rates"], config["data"]) == (4, [0.1], None)
    env = json.loads((workdir.path / "env.json").read_text())
    assert env["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "jlstm"}
    assert env["device_count"] == 2
    assert workdir.plots.is_dir()


def test_workdir_without_path_goes_away():
    workdir = train.Workdir(Config(), "add")
    path = workdir.path
    assert (path / "env.json").exists()
    del workdir
    assert not path.exists()


def test_workdir_belongs_to_one_config(tmp_path, capsys):
    config = Config(workdir=tmp_path / "run")
    first = train.Workdir(config, "add")
    assert first.result is None
    again = train.Workdir(dataclasses.replace(config), "add")
    assert again.result is None
    written = again.write_result(
        metric="loss", value=1, floor=2, floor_name="mean", lower_is_better=True
    )
    other = dataclasses.replace(config, hidden_size=65)
    with pytest.raises(
        ValueError, match=r"hidden_size: was 64, is now 65; choose another"
    ):
        train.Workdir(other, "add")
    with pytest.raises(ValueError, match=r"experiment: was 'add', is now 'sub'"):
        train.Workdir(config, "sub")
    # What does not change the result may differ.
    again = train.Workdir(dataclasses.replace(config, mesh="data=2"), "add")
    assert again.result == written
    assert "nothing is left to do" in capsys.readouterr().out
    never = dataclasses.replace(config, resume="never")
    with pytest.raises(ValueError, match="holds a finished run"):
        train.Workdir(never, "add")
    must = Config(workdir=tmp_path / "new", resume="must")
    with pytest.raises(ValueError, match=r"--resume must, but .* holds no run"):
        train.Workdir(must, "add")


def test_workdir_of_a_run_that_was_killed_while_it_began(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("1")
    (tmp_path / "run" / "config.json.part").write_text("{")
    config = Config(workdir=tmp_path / "run")
    assert train.Workdir(config, "add").result is None


def test_workdir_of_a_run_without_a_step_takes_another_config(tmp_path):
    config = Config(workdir=tmp_path / "run")
    train.Workdir(config, "add")
    train.Workdir(dataclasses.replace(config, hidden_size=65), "add")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["hidden_size"] == 65


def test_workdir_notes_another_environment(tmp_path, capsys):
    config = Config(workdir=tmp_path / "run")
    path = train.Workdir(config, "add").path
    environment = json.loads((path / "env.json").read_text())
    environment["versions"]["jax"] = "0.0.1"
    (path / "env.json").write_text(json.dumps(environment))
    train.Workdir(config, "add")
    assert "versions.jax: was '0.0.1', is" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["not json", "[]"])
def test_workdir_refuses_a_folder_of_something_else(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not empty, but holds no run"):
        train.Workdir(Config(workdir=tmp_path), "add")
    with pytest.raises(ValueError, match="is a file"):
        train.Workdir(Config(workdir=tmp_path / "config.json"), "add")


@pytest.mark.parametrize(
    ("value", "lower_is_better", "beats"),
    [
        (1.0, True, True),
        (1.0, False, False),
        (3.0, True, False),
        (3.0, False, True),
        (2.0, True, False),
        (2.0, False, False),
        (math.nan, True, False),
    ],
)
def test_result_beats_the_floor_only_if_it_is_better(
    tmp_path, value, lower_is_better, beats
):
    workdir = train.Workdir(Config(workdir=tmp_path / "run", preset="cpu"), "add")
    result = workdir.write_result(
        metric="error",
        value=np.float32(value),
        floor=2.0,
        floor_name="mean",
        lower_is_better=lower_is_better,
        notes={"seeds": (0, 1)},
    )
    assert json.loads((workdir.path / "result.json").read_text()) == result
    assert result["beats_floor"] is beats
    assert result["value"] == (None if math.isnan(value) else value)
    assert result["notes"] == {"seeds": [0, 1]}
    wanted = "experiment preset metric floor_name published seconds device seed"
    assert result.keys() >= {*wanted.split(), "test_evaluations"}


def test_result_refuses_to_write_an_entry_twice(tmp_path):
    workdir = train.Workdir(Config(), "add")
    with pytest.raises(ValueError, match=r"\['seed'\] are entries of result"):
        workdir.write_result(
            metric="x",
            value=1,
            floor=2,
            floor_name="mean",
            lower_is_better=True,
            seed=3,
        )


def test_plot_metrics_draws_curves_and_floor(tmp_path):
    pixels = {}
    records = [
        {"step": n, "loss": 2 / n, "validation_loss": None if n % 5 else 3 / n}
        for n in range(1, 51)
    ]
    for name, options in {"plain": {}, "floor": {"floor": 0.5}}.items():
        path = tmp_path / f"{name}.png"
        train.plot_metrics(records, path, unit="nats", **options)
        pixels[name] = path.read_bytes()
        assert pixels[name].startswith(b"\x89PNG")
    assert pixels["plain"] != pixels["floor"]


def test_plot_metrics_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"for 'los'; they have \['loss', 'step'\]"):
        train.plot_metrics([{"step": 1, "loss": 1.0}], tmp_path / "a.png", "los")
