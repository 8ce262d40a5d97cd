"""Checkpoints: arrays by Orbax, in folders that are whole, and whose bytes are known.

A folder of a run's checkpoints::

    checkpoints/
      step_000001200/
        arrays/        the training state, as Orbax writes it
        run.json       the rest: data position, hooks, metrics, fingerprints
        manifest.json  SHA-256 of each file above
      resumes.json     how often the run was resumed, and what it cost

A checkpoint is made in a folder ``NAME.part``, which gets its name when all is on the
disk; what a killed process left of one is removed by the next.
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
    """What a checkpoint held.

    Attributes:
      step: its step.
      state: the training state.
      record: the rest, as :meth:`Checkpoints.save` got it.
    """

    step: int
    state: PyTree
    record: dict[str, Any]


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one run, for :func:`jlstm.train.fit`.

    They hold the whole truth of a run: params, optimiser state, step, key, carry, the
    position in the data, the metrics since the last report, and what hooks remember. A
    run that goes on from one ends with the very bits of one that was never interrupted.
    They are written beside the run, on a thread of its own.

    Only a state that is finite throughout is saved. On the way back every file is
    compared with its SHA-256: a damaged checkpoint is set aside as ``NAME.damaged``,
    and the one before it is taken, which a line on stderr says.

    Attributes:
      folder: where they lie; several processes must see the same.
      every: steps between two; None goes by the clock.
      minutes: between two, where ``every`` is None.
      keep: how many of the newest are kept.
      best: a metric, such as ``"validation_loss"``, whose best checkpoint is kept too.
      mode: whether the least or the greatest value is best.
      resume: ``"auto"`` goes on where there is a checkpoint, ``"must"`` refuses to
        begin anew, ``"never"`` refuses to go on.
      identity: what must be the same in a run that goes on, such as its config. The
        fingerprint of the data is compared besides.
      resumes: how often the run went on from a checkpoint, so far.
      steps_replayed: how many steps were taken a second time for that.
      last_state: the state of the last report, of a run that ended.

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
          ValueError: one is out of range.
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
                    f"Checkpoints.{name}: must be an integer from 1 on, got {value!r}"
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

        Args:
          state: of the structure, shapes, dtypes and shardings that are expected.
          data: the fingerprint of the data.

        Returns:
          What it held; None where the run begins.

        Raises:
          InUse: another process works in the folder.
          ValueError: it belongs to another config or other data; all checkpoints are
            damaged; or ``resume`` forbids what there is to do.
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
            _say(f"going on from step {step}, in {self._folder(step)}")
        return step

    def _clean(self) -> None:
        """Removes what a killed process left half done, and undoes half a change."""
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
                f"Checkpoints: no checkpoint in {self.folder} is whole ({which}); "
                "bring one back, or begin anew in another folder"
            )
        if self.resume == "must":
            raise ValueError(
                f"Checkpoints: resume='must', but {self.folder} has no checkpoint"
            )
        return -1

    def _check_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        lines = difference(saved, self._identity)
        # Hashes say nothing where words do.
        told = [line for line in lines if not line.startswith("data.batches")]
        if lines:
            lines = told or ["data: the same in kind and length, but other numbers"]
            raise ValueError(
                f"Checkpoints: {folder} belongs to another run:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nmake them equal, or choose another folder"
            )

    def _restore(self, step: int, state: PyTree) -> Restored:
        folder = self._folder(step)
        record = json.loads((folder / RUN).read_bytes())
        expected = _prefixed(state)
        # What hooks keep has the placement of scalars, of which each device has all.
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
        """Counts the resumption, and the steps that are taken a second time."""
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
        """Returns what hooks remembered when the run was first begun here."""
        file = self.folder / "begun.json"
        if jax.process_index() == 0 and not file.exists():
            write_json(file, _split(hooks, None))
        return _join(json.loads(file.read_bytes()), {}) if file.exists() else hooks

    def begin_step(self, step: int) -> None:
        """Notes, where even a killed process leaves it, that a step is begun."""
        if self._counter is not None:
            self._counter[:] = step.to_bytes(8, "little")

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Tells whether a report has the best value so far of the metric ``best``."""
        value = metrics.get(self.best or "")
        if value is None or not np.isfinite(value):
            return False
        old = self._best.get("value")
        return old is None or (value < old if self.mode == "min" else value > old)

    def warn_without_best(self, metrics: Mapping[str, float]) -> None:
        """Warns at the end of a run that never had the metric ``best``."""
        if self.best is not None and not self._best:
            warnings.warn(
                f"Checkpoints: no report had a number for best={self.best!r}; the last "
                f"has {sorted(metrics)}",
                stacklevel=2,
            )

    def due(self, step: int, *, at_report: bool) -> bool:
        """Tells whether it is time to save."""
        if step == self.saved_step:
            return False
        if self.every is not None:
            return step % self.every == 0
        late = time.monotonic() - self._saved_at >= 60 * self.minutes
        if jax.process_count() == 1:
            return late
        # The clock of the first process decides for all, now and then.
        return at_report and agree(int(late)) == 1

    def save(
        self,
        step: int,
        state: PyTree,
        record: Mapping[str, Any],
        *,
        best: float | None = None,
    ) -> None:
        """Begins to save, and returns as soon as the state is copied.

        Args:
          step: the number of steps taken.
          state: the training state.
          record: anything else, of JSON's types and arrays.
          best: the value of the best metric, if this checkpoint has it.

        Raises:
          NonFiniteError: a number of the state is not finite.
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
        """Says which step a run would go on from."""
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
                # A name that is gone at once, so that none is found half removed.
                gone = self._folder(step).with_suffix(".part")
                os.rename(self._folder(step), gone)
                shutil.rmtree(gone)

    def check(self) -> None:
        """Raises what went wrong meanwhile, if anything did."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until what is being saved is on the disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for what is being saved, and gives the folder free."""
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
        """Lists the steps of which there is a checkpoint, in their order."""
        found = []
        for path in self.folder.glob("step_*"):
            digits = path.name.removeprefix("step_")
            if len(digits) >= 9 and digits.isdecimal():
                found.append(int(digits))
        return sorted(found)

    def load_best(self, state: PyTree) -> PyTree:
        """Reads the state that had the best value of the metric ``best``.

        Args:
          state: of the structure that is expected, as the last report has it.

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
    """Copies a state, whose memory the next step takes; tells whether it is finite.

    What was not finite at the beginning, as a mask of minus infinity, need not be.
    """
    copy, finite = _copy_and_check(state, odd)
    return copy, bool(finite)


def not_finite(state: PyTree) -> list[str]:
    """Names the leaves that are not finite throughout."""
    return [
        name
        for name, leaf in name_leaves(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all()
    ]


def _unused(folder: Path) -> Path:
    """Names a damaged folder."""
    aside, number = folder.with_name(folder.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged{number}")
    return aside


def _prefixed(state: PyTree) -> dict[str, Any]:
    return {f"state/{name}": leaf for name, leaf in name_leaves(state).items()}


def _split(value: Any, arrays: dict[str, Any] | None) -> Any:
    """Takes JAX's arrays out of nested dicts and lists; leaves their names there.

    NumPy's stay, as text: JAX would change their dtypes. Without ``arrays`` all do.
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
    """Writes a value in JSON's types, floats that it lacks by their names."""
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
        "state of hooks and iterators, must be of dicts, lists, numbers, strings and, "
        "but for the identity, arrays"
    )
