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
from typing import Any, Literal, NoReturn, SupportsFloat, TypeVar

import jax
import numpy as np

from jlstm.train.checkpoint import by_the_first
from jlstm.train.checkpoints import Checkpoints, Resume
from jlstm.train.files import Lock, write_json
from jlstm.train.fingerprint import difference, hash_tree
from jlstm.train.hooks import (
    Hook,
    finite,
    import_optional,
    show_progress,
    write_jsonl,
    write_tensorboard,
)
from jlstm.train.signals import Interrupted
from jlstm.train.state import NonFiniteError
from jlstm.types import PyTree

TRACEBACK = "JLSTM_TRACEBACK"


def indifferent(default: Any) -> Any:
    """Makes the field of a config that does not change the result of its run.

    A run may go on with another value of it.

    Args:
      default: its default.

    Returns:
      The field.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config(jlstm.train.Options):
      ...     sample: int = 600
      ...     verbose: bool = jlstm.train.indifferent(False)
    """
    return dataclasses.field(default=default, metadata={"indifferent": True})


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every experiment has; a config extends it."""

    preset: str = ""
    """The config that the other options change."""
    data: Path | None = None
    """Where the data are; without it, data that every machine has."""
    workdir: Path | None = indifferent(None)
    """Folder for configuration, metrics, plots and result; none is kept without it."""
    seed: int = 0
    """Seed of all randomness."""
    resume: Resume = indifferent("auto")
    """Go on from the checkpoints in the workdir: auto if there are any; never and must
    refuse the other."""
    checkpoint_minutes: float = indifferent(10.0)
    """Between two checkpoints."""
    checkpoint_every: int | None = indifferent(None)
    """Steps between two checkpoints, instead of minutes."""
    tensorboard: bool = indifferent(False)
    """Write the metrics for TensorBoard too, to WORKDIR/tensorboard."""
    debug_nans: bool = indifferent(False)
    """Find the operation that first gives NaN or infinity; slow."""
    mesh: str = indifferent("data=1")
    """data=N shares each batch among N devices; of a CPU, as many as it has cores."""
    distributed: bool = indifferent(False)
    """Join the other processes that SLURM, Kubernetes or MPI started."""
    coordinator: str | None = indifferent(None)
    """HOST:PORT of process 0, to join processes that were started by hand."""
    num_processes: int | None = indifferent(None)
    """How many there are."""
    process_id: int | None = indifferent(None)
    """Which one this is, from 0."""

    @property
    def devices(self) -> int:
        """How many devices share each batch.

        Raises:
          ValueError: ``mesh`` is not ``data=N``.
        """
        name, _, size = self.mesh.partition("=")
        if name != "data" or not size.isdecimal() or not int(size):
            raise ValueError(f"--mesh: must be data=N, got {self.mesh!r}")
        return int(size)


ConfigT = TypeVar("ConfigT", bound=Options)


def run(
    main: Callable[[ConfigT], Any],
    presets: Mapping[str, ConfigT],
    argv: list[str] | None = None,
) -> None:
    """Runs an experiment from the command line, ``--preset NAME --any-field VALUE``.

    ``--preset`` picks a config, the first by default, and every other field of it may
    be overridden; ``--help`` shows each field with its doc and its value in the preset.
    Bad options, bad input and a full disk (``ValueError`` or ``OSError`` from ``main``)
    print one line and exit with code 2; set the environment variable
    ``JLSTM_TRACEBACK`` to see the traceback too. Numbers that do not become finite
    again (:class:`jlstm.train.NonFiniteError`) exit with code 3; SIGTERM and Ctrl-C,
    when all is saved, with 143 and 130. Any other exception is a bug and is left alone.

    Args:
      main: takes the config.
      presets: configs by name.
      argv: the arguments, those of the process by default.

    Raises:
      SystemExit: with a code as above.

    Example:
      >>> presets = {"smoke": jlstm.train.Options(seed=1)}
      >>> jlstm.train.run(lambda config: print(config.seed), presets, ["--seed", "7"])
      7
    """
    arguments = sys.argv[1:] if argv is None else argv
    config = _parse(presets, arguments)
    try:
        _join_devices(config)
        main(config)
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        code = 3 if isinstance(error, NonFiniteError) else 2
        _exit(str(error) or type(error).__name__, code)
    except Interrupted as interrupted:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        _end(interrupted.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(code: Any) -> NoReturn:
    """Ends the process without waiting for threads that are still reading data."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _join_devices(config: Options) -> None:
    """Makes the devices of a CPU, and joins other processes, before JAX looks."""
    by_hand = (config.coordinator, config.num_processes, config.process_id)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator, --num-processes and --process-id belong together"
        )
    if config.devices > 1:
        # Read by CPUs alone.
        local, rest = divmod(config.devices, config.num_processes or 1)
        if rest:
            raise ValueError(
                f"--mesh: {config.num_processes} processes cannot share "
                f"{config.devices} devices evenly"
            )
        jax.config.update("jax_num_cpu_devices", local)
    if config.distributed or config.coordinator is not None:
        jax.distributed.initialize(*by_hand)


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


