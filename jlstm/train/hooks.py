"""Hooks: callables ``hook(report)`` that act on each report of a run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jlstm.extras import import_optional
from jlstm.files import sync
from jlstm.train.loop import Hook, Report, kind_of
from jlstm.train.step import EvalStep, evaluate
from jlstm.types import PyTree

Mode = Literal["min", "max"]


def every(n: int, hook: Hook) -> Hook:
    """Makes a hook that runs another hook only every ``n`` steps.

    Reports come every ``log_every`` steps of :func:`fit`, so the hook runs at the first
    report at or after each multiple of ``n``. It also runs at the last report, and
    never twice at one step.

    Args:
      n: the number of steps between two runs, best a multiple of ``log_every``.
      hook: the hook to run.

    Returns:
      The new hook.

    Raises:
      ValueError: ``n`` is not positive.

    Example:
      >>> hook = jlstm.train.every(100, lambda report: print(report.step))
      >>> hook(jlstm.train.Report(step=100, num_steps=900, state=None, window_steps=50))
      100
    """
    if n < 1:
        raise ValueError(f"every: n must be at least 1, got {n}")
    return _Every(n, hook)


class _Every:
    """A hook that runs, saves and closes another one."""

    def __init__(self, n: int, hook: Hook) -> None:
        self._n, self._hook = n, hook
        self._done: int | None = None

    def __call__(self, report: Report) -> None:
        before = report.step - report.window_steps
        due = report.step // self._n > before // self._n or report.last
        if due and self._done != report.step:
            self._hook(report)
            self._done = report.step

    @property
    def kind(self) -> str:
        return f"every {self._n}: {kind_of(self._hook)}"

    def get_state(self) -> dict[str, Any]:
        inner = getattr(self._hook, "get_state", None)
        return {"done": self._done, "hook": None if inner is None else inner()}

    def set_state(self, state: dict[str, Any], report: Report) -> None:
        self._done = state["done"]
        if state["hook"] is not None:
            self._hook.set_state(state["hook"], report)  # type: ignore[attr-defined]

    def close(self) -> None:
        close = getattr(self._hook, "close", None)
        if close is not None:
            close()


def evaluate_every(
    n: int,
    eval_step: EvalStep,
    make_batches: Callable[[], Iterable[Any]],
    *,
    prefix: str = "validation_",
) -> Hook:
    """Makes a hook that evaluates the params and adds the metrics to the report.

    It runs every ``n`` steps, as :func:`every` does. List it before the hooks that read
    the metrics it adds, such as :func:`early_stopping` and :func:`write_jsonl`.

    Args:
      n: the number of steps between evaluations, best a multiple of ``log_every``.
      eval_step: from :func:`make_eval_step`.
      make_batches: a function that returns the batches; it is called for each
        evaluation. For a list or a dataset, write ``lambda: batches``.
      prefix: put before the names of the metrics: ``loss`` becomes
        ``validation_loss``.

    Returns:
      The hook.

    Raises:
      ValueError: ``make_batches`` is not a function, or ``n`` is not positive.

    Example:
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return jlstm.train.squared_error(params, batch), jlstm.train.Aux({})
      >>> eval_step = jlstm.train.make_eval_step(loss_fn)
      >>> hook = jlstm.train.evaluate_every(500, eval_step, lambda: [jnp.ones(3)])
    """
    if not callable(make_batches):
        raise ValueError(
            "evaluate_every: make_batches must be a function, which is called for the "
            f"batches of each evaluation, got a {type(make_batches).__name__}; write "
            "lambda: batches"
        )

    def run_evaluation(report: Report) -> None:
        metrics = evaluate(eval_step, report.state.params, make_batches())
        report.metrics |= {prefix + name: value for name, value in metrics.items()}

    return every(n, run_evaluation)


@dataclasses.dataclass
class Best:
    """The best value of a metric so far, and the params that had it.

    This is the hook that :func:`keep_best` makes.

    Attributes:
      metric: the name of the metric, such as ``"validation_loss"``.
      mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.
      keep: whether to keep a copy of the params beside the value.
      value: the best value so far; None before the first.
      step: the step at which it was reported; None before the first.
    """

    metric: str
    mode: Mode = "min"
    keep: bool = True
    value: float | None = None
    step: int | None = None
    _params: PyTree = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode: must be 'min' or 'max', got {self.mode!r}")

    def __call__(self, report: Report) -> None:
        """Keeps the report's value if it is the best so far; NaN never is."""
        value = report.metrics.get(self.metric)
        if value is None or math.isnan(value):
            return
        better = operator.lt if self.mode == "min" else operator.gt
        if self.value is None or better(value, self.value):
            self.value, self.step = value, report.step
            if self.keep:
                # A copy, since the next step reuses the memory of the state's arrays.
                self._params = jax.tree.map(jnp.copy, report.state.params)

    @property
    def params(self) -> PyTree:
        """The params that had the best value.

        Raises:
          ValueError: no report had the metric.
        """
        if self.value is None:
            raise ValueError(
                f"keep_best: no report had a number for {self.metric!r}; list the hook "
                "after the one that adds it"
            )
        return self._params

    def get_state(self) -> dict[str, Any]:
        """Returns what the hook must remember when the run is continued."""
        leaves = None if self._params is None else jax.tree.leaves(self._params)
        return {"value": self.value, "step": self.step, "params": leaves}

    def set_state(self, state: dict[str, Any], report: Report) -> None:
        """Restores what :meth:`get_state` returned."""
        self.value, self.step = state["value"], state["step"]
        if state["params"] is not None:
            tree = jax.tree.structure(report.state.params)
            self._params = jax.tree.unflatten(tree, state["params"])


