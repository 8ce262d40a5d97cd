"""What every experiment shares: its command line, and the folder of a run.

::

    @dataclass(frozen=True)
    class Config(train.Options):
        hidden_size: int = 256
        \"\"\"Width of each layer.\"\"\"

    PRESETS = {"smoke": Config(hidden_size=16), "cpu": Config()}

    def main(config: Config) -> dict:
        workdir = train.Workdir(config, experiment="add_numbers")
        ...
        return workdir.write_result(metric="loss", value=loss, floor=..., ...)

    if __name__ == "__main__":
        train.run(main, PRESETS)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, SupportsFloat, TypeVar

import jax
import numpy as np

from jlstm.train.hooks import finite, import_optional
from jlstm.types import PyTree

TRACEBACK = "JLSTM_TRACEBACK"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every experiment has; a config extends it."""

    preset: str = ""
    """The config that the other options change."""
    data: Path | None = None
    """Where the data are; without it, data that every machine has."""
    workdir: Path | None = None
    """Folder for configuration, metrics, plots and result; none is kept without it."""
    seed: int = 0
    """Seed of all randomness."""
    devices: int = 1
    """Devices that share each batch; of a CPU, as many as it has cores at most."""


ConfigT = TypeVar("ConfigT", bound=Options)


def run(
    main: Callable[[ConfigT], Any],
    presets: Mapping[str, ConfigT],
    argv: list[str] | None = None,
) -> None:
    """Runs an experiment from the command line, ``--preset NAME --any-field VALUE``.

    ``--preset`` picks a config, the first by default, and every other field of it may
    be overridden; ``--help`` shows each field with its doc and its value in the preset.
    Bad options, and bad input (``ValueError`` or ``OSError`` from ``main``), print one
    line and exit with code 2; set the environment variable ``JLSTM_TRACEBACK`` to see
    the traceback too. Any other exception is a bug and is left alone.

    Args:
      main: takes the config.
      presets: configs by name.
      argv: the arguments, those of the process by default.

    Raises:
      SystemExit: with code 2 as above, and 130 for an interrupt.

    Example:
      >>> presets = {"smoke": jlstm.train.Options(seed=1)}
      >>> jlstm.train.run(lambda config: print(config.seed), presets, ["--seed", "7"])
      7
    """
    arguments = sys.argv[1:] if argv is None else argv
    config = _parse(presets, arguments)
    if config.devices > 1:
        # Read when JAX first touches a device, and by CPUs alone.
        jax.config.update("jax_num_cpu_devices", config.devices)
    try:
        main(config)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        _exit(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(presets: Mapping[str, ConfigT], arguments: list[str]) -> ConfigT:
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    first.add_argument("--preset", default=next(iter(presets)))
    try:
        name = first.parse_known_args(arguments)[0].preset
    except argparse.ArgumentError as error:
        _exit(str(error))
    if name not in presets:
        _exit(f"--preset: {name!r} is not one of {', '.join(presets)}")
    tyro = import_optional("tyro")
    base = dataclasses.replace(presets[name], preset=name)
    summary = (sys.modules[type(base).__module__].__doc__ or "").strip()
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                type(base),
                default=base,
                args=arguments,
                description=f"{summary}\n\nPresets: {', '.join(presets)}.".strip(),
            )
    except SystemExit as error:
        if error.code:
            _exit(_flatten(message.getvalue()) + "; --help shows the options")
        raise


def _flatten(box: str) -> str:
    """Takes the message out of the frame that tyro draws around it."""
    text = []
    for line in box.splitlines()[1:]:
        line = line.strip("│ ")
        if not line.strip("─╰╯"):
            break
        text.append(line)
    return " ".join(text).rstrip(".") or "bad options"


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def describe(config: Any, params: PyTree = None) -> str:
    """Writes the first lines of a run: config, device, number of parameters.

    Args:
      config: a dataclass.
      params: the parameters, if they are made already.

    Returns:
      The lines.

    Example:
      >>> config = jlstm.train.Options(seed=3)
      >>> text = jlstm.train.describe(config, {"w": jnp.ones((2, 3))})
      >>> print(text.splitlines()[-1])
      parameters: 6
    """
    fields = ", ".join(f"{k}={v!r}" for k, v in _jsonable(config).items())
    lines = [f"config: {fields}", f"device: {_device()}"]
    if params is not None:
        lines.append(f"parameters: {sum(x.size for x in jax.tree.leaves(params)):,}")
    return "\n".join(lines)