def _exit(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if jax.distributed.is_initialized():
        _end(code)  # the others are not waited for
    sys.exit(code)


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
    fields = ", ".join(f"{k}={v!r}" for k, v in _fields(config).items())
    lines = [f"config: {fields}", f"device: {_device()}"]
    if params is not None:
        lines.append(f"parameters: {sum(x.size for x in jax.tree.leaves(params)):,}")
    return "\n".join(lines)


class Workdir:
    """The folder of one run.

    It holds ``config.json``, ``env.json``, ``metrics.jsonl``, ``checkpoints/``,
    ``plots/`` and, of a run that ended, ``result.json``; JSON files appear whole or not
    at all. A folder belongs to one config: a run with another one is refused, with what
    differs; the same one goes on, and one that has ended stays as it is. While a
    process works in it, others are kept out.

    Attributes:
      path: the folder; where the config names none, a temporary one.
      result: what an earlier process wrote to ``result.json``, if one did; then there
        is nothing left to do.
      metrics: the file for ``write_jsonl``.
      plots: the folder for pictures.

    Example:
      >>> workdir = jlstm.train.Workdir(jlstm.train.Options(), experiment="demo")
      >>> sorted(file.name for file in workdir.path.iterdir())
      ['config.json', 'env.json', 'lock', 'plots']
    """

    def __init__(self, config: Options, experiment: str) -> None:
        """Makes the folder, and writes the config and the environment to it.

        Args:
          config: the config; ``config.workdir`` says where.
          experiment: its name, in the result.

        Raises:
          ValueError: the folder holds something else, or a run of another config, or
            another process works in it.
        """
        self.config, self.experiment = config, experiment
        self.result: dict[str, Any] | None = None
        self._start = time.perf_counter()
        self._checkpoints: list[Checkpoints] = []
        if config.workdir is None:
            self.path = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        else:
            self.path = config.workdir.absolute()
        self.metrics = self.metrics_of()
        self.plots = self.path / "plots"
        self._identity = {"experiment": experiment, **_identity(config)}
        by_the_first(self._claim)
        result = self.path / "result.json"
        if result.exists():
            self.result = json.loads(result.read_text())
            if config.resume == "never":
                raise ValueError(
                    f"Workdir: --resume never, but {self.path} holds a finished run; "
                    "choose another --workdir, or remove this one"
                )
            print(f"finished: {result} is there, nothing is left to do", flush=True)
        else:
            by_the_first(self._begin)

    def _begin(self) -> None:
        write_json(self.path / "config.json", self._identity)
        self.plots.mkdir(parents=True, exist_ok=True)
        self._note_environment()

    @property
    def _chief(self) -> bool:
        return jax.process_index() == 0

    def _claim(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"Workdir: {self.path} is a file, expected a folder")
        found = self.path.iterdir() if self.path.exists() else ()
        names = {path.name for path in found if path.suffix != ".part"}
        advice = "choose another --workdir, or remove this one"
        if names - {"lock"} and "config.json" not in names:
            raise ValueError(
                f"Workdir: {self.path} is not empty, but holds no run; {advice}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, Lock(self.path, "Workdir").release)
        if "config.json" not in names:
            if self.config.resume == "must":
                raise ValueError(
                    f"Workdir: --resume must, but {self.path} holds no run"
                )
            return
        try:
            old = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError):
            old = None
        if not isinstance(old, dict):
            raise ValueError(
                f"Workdir: {self.path} is not empty, but holds no run; {advice}"
            )
        if names <= {"config.json", "env.json", "lock", "plots", "checkpoints"} and (
            not any(self.path.glob("checkpoints/**/step*"))
        ):
            return  # it took no step
        if lines := difference(old, self._identity):
            raise ValueError(
                f"Workdir: {self.path} holds another run: {'; '.join(lines)}; {advice}"
            )

    def _note_environment(self) -> None:
        new, file = environment(), self.path / "env.json"
        if file.exists():
            names = ("versions", "device", "xla_flags", "x64")
            try:
                old = json.loads(file.read_text())
                before, now = ({n: env.get(n) for n in names} for env in (old, new))
                lines = difference(before, now)
            except (OSError, ValueError, AttributeError):
                lines = []
            if lines:
                print(
                    "the run began in another environment, and will not end with the "
                    f"same bits: {'; '.join(lines)}",
                    file=sys.stderr,
                )
        write_json(file, new)

    def checkpoints(
        self,
        name: str = "",
        *,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep: int = 2,
    ) -> Checkpoints:
        """Makes the checkpoints of a fit, as the options say, in ``checkpoints/``.

        Args:
          name: of the fit, where a run has several.
          best: a metric whose best checkpoint is kept too.
          mode: whether the least or the greatest value is best.
          keep: how many of the newest are kept.

        Returns:
          What :func:`jlstm.train.fit` takes.
        """
        config = self.config
        made = Checkpoints(
            self.path / "checkpoints" / name,
            every=config.checkpoint_every,
            minutes=config.checkpoint_minutes,
            keep=keep,
            best=best,
            mode=mode,
            # Of a run in several parts, those that have not begun are no failure.
            resume="auto" if config.resume == "must" else config.resume,
            identity={"config": self._identity},
        )
        self._checkpoints.append(made)
        return made

    def metrics_of(self, name: str = "") -> Path:
        """Returns the file of a fit's metrics: of the one, or of one of several."""
        return self.path / (f"metrics_{name}.jsonl" if name else "metrics.jsonl")

    def watchers(self, name: str = "", *, unit: str = "items") -> list[Hook]:
        """Makes the hooks that write metrics to files and show how a run goes.

        Args:
          name: of the fit, where a run has several.
          unit: what the loss counts, such as ``"tokens"``.

        Returns:
          Hooks for :func:`jlstm.train.fit`, which belong after those that add metrics.
        """
        if not self._chief:
            return []
        hooks = [write_jsonl(self.metrics_of(name)), show_progress(unit=unit)]
        if self.config.tensorboard:
            hooks.insert(1, write_tensorboard(self.path / "tensorboard" / name))
        return hooks

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

        Beside what is given it has ``state_sha256``, the hash of all leaves of the last
        states of all fits that had checkpoints, and what resuming cost these.

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
        before = sum(c.restored_seconds for c in self._checkpoints)
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
            "seconds": round(time.perf_counter() - self._start + before, 2),
            "device": _device(),
            "seed": self.config.seed,
            "test_evaluations": test_evaluations,
            "state_sha256": hash_tree([c.last_state for c in self._checkpoints]),
            "resumes": sum(c.resumes for c in self._checkpoints),
            "steps_replayed": sum(c.steps_replayed for c in self._checkpoints),
        }
        if taken := result.keys() & extra.keys():
            raise ValueError(f"write_result: {sorted(taken)} are written already")
        result = _jsonable(result | extra)
        if self._chief:
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


def _device() -> str:
    return jax.devices()[0].device_kind


def _identity(config: Options) -> dict[str, Any]:
    """Returns what tells runs apart: all but where and how they run."""
    told = {field.name: field.metadata for field in dataclasses.fields(config)}
    fields = _fields(config)
    return {k: v for k, v in fields.items() if not told[k].get("indifferent")}


def _fields(config: Any) -> dict[str, Any]:
    fields = dataclasses.fields(config)
    return {field.name: _jsonable(getattr(config, field.name)) for field in fields}


def _jsonable(value: Any) -> Any:
    """Writes a value in JSON's types; what they cannot express, by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # By its name too: two choices may have the same fields.
        return {"type": type(value).__name__, **_fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _jsonable(value.tolist())
    if value is None or isinstance(value, str | int | float):
        return finite(value)
    return getattr(value, "__qualname__", str(value))