def keep_best(metric: str, mode: Mode = "min") -> Best:
    """Makes a hook that keeps a copy of the params with the best value of a metric.

    The copy takes the memory of one more set of params. List the hook after the one
    that adds the metric. For runs with :class:`Checkpoints`, ``Checkpoints(best=...)``
    keeps the whole state on disk instead.

    Args:
      metric: the name of the metric, such as ``"validation_loss"``.
      mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.

    Returns:
      The hook, with the attributes ``value``, ``step`` and ``params``.

    Raises:
      ValueError: an unknown mode.

    Example:
      >>> best = jlstm.train.keep_best("validation_loss")
      >>> hooks = [best]  # train.fit(..., hooks=hooks), then best.params
    """
    return Best(metric, mode)


def early_stopping(metric: str, patience: int, mode: Mode = "min") -> Hook:
    """Makes a hook that ends the run when a metric no longer improves.

    List it after the hook that adds the metric.

    Args:
      metric: the name of the metric, such as ``"validation_loss"``.
      patience: after how many values in a row that are no better than the best one the
        run ends. A report without the metric does not count; NaN counts as no better.
      mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.

    Returns:
      The hook. It warns at the end of a run in which no report had the metric.

    Raises:
      ValueError: an unknown mode, or ``patience`` is not positive.

    Example:
      >>> stop = jlstm.train.early_stopping("loss", patience=1)
      >>> first = jlstm.train.Report(1, 9, None, {"loss": 0.5})
      >>> second = jlstm.train.Report(2, 9, None, {"loss": 0.6})
      >>> stop(first), stop(second), second.stop
      (None, None, 'loss has not improved on 0.5 since step 1')
    """
    if patience < 1:
        raise ValueError(f"early_stopping: patience must be at least 1, got {patience}")
    return _Stop(Best(metric, mode, keep=False), patience)