class Workdir:
    """The folder of one run.

    It holds ``config.json``, ``env.json``, ``metrics.jsonl``, ``plots/`` and, of a run
    that ended, ``result.json``; JSON files appear whole or not at all. A folder belongs
    to one config: a run with another one is refused, the same one may run again, with
    its result removed first.

    Attributes:
      path: the folder; where the config names none, a temporary one.
      metrics: the file for ``write_jsonl``.
      plots: the folder for pictures.

    Example:
      >>> workdir = jlstm.train.Workdir(jlstm.train.Options(), experiment="demo")
      >>> sorted(file.name for file in workdir.path.iterdir())
      ['config.json', 'env.json', 'plots']
    """

    def __init__(self, config: Options, experiment: str) -> None:
        """Makes the folder, and writes the config and the environment to it.

        Args:
          config: the config; ``config.workdir`` says where.
          experiment: its name, in the result.

        Raises:
          ValueError: the folder holds something else, or a run of another config.
        """
        self.config, self.experiment = config, experiment
        self._start = time.perf_counter()
        if config.workdir is None:
            self.path = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        else:
            self.path = config.workdir
        self.metrics = self.path / "metrics.jsonl"
        self.plots = self.path / "plots"
        identity = {"experiment": experiment, **_identity(config)}
        self._claim(identity)
        self.plots.mkdir(parents=True, exist_ok=True)
        (self.path / "result.json").unlink(missing_ok=True)
        write_json(self.path / "config.json", identity)
        write_json(self.path / "env.json", environment())

    def _claim(self, identity: dict[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"Workdir: {self.path} is a file, expected a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        advice = "choose another --workdir, or remove this one"
        try:
            old = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):
            old = None
        if not isinstance(old, dict):
            raise ValueError(
                f"Workdir: {self.path} is not empty, but holds no run; {advice}"
            )
        for name in identity | old:
            if old.get(name) != identity.get(name):
                raise ValueError(
                    f"Workdir: {self.path} holds a run with {name}={old.get(name)!r}, "
                    f"this one has {identity.get(name)!r}; {advice}"
                )

    def write_result(
        self,
        *,
        metric: str,
        value: SupportsFloat,
        floor: SupportsFloat,
        floor_name: str,
        lower_is_better: bool,
        published: float | None = None,
        test_evaluations: int = 1,
        **extra: Any,
    ) -> dict[str, Any]:
        """Writes ``result.json``.

        Args:
          metric: what is measured, with its unit.
          value: the score.
          floor: the score of the trivial predictor on the same data.
          floor_name: that predictor.
          lower_is_better: whether a score below the floor beats it.
          published: the score to compare with, if there is one.
          test_evaluations: how often the test set was scored.
          **extra: anything else of note.

        Returns:
          What was written; numbers that are not finite are None.

        Raises:
          ValueError: an extra has the name of an entry.
        """
        value, floor = float(value), float(floor)
        beats = value < floor if lower_is_better else value > floor
        result = {
            "experiment": self.experiment,
            "preset": self.config.preset,
            "metric": metric,
            "value": value,
            "floor": floor,
            "floor_name": floor_name,
            "lower_is_better": lower_is_better,
            "beats_floor": beats,
            "published": published,
            "seconds": round(time.perf_counter() - self._start, 2),
            "device": _device(),
            "seed": self.config.seed,
            "test_evaluations": test_evaluations,
        }
        if taken := result.keys() & extra.keys():
            raise ValueError(f"write_result: {sorted(taken)} are written already")
        result = _jsonable(result | extra)
        write_json(self.path / "result.json", result)
        return result


def environment() -> dict[str, Any]:
    """Collects what a result may depend on besides the config.

    Example:
      >>> jlstm.train.environment()["versions"]["jax"] == jax.__version__
      True
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    own = __name__.partition(".")[0]
    versions |= {"python": platform.python_version(), own: _own_version(own)}
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": _device(),
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _own_version(name: str) -> str:
    # Not from the metadata, which a source tree on the path does not have.
    return sys.modules[name].__version__


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    half = path.with_name(path.name + ".part")
    with open(half, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def _device() -> str:
    return jax.devices()[0].device_kind


def _identity(config: Options) -> dict[str, Any]:
    """Returns what tells runs apart: all but where it lies."""
    fields = _jsonable(config)
    return {k: v for k, v in fields.items() if k != "workdir"}


def _jsonable(value: Any) -> Any:
    """Writes a value in JSON's types; what they cannot express, by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _jsonable(value.tolist())
    if value is None or isinstance(value, str | int | float):
        return finite(value)
    return getattr(value, "__qualname__", str(value))
