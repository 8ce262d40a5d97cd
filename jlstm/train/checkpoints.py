"""Checkpoints of a run: folders that are written whole, with a hash of each file.

The checkpoints of a run lie in one folder::

    checkpoints/
      step_000001200/
        arrays/        the training state, as Orbax writes it
        run.json       the rest: data position, hooks, metrics, fingerprints
        manifest.json  SHA-256 of each file above
      resumes.json     how often the run was continued, and what that cost

A checkpoint is written to a folder ``NAME.part``, which is renamed when everything is
on the disk. If a process is killed before, the next one removes the rest.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import mmap
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.train.checkpoint import (
    ARRAYS,
    agree,
    begin_together,
    by_the_first,
    check_types,
    orbax,
    read_arrays,
    read_types,
    storable,
)
from jlstm.train.files import Damaged, Lock, seal, verify, write_json
from jlstm.train.fingerprint import difference
from jlstm.train.state import NonFiniteError
from jlstm.types import PyTree
from jlstm.weights import name_leaves, rebuild

Resume = Literal["auto", "never", "must"]
RUN = "run.json"


@dataclasses.dataclass
class Restored:
    """The content of a checkpoint.

    Attributes:
      step: the step after which it was saved.
      state: the training state.
      record: everything else, as it was given to :meth:`Checkpoints.save`.
    """

    step: int
    state: PyTree
    record: dict[str, Any]


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run, for :func:`jlstm.train.fit`.

    A checkpoint contains everything that the run needs to continue: params, optimiser
    state, step, key, carry, the place in the data, the metrics since the last report,
    and the state of hooks. A run that continues from one ends with the same bits as one
    that was never interrupted. Checkpoints are written by a thread of their own, while
    training goes on.

    A state with NaN or infinity is not saved, unless the same arrays had such values
    at the beginning. When a run continues, every file is compared with its SHA-256. A
    damaged checkpoint is renamed to ``NAME.damaged``, the one before it is used, and a
    line on stderr says so.

    Attributes:
      folder: the folder of the checkpoints, made if it does not exist. Several
        processes must see the same one.
      every: the number of steps between two checkpoints; None uses ``minutes``.
      minutes: the time between two checkpoints, in minutes. It bounds the work that a
        crash can cost.
      keep: how many of the newest checkpoints are kept. Each takes the disk space of
        the params and the optimiser state.
      best: the name of a metric, such as ``"validation_loss"``; the checkpoint with its
        best value is kept as well, for :meth:`load_best`. None keeps the newest only.
      mode: ``"min"`` if lower values of ``best`` are better, ``"max"`` if higher ones
        are.
      resume: what to do at the start. ``"auto"`` continues if there is a checkpoint,
        ``"must"`` raises if there is none, ``"never"`` raises if there is one.
      identity: a dict of whatever makes up the run and must not change when it
        continues, such as learning rate and sizes. The data are compared by their
        fingerprint without being named here.
      resumes: how often the run has continued from a checkpoint so far.
      steps_replayed: how many steps were taken a second time because of that.
      last_state: the state in the last report, once the run has ended.

    Example:
      >>> import tempfile
      >>> train, folder = jlstm.train, tempfile.mkdtemp()
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> tx = train.sgd(0.1)
      >>> step = train.make_train_step(loss_fn, tx)
      >>> for num_steps in (3, 9):  # the second goes on at step 3
      ...     report = train.fit(
      ...         train.create_state(jnp.zeros(()), tx), step, [jnp.ones(4)] * 9,
      ...         num_steps=num_steps, checkpoints=train.Checkpoints(folder, every=3),
      ...     )
      >>> report.step
      9
    """

    folder: Path
    every: int | None = None
    minutes: float = 10.0
    keep: int = 2
    best: str | None = None
    mode: Literal["min", "max"] = "min"
    resume: Resume = "auto"
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
          ValueError: an option is out of range.
        """
        self.folder = Path(self.folder).absolute()
        if not isinstance(self.identity, Mapping):
            raise ValueError(
                f"Checkpoints.identity: must be a dict, got {self.identity!r}"
            )
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(
                    f"Checkpoints.{name}: must be an integer of at least 1, got "
                    f"{value!r}"
                )
        if not self.minutes > 0:
            raise ValueError(
                f"Checkpoints.minutes: must be positive, got {self.minutes}"
            )
        if self.mode not in ("min", "max"):
            raise ValueError(
                f"Checkpoints.mode: must be 'min' or 'max', got {self.mode!r}"
            )
        if self.resume not in ("auto", "never", "must"):
            raise ValueError(
                "Checkpoints.resume: must be 'auto', 'never' or 'must', got "
                f"{self.resume!r}"
            )
        self.resumes = self.steps_replayed = 0
        self.restored_seconds = 0.0
        self.last_state: PyTree = None
        self._identity: dict[str, Any] = {}
        self._lock: Lock | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._counter: mmap.mmap | None = None
        self._saved_at = time.monotonic()
        self.saved_step: int | None = None
        self._best: dict[str, Any] = {}

    # What fit calls.

    def open(self, state: PyTree, data: Any) -> Restored | None:
        """Locks the folder, and reads the newest checkpoint that is whole.

        :func:`jlstm.train.fit` calls it.

        Args:
          state: a state of the expected structure, shapes, dtypes and shardings.
          data: the fingerprint of the data.

        Returns:
          The content of the checkpoint; None if the run begins.

        Raises:
          InUse: another process works in the folder.
          ValueError: the checkpoints belong to another identity or other data, all of
            them are damaged, or ``resume`` forbids to begin or to continue.
        """
        self._identity = _plain({**self.identity, "data": data})
        self._odd = frozenset(not_finite(state))
        self._saved_at = time.monotonic()
        chosen = by_the_first(lambda: self._open(state))
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        # The first process looked for the newest that is whole.
        step = agree(-1 if chosen is None else chosen)
        restored = self._restore(step, state) if step >= 0 else None
        self.saved_step = step if step >= 0 else int(jax.tree.leaves(state)[0])
        if jax.process_index() == 0:
            self._count(step)
        return restored

    def _open(self, state: PyTree) -> int:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Checkpoints: {self.folder} is a file, expected a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder, "Checkpoints")
        self._clean()
        step = self._choose(state)
        if step >= 0:
            _say(f"continuing from step {step}, in {self._folder(step)}")
        return step

    def _clean(self) -> None:
        """Removes what a killed process left unfinished, and restores what it moved."""
        for former in self.folder.glob("*.former"):
            name = former.with_suffix("")
            shutil.rmtree(former) if name.exists() else os.rename(former, name)
        for half in self.folder.glob("*.part"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()

    def _choose(self, state: PyTree) -> int:
        steps = self.steps()
        if self.resume == "never" and steps:
            raise ValueError(
                f"Checkpoints: resume='never', but {self.folder} has a checkpoint of "
                f"step {steps[-1]}; choose another folder, or remove it"
            )
        problems: dict[int, Damaged] = {}
        for step in reversed(steps):
            folder = self._folder(step)
            try:
                verify(folder)
            except Damaged as damage:
                problems[step] = damage
                continue
            record = json.loads((folder / RUN).read_bytes())
            self._check_identity(folder, record["identity"])
            check_types(folder, read_types(folder), _prefixed(state), part="state/")
            for damaged, damage in problems.items():
                aside = _unused(self._folder(damaged))
                os.rename(self._folder(damaged), aside)
                _say(f"step {damaged} is damaged ({damage}); it is now {aside.name}")
            return step
        if problems:
            which = "; ".join(f"step {n}: {damage}" for n, damage in problems.items())
            raise ValueError(
                f"Checkpoints: no checkpoint in {self.folder} is intact ({which}); "
                "restore one from a backup, or start again in another folder"
            )
        if self.resume == "must":
            raise ValueError(
                f"Checkpoints: resume='must', but {self.folder} has no checkpoint"
            )
        return -1

    def _check_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        lines = difference(saved, self._identity)
        # Where words name a difference, hashes add nothing.
        told = [line for line in lines if not line.startswith("data.batches")]
        if lines:
            lines = told or ["data: the same types and length, but other values"]
            raise ValueError(
                f"Checkpoints: {folder} belongs to another run:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nmake them equal, or choose another folder"
            )

    def _restore(self, step: int, state: PyTree) -> Restored:
        folder = self._folder(step)
        record = json.loads((folder / RUN).read_bytes())
        expected = _prefixed(state)
        # What hooks keep is placed like a scalar, of which each device has a copy.
        place = jax.tree.leaves(state)[0].sharding
        for name, leaf in read_types(folder).items():
            if not name.startswith("state/"):
                shape, dtype = leaf.shape, leaf.dtype
                expected[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        arrays = read_arrays(folder, expected)
        own = {name: x for name, x in arrays.items() if name.startswith("state/")}
        record = _join(record, arrays)
        self.restored_seconds = record.get("seconds", 0.0)
        if self.best is not None and record["best"].get("metric") == self.best:
            self._best = record["best"]
        return Restored(step, rebuild(state, own), record)

    def _count(self, step: int) -> None:
        """Counts that the run continues, and the steps that are taken a second time."""
        file = self.folder / "steps_begun"
        begun = int.from_bytes(file.read_bytes(), "little") if file.exists() else 0
        counts = {"resumes": 0, "steps_replayed": 0}
        with contextlib.suppress(FileNotFoundError, ValueError):
            counts |= json.loads((self.folder / "resumes.json").read_bytes())
        counts["resumes"] += step >= 0
        counts["steps_replayed"] += max(begun - max(step, 0), 0)
        if begun or step >= 0:
            write_json(self.folder / "resumes.json", counts)
        self.resumes, self.steps_replayed = counts["resumes"], counts["steps_replayed"]
        file.write_bytes(max(step, 0).to_bytes(8, "little"))
        with open(file, "r+b") as opened:
            self._counter = mmap.mmap(opened.fileno(), 8)

    def at_the_beginning(self, hooks: list[Any]) -> list[Any]:
        """Returns the states that hooks had when the run first began here."""
        file = self.folder / "begun.json"
        if jax.process_index() == 0 and not file.exists():
            write_json(file, _split(hooks, None))
        return _join(json.loads(file.read_bytes()), {}) if file.exists() else hooks

    def begin_step(self, step: int) -> None:
        """Notes the step that begins, where a killed process leaves the note."""
        if self._counter is not None:
            self._counter[:] = step.to_bytes(8, "little")

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Tells whether a report has the best value of the metric ``best`` so far."""
        value = metrics.get(self.best or "")
        if value is None or not np.isfinite(value):
            return False
        old = self._best.get("value")
        return old is None or (value < old if self.mode == "min" else value > old)

    def warn_without_best(self, metrics: Mapping[str, float]) -> None:
        """Warns at the end of a run in which no report had the metric ``best``."""
        if self.best is not None and not self._best:
            warnings.warn(
                f"Checkpoints: no report had a number for best={self.best!r}; the last "
                f"has {sorted(metrics)}",
                stacklevel=2,
            )

    def due(self, step: int, *, at_report: bool) -> bool:
        """Tells whether it is time to save a checkpoint."""
        if step == self.saved_step:
            return False
        if self.every is not None:
            return step % self.every == 0
        late = time.monotonic() - self._saved_at >= 60 * self.minutes
        if jax.process_count() == 1:
            return late
        # The clock of the first process decides for all, at reports only.
        return at_report and agree(int(late)) == 1

    def save(
        self,
        step: int,
        state: PyTree,
        record: Mapping[str, Any],
        *,
        best: float | None = None,
    ) -> None:
        """Starts to save a checkpoint, and returns once the state is copied.

        Args:
          step: the number of steps taken.
          state: the training state.
          record: anything else, in JSON's types and arrays.
          best: the value of the metric ``best``, if this checkpoint has the best one.

        Raises:
          NonFiniteError: the state contains NaN or infinity.
          OSError: the checkpoint before it could not be written.
        """
        self.wait()
        copy, finite = _copy(state, self._odd)
        if not finite:
            raise NonFiniteError(
                f"Checkpoints: the state after step {step} is not finite, in "
                f"{', '.join(sorted(set(not_finite(state)) - self._odd))}; it is not "
                f"saved, and {self.describe_last()}"
            )
        if best is not None:
            self._best = {"metric": self.best, "value": best, "step": step}
        arrays = _prefixed(copy)
        own = {"identity": self._identity, "step": step, "best": self._best}
        written = _split({**record, **own}, arrays)
        self._saved_at, self.saved_step = time.monotonic(), step
        folder = self._folder(step)
        try:
            half = begin_together(folder)
            # Orbax copies to the host before it returns, and writes meanwhile.
            writing = orbax().save_async(str(half / ARRAYS), storable(arrays))
        except Exception as error:
            raise self._failed(step, error) from error
        assert self._thread is not None
        self._saving = self._thread.submit(
            self._finish, writing, half, folder, step, written
        )

    def _finish(
        self,
        writing: Any,
        half: Path,
        folder: Path,
        step: int,
        record: dict[str, Any],
    ) -> None:
        try:
            writing.result()
            if jax.process_index() == 0:
                write_json(half / RUN, record)
                seal(half, folder)
                self._prune(record["best"].get("step"))
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> OSError:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not self.folder.is_dir():
            reason = "the folder is gone"
        return OSError(
            f"Checkpoints: step {step} could not be saved in {self.folder} ({reason}); "
            f"{self.describe_last()}"
        )

    def describe_last(self) -> str:
        """Says from which step the run would continue."""
        steps = self.steps() if self.folder.is_dir() else []
        return (
            f"the last checkpoint is of step {steps[-1]}"
            if steps
            else "there is no checkpoint"
        )

    def _prune(self, best: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                # Renamed first, so that no half-removed checkpoint has a valid name.
                gone = self._folder(step).with_suffix(".part")
                os.rename(self._folder(step), gone)
                shutil.rmtree(gone)

    def check(self) -> None:
        """Raises the error of a checkpoint whose writing has failed, if any."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint that is being saved is on the disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for the checkpoint that is being saved, and unlocks the folder."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._counter is not None:
                self._counter.close()
            if self._lock is not None:
                self._lock.release()
            self._thread = self._counter = self._lock = None

    # What a user may ask.

    def steps(self) -> list[int]:
        """Lists the steps of all checkpoints in the folder, in ascending order."""
        found = []
        for path in self.folder.glob("step_*"):
            digits = path.name.removeprefix("step_")
            if len(digits) >= 9 and digits.isdecimal():
                found.append(int(digits))
        return sorted(found)

    def load_best(self, state: PyTree) -> PyTree:
        """Reads the state that had the best value of the metric ``best``.

        Args:
          state: a state of the expected structure, such as ``report.state``.

        Returns:
          The saved state.

        Raises:
          ValueError: no report had the metric, or the checkpoint is damaged.
        """
        self.wait()
        if not self._best:
            raise ValueError(
                f"Checkpoints.load_best: no report had a number for {self.best!r}; "
                "give best= the name of a metric"
            )
        folder = self._folder(self._best["step"])
        try:
            verify(folder)
        except Damaged as damage:
            raise Damaged(f"Checkpoints: {folder} is damaged: {damage}") from None
        expected = _prefixed(state)
        check_types(folder, read_types(folder), expected, part="state/")
        for name, leaf in read_types(folder).items():
            if name not in expected:
                expected[name] = leaf
        arrays = read_arrays(folder, expected)
        return rebuild(state, {name: arrays[name] for name in _prefixed(state)})

    def _folder(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}"


def _say(text: str) -> None:
    print(f"checkpoints: {text}", file=sys.stderr, flush=True)


@partial(jax.jit, static_argnums=1)
def _copy_and_check(tree: PyTree, odd: frozenset[str]) -> tuple[PyTree, Any]:
    finite = [
        jnp.all(jnp.isfinite(x))
        for name, x in name_leaves(tree).items()
        if jnp.issubdtype(x.dtype, jnp.inexact) and name not in odd
    ]
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    return copy, jnp.all(jnp.array(finite)) if finite else jnp.array(True)


def _copy(state: PyTree, odd: frozenset[str]) -> tuple[PyTree, bool]:
    """Copies a state, whose memory the next step reuses; tells whether it is finite.

    An array that was not finite at the beginning, such as a mask of minus infinity, is
    not checked.
    """
    copy, finite = _copy_and_check(state, odd)
    return copy, bool(finite)


def not_finite(state: PyTree) -> list[str]:
    """Names the arrays that contain NaN or infinity."""
    return [
        name
        for name, leaf in name_leaves(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all()
    ]


def _unused(folder: Path) -> Path:
    """Returns a free name for a damaged checkpoint."""
    aside, number = folder.with_name(folder.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    return aside


def _prefixed(state: PyTree) -> dict[str, Any]:
    return {f"state/{name}": leaf for name, leaf in name_leaves(state).items()}


def _split(value: Any, arrays: dict[str, Any] | None) -> Any:
    """Moves the JAX arrays in nested dicts and lists to ``arrays``, and leaves names.

    NumPy arrays become text, since JAX would change their dtypes. Without ``arrays``,
    all arrays do.
    """
    if isinstance(value, jax.Array) and arrays is not None and value.size:
        name = f"other/{len(arrays)}"
        arrays[name] = jnp.array(value, copy=True)
        return {"__array__": name}
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ValueError("Checkpoints: cannot save an array of Python objects")
        text = base64.b64encode(array.tobytes()).decode()
        kind = "__numpy__" if isinstance(value, np.ndarray) else "__jax__"
        return {kind: [array.dtype.name, list(array.shape), text]}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(
                f"Checkpoints: cannot save a dict with the keys {list(value)}; the "
                "keys of a hook's or an iterator's state must be strings"
            )
        return {key: _split(item, arrays) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_split(item, arrays) for item in value]
    return _plain(value)


def _join(value: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return arrays[value["__array__"]]
        for kind, make in (("__numpy__", np.array), ("__jax__", jnp.array)):
            if set(value) == {kind}:
                dtype, shape, text = value[kind]
                data = np.frombuffer(base64.b64decode(text), jnp.dtype(dtype))
                return make(data.reshape(shape))
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        if set(value) == {"__bytes__"}:
            return bytes.fromhex(value["__bytes__"])
        return {key: _join(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, arrays) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Writes a value in JSON's types; NaN, infinity and bytes get their own form."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return {"__float__": repr(value)}
    if isinstance(value, bytes):
        return {"__bytes__": value.hex()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(
        f"Checkpoints: cannot save a {type(value).__name__}; the identity, and the "
        "state of hooks and iterators, must consist of dicts, lists, numbers and "
        "strings; only the states may have arrays"
    )