@dataclasses.dataclass
class _Stop:
    best: Best
    patience: int
    seen: bool = False
    misses: int = 0
    kind: ClassVar[str] = "early_stopping"

    def __call__(self, report: Report) -> None:
        metric, best = self.best.metric, self.best
        if metric in report.metrics:
            self.seen = True
            best(report)
            self.misses = 0 if best.step == report.step else self.misses + 1
            if self.misses >= self.patience:
                report.stop = (
                    f"{metric} has not improved on {best.value:.6g} since step "
                    f"{best.step}"
                    if best.value is not None
                    else f"{metric} was never a number"
                )
        elif report.last and not self.seen:
            warnings.warn(
                f"early_stopping: {metric!r} never came up; the last report has "
                f"{sorted(report.metrics)}",
                stacklevel=2,
            )

    def get_state(self) -> dict[str, Any]:
        best = self.best.get_state()
        return {"best": best, "seen": self.seen, "misses": self.misses}

    def set_state(self, state: dict[str, Any], report: Report) -> None:
        self.best.set_state(state["best"], report)
        self.seen, self.misses = state["seen"], state["misses"]


def write_jsonl(path: str | os.PathLike[str]) -> Hook:
    """Makes a hook that appends each report to a file, one JSON object a line.

    A line has ``step``, ``seconds``, the metrics, ``skipped`` if steps were skipped,
    and ``stop`` if the run ends early. Numbers that are not finite become null. If a
    crash left half a line at the end of the file, that is removed before the first new
    line. :func:`read_jsonl` reads the file.

    Args:
      path: the path of the file, such as ``"run/metrics.jsonl"``. Its folder is made if
        it does not exist.

    Returns:
      The hook.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
      >>> jlstm.train.write_jsonl(path)(jlstm.train.Report(1, 2, None, {"loss": 0.5}))
      >>> jlstm.train.read_jsonl(path)
      [{'step': 1, 'seconds': 0.0, 'loss': 0.5}]
    """
    return _Lined(Path(path))


@dataclasses.dataclass
class _Lined:
    """Appends lines; a continued run first removes those that it will write again."""

    path: Path
    begun: bool = False
    kind: ClassVar[str] = "write_jsonl"

    def __call__(self, report: Report) -> None:
        record: dict[str, Any] = {"step": report.step}
        record["seconds"] = round(report.seconds, 3)
        record |= {name: finite(value) for name, value in report.metrics.items()}
        if report.skipped:
            record["skipped"] = report.skipped
        if report.stop is not None:
            record["stop"] = report.stop
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            if not self.begun:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab+") as stream:
                    _cut_half_line(stream)
                self.begun = True
            # A file that was removed meanwhile must not be recreated silently.
            with open(self.path, "rb+") as stream:
                stream.seek(0, os.SEEK_END)
                stream.write(line)
        except OSError as error:
            raise OSError(
                f"write_jsonl: {self.path} cannot be written ({error.strerror})"
            ) from error

    def get_state(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"bytes": 0}
        sync(self.path)  # a checkpoint relies on these bytes
        return {"bytes": self.path.stat().st_size}

    def set_state(self, state: dict[str, Any], report: Report) -> None:
        del report
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > state["bytes"]:
            os.truncate(self.path, state["bytes"])
        elif size < state["bytes"]:
            warnings.warn(
                f"write_jsonl: {self.path} has lost lines: it has {size} bytes, not "
                f"the {state['bytes']} that it had when the run was saved",
                stacklevel=2,
            )


