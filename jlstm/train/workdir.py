"""The folder of a run: its config, environment, metrics, checkpoints and result."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import jax
import numpy as np

from jlstm.train.checkpoint import by_the_first
from jlstm.train.checkpoints import Checkpoints
from jlstm.train.files import Lock, write_json
from jlstm.train.fingerprint import difference, hash_tree
from jlstm.train.hooks import (
    Hook,
    finite,
    show_progress,
    write_jsonl,
    write_tensorboard,
)

if TYPE_CHECKING:
    from jlstm.train.script import Options


class Workdir:
    """The folder of one run: config, environment, metrics, checkpoints, result.

    It contains ``config.json``, ``env.json``, ``metrics.jsonl``, ``checkpoints/``,
    ``plots/`` and, once the run has ended, ``result.json``. JSON files are written
    whole or not at all.

    A folder belongs to one config. The same config continues the run; another one is
    refused, with a list of the differences. A finished run stays as it is. While a
    process works in the folder, others are refused.

    Attributes:
      path: the folder; a temporary one if the config names none.
      result: the content of ``result.json`` if the run has ended before, and nothing is
        left to do; otherwise None.
      metrics: the path of ``metrics.jsonl``, for :func:`jlstm.train.write_jsonl`.
      plots: the folder for plots.

    Example:
      >>> workdir = jlstm.train.Workdir(jlstm.train.Options(), experiment="demo")
      >>> sorted(file.name for file in workdir.path.iterdir())
      ['config.json', 'env.json', 'lock', 'plots']
    """

    def __init__(self, config: Options, experiment: str) -> None:
        """Makes the folder, and writes the config and the environment to it.

        Args:
          config: the options of the run; ``config.workdir`` is the folder.
          experiment: the name of the experiment, for the result.

        Raises:
          ValueError: the folder holds something else or a run of another config,
            another process works in it, or ``resume`` forbids what would be done.
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
            print(
                f"finished: {result} exists already; nothing is left to do", flush=True
            )
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
        begun = ("metrics*.jsonl", "checkpoints/**/step*", "result.json")
        if not any(next(self.path.glob(pattern), None) for pattern in begun):
            return  # nothing would be lost
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
                    "the run began in another environment, so its result will not be "
                    f"the same bit for bit: {'; '.join(lines)}",
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
        """Makes the checkpoints of a fit, with the options of the config.

        Args:
          name: the name of the fit, if the run has several; each needs its own.
          best: the name of a metric whose best checkpoint is kept too.
          mode: ``"min"`` if lower values of it are better, ``"max"`` if higher ones
            are.
          keep: how many of the newest checkpoints are kept.

        Returns:
          The checkpoints, for :func:`jlstm.train.fit`; they lie in ``checkpoints/``.
        """
        config = self.config
        made = Checkpoints(
            self.path / "checkpoints" / name,
            every=config.checkpoint_every,
            minutes=config.checkpoint_minutes,
            keep=keep,
            best=best,
            mode=mode,
            # A run may have several fits, and some of them may not have begun yet.
            resume="auto" if config.resume == "must" else config.resume,
            identity={"config": self._identity},
        )
        self._checkpoints.append(made)
        return made

    def metrics_of(self, name: str = "") -> Path:
        """Returns the path of the metrics of a fit, given its name if it has one."""
        return self.path / (f"metrics_{name}.jsonl" if name else "metrics.jsonl")

    def watchers(self, name: str = "", *, unit: str = "items") -> list[Hook]:
        """Makes the hooks that write metrics to files and show the progress.

        Args:
          name: the name of the fit, if the run has several.
          unit: what the loss counts, such as ``"tokens"``; a word for the display.

        Returns:
          Hooks for :func:`jlstm.train.fit`; list them after those that add metrics.
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
        others: Mapping[str, SupportsFloat] | None = None,
        test_evaluations: int = 1,
        **extra: Any,
    ) -> dict[str, Any]:
        """Writes ``result.json``, the result of the run.

        Beside its arguments the file has the experiment, preset, seed, device and time.
        It also has ``state_sha256``, the hash of the last states of all fits that had
        checkpoints, and how often these were continued.

        Args:
          metric: what is measured, with its unit, such as ``"bits per character"``.
          value: the score.
          floor: the score of a trivial predictor on the same data.
          floor_name: the name of that predictor.
          lower_is_better: whether a score below the floor beats it.
          published: a published score to compare with; None if there is none.
          others: scores of other models on the same data, by their names.
          test_evaluations: how often the test set was scored.
          **extra: further entries, numbers or other JSON types.

        Returns:
          What was written. Numbers that are not finite become None.

        Raises:
          ValueError: an extra has the name of another entry.
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
            "others": {k: float(v) for k, v in (others or {}).items()},
            "seconds": round(time.perf_counter() - self._start + before, 2),
            "device": device_kind(),
            "seed": self.config.seed,
            "test_evaluations": test_evaluations,
            "state_sha256": hash_tree([c.last_state for c in self._checkpoints]),
            "resumes": sum(c.resumes for c in self._checkpoints),
            "steps_replayed": sum(c.steps_replayed for c in self._checkpoints),
        }
        if taken := result.keys() & extra.keys():
            raise ValueError(
                f"write_result: {sorted(taken)} are entries of result.json already; "
                "choose other names"
            )
        result = _jsonable(result | extra)
        if self._chief:
            write_json(self.path / "result.json", result)
            if self.config.workdir is not None:
                files = [*self.path.iterdir(), *self.plots.iterdir()]
                names = {file.relative_to(self.path).as_posix() for file in files}
                names -= {"lock", "plots", "checkpoints"}
                print(f"in {self.path}: {', '.join(sorted(names))}", flush=True)
        return result


def environment() -> dict[str, Any]:
    """Collects versions, device and settings, on which a result may depend.

    Returns:
      A dict of JSON's types, as :class:`jlstm.train.Workdir` writes it to ``env.json``.

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
        "device": device_kind(),
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _own_version(name: str) -> str:
    # Not from the metadata, which a source tree on the path does not have.
    return sys.modules[name].__version__


def device_kind() -> str:
    """Returns the kind of the first device, such as ``"cpu"``."""
    return jax.devices()[0].device_kind


def _identity(config: Options) -> dict[str, Any]:
    """Returns the fields that identify a run, without where and how it runs."""
    told = {field.name: field.metadata for field in dataclasses.fields(config)}
    fields = fields_of(config)
    return {k: v for k, v in fields.items() if not told[k].get("indifferent")}


def fields_of(config: Any) -> dict[str, Any]:
    """Writes the fields of a config in JSON's types."""
    fields = dataclasses.fields(config)
    return {field.name: _jsonable(getattr(config, field.name)) for field in fields}


def _jsonable(value: Any) -> Any:
    """Writes a value in JSON's types, or the name of what they cannot express."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # By its name too: two choices may have the same fields.
        return {"type": type(value).__name__, **fields_of(value)}
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _jsonable(value.tolist())
    if value is None or isinstance(value, str | int | float):
        return finite(value)
    return getattr(value, "__qualname__", str(value))