def _cut_half_line(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def write_tensorboard(folder: str | os.PathLike[str]) -> Hook:
    """Makes a hook that writes each report's metrics for TensorBoard.

    A continued run hides what was written after its checkpoint.

    Args:
      folder: where the event files are written; give it to
        ``tensorboard --logdir``.

    Returns:
      The hook.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    return _Board(Path(folder), import_optional("tensorboardX"))


@dataclasses.dataclass
class _Board:
    folder: Path
    library: Any
    purge: int | None = None
    writer: Any = None
    optional: ClassVar[bool] = True  # a run may continue with it or without it
    kind: ClassVar[str] = "write_tensorboard"

    def __call__(self, report: Report) -> None:
        if self.writer is None:
            self.writer = self.library.SummaryWriter(
                str(self.folder), purge_step=self.purge
            )
        for name, value in report.metrics.items():
            self.writer.add_scalar(name, value, report.step)
        self.writer.flush()

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any], report: Report) -> None:
        del state
        self.purge = report.step + 1

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def finite(value: Any) -> Any:
    """Returns the value, or None for a float that JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_progress(*, interval: float = 10.0, unit: str = "items") -> Hook:
    """Makes a hook that shows the progress of a run.

    On a terminal it shows a bar, elsewhere it prints a line now and then. Both have the
    metrics, the steps per second and the time left. If the loss is a :class:`Mean`,
    which counts its items, they have the items per second too.

    Args:
      interval: the least number of seconds between two lines where stdout is no
        terminal.
      unit: what the loss counts, such as ``"tokens"``; a word for the display.

    Returns:
      The hook.

    Raises:
      ImportError: stdout is a terminal, and rich is not installed.
      ImportError: stdout is a terminal, and rich is not installed.

    Example:
      >>> show = jlstm.train.show_progress(unit="tokens")
      >>> state = None
      >>> show(jlstm.train.Report(50, 90, state, {"loss": 0.5}, {}, 2.0, 50, 2.0))
      step 50/90  loss 0.5  25 steps/s  eta 0:00:02
    """
    return _Bar(unit) if sys.stdout.isatty() else _Lines(interval, unit)


class _Lines:
    """Prints one line each interval, and the first report, the last one and a stop."""

    def __init__(self, interval: float, unit: str) -> None:
        self._interval, self._unit = interval, unit
        self._printed = -math.inf

    def __call__(self, report: Report) -> None:
        now = time.monotonic()
        if report.last or now - self._printed >= self._interval:
            self._printed = now
            parts = [f"step {report.step}/{report.num_steps}"]
            parts += _metrics_text(report), _rates_text(report, self._unit)
            if report.window_steps and not report.last:
                parts.append(f"eta {_eta(report)}")
            if report.stop is not None:
                parts.append(f"stopped: {report.stop}")
            print("  ".join(filter(None, parts)), flush=True)


class _Bar:
    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._rich = import_optional("rich.progress")
        self._progress: Any = None

    def __call__(self, report: Report) -> None:
        bar = self._progress = self._progress or self._start()
        bar.update(
            self._task,
            completed=report.step,
            total=report.num_steps,
            eta="" if report.last else _eta(report),
        )
        if report.window_steps:
            rates = _rates_text(report, self._unit)
            bar.update(self._task, text=f"{_metrics_text(report)}  {rates}")
        bar.refresh()
        if report.stop is not None:
            self.close()
            print(f"stopped: {report.stop}")

    def _start(self) -> Any:
        rich, Column = self._rich, import_optional("rich.table").Column
        whole, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True)
        bar = rich.Progress(
            rich.BarColumn(bar_width=16, table_column=Column(min_width=16)),
            rich.MofNCompleteColumn(table_column=whole),
            rich.TextColumn(
                "{task.fields[eta]}", style="progress.remaining", table_column=whole
            ),
            # In a narrow terminal the end of the metrics is cut off.
            rich.TextColumn("{task.fields[text]}", table_column=rest),
            auto_refresh=False,
            expand=True,
        )
        bar.start()
        self._task = bar.add_task("", total=None, text="", eta="")
        return bar

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _metrics_text(report: Report) -> str:
    # A compiled step returns its metrics in alphabetical order.
    names = sorted(report.metrics, key=lambda name: name != "loss")
    parts = [f"{name} {report.metrics[name]:.4g}" for name in names]
    if report.skipped:
        parts.append(f"skipped {report.skipped}")
    return "  ".join(parts)


def _rates_text(report: Report, unit: str) -> str:
    if not report.window_steps:
        return ""
    seconds = max(report.window_seconds, 1e-9)
    text = f"{_round(report.window_steps / seconds)} steps/s"
    items = report.counts.get("loss", 0)
    if items > report.window_steps:
        text += f"  {_round(items / seconds)} {unit}/s"
    return text


def _round(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _eta(report: Report) -> str:
    steps = max(report.window_steps, 1)
    seconds = (report.num_steps - report.step) * report.window_seconds / steps
    return str(datetime.timedelta(seconds=math.ceil(seconds)))
