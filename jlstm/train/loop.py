"""The training loop, and the report that it sends to its hooks."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlstm.train.checkpoint import barrier
from jlstm.train.checkpoints import Checkpoints
from jlstm.train.fingerprint import fingerprint
from jlstm.train.losses import divide, sum_metrics
from jlstm.train.signals import Cut, Interrupted, Signals, say
from jlstm.train.state import NonFiniteError, TrainState, check_alive
from jlstm.train.step import Metrics, TrainStep, check_takes


@dataclasses.dataclass
class Report:
    """The progress of a run, as hooks see it.

    Hooks read the report, may add to ``metrics``, and may end the run by setting
    ``stop``.

    Attributes:
      step: the number of steps taken.
      num_steps: the number of steps at which the run ends.
      state: the training state. The next step reuses its memory, so a hook that keeps
        an array of it must keep a copy.
      metrics: averages over the window, that is, over the steps since the last report.
        Steps that were skipped do not count.
      counts: the weight of each average: the summed counts of a ``Mean``, the number
        of steps for a plain scalar.
      seconds: the time that all steps of the run took, hooks excluded, earlier
        processes of the same run included.
      window_steps: the number of steps in the window; 0 in a report that says only that
        the batches ended.
      window_seconds: the time that these steps took, hooks excluded.
      stop: None, or the reason why the run ends here. A hook sets it to end the run.
      skipped: the number of steps so far that were skipped because the loss, the
        gradient or the carry was not finite.
    """

    step: int
    num_steps: int
    state: TrainState
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    window_steps: int = 0
    window_seconds: float = 0.0
    stop: str | None = None
    skipped: int = 0

    @property
    def last(self) -> bool:
        """Whether this is the last report, as far as is known so far."""
        return self.step >= self.num_steps or self.stop is not None


Hook = Callable[[Report], None]
"""A function that :func:`fit` calls with each :class:`Report`.

A hook with methods ``get_state()`` and ``set_state(state, report)`` is saved with the
checkpoints and restored from them. A hook with a method ``close()`` has it called at
the end of the run.
"""


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterable[Any],
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    log_every: int = 50,
    checkpoints: Checkpoints | None = None,
    max_skipped: int = 5,
) -> Report:
    """Trains until the state has taken ``num_steps`` steps in all.

    The run begins at ``state.step`` or, with checkpoints, at the newest checkpoint.
    One batch is read for each step. After each multiple of ``log_every`` steps, and
    after the last step, a report goes to the hooks, in their order. Between reports
    nothing is fetched from the device, so steps are prepared while others still
    compute. When the run ends, for whatever reason, each hook that has a method
    ``close()`` has it called.

    A run that continues from a checkpoint continues in the data too. If
    ``iter(batches)`` has ``get_state()`` and ``set_state(place)``, as the iterators of
    grain and of :mod:`jlstm.data` have, its place is saved and restored. For other
    iterables the batches that were read before are read again and thrown away. The
    state of a hook that has ``get_state()`` and ``set_state(state, report)`` is saved
    and restored as well.

    With checkpoints, SIGTERM and SIGINT (Ctrl-C) end the run in order: the step is
    finished, the state is saved, and :class:`Interrupted` is raised, which ends the
    process with code 143 or 130. Running hooks and a wait for data are cut short; the
    next run begins them again. A second signal ends the process at once. Several
    processes stop together when one of them gets SIGTERM.

    Args:
      state: from :func:`create_state`. The first step reuses its memory; afterwards use
        the state in the returned report.
      train_step: from :func:`make_train_step`.
      batches: any iterable of batches, such as a dataset of :mod:`jlstm.data` with
        ``.repeat()``. If it ends before ``num_steps``, so does the run; the last report
        says so, and without hooks a warning does.
      num_steps: the number of steps at which the run ends, counted from step 0, not
        from where this call begins.
      hooks: called with each :class:`Report`. A hook that adds a metric stands before
        the hooks that read it.
      log_every: the number of steps between reports. Metrics are averaged over them.
        Smaller values give finer curves and make the device wait more often.
      checkpoints: saves the run, and continues it if it was saved before; None saves
        nothing.
      max_skipped: how many steps in a row may be skipped because the loss, its
        gradient or the carry was not finite. One more raises.

    Returns:
      The last report; its ``state`` is the trained one.

    Raises:
      ValueError: an argument is of the wrong kind or out of range, there is no batch,
        the state was donated to an earlier step, or the checkpoints belong to another
        run.
      NonFiniteError: more than ``max_skipped`` steps in a row were skipped; the message
        names the first of them.
      Interrupted: a signal ended the run, and everything is saved.
      OSError: a checkpoint cannot be written; earlier ones are unchanged.

    Example:
      >>> train, tx = jlstm.train, jlstm.train.sgd(0.1)
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> state = train.create_state(jnp.zeros(()), tx)
      >>> step = train.make_train_step(loss_fn, tx)
      >>> report = train.fit(state, step, [jnp.ones(4)] * 9, num_steps=9)
    """
    for name, value in (("num_steps", num_steps), ("log_every", log_every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"fit: {name} must be a positive int, got {value!r}")
    if max_skipped < 0:
        raise ValueError(f"fit: max_skipped must be 0 or more, got {max_skipped}")
    if callable(hooks):
        raise ValueError(
            f"fit: hooks must be a sequence, got a single hook {hooks!r}; write "
            "hooks=[hook]"
        )
    for hook in hooks:
        if not callable(hook):
            raise ValueError(f"fit: hooks must be callable, got {hook!r}")
    if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
        raise ValueError(
            f"fit: checkpoints must be a Checkpoints, got {checkpoints!r}; write "
            "checkpoints=train.Checkpoints(folder)"
        )
    if not isinstance(state, TrainState):
        raise ValueError(
            f"fit: state must be a TrainState, got a {type(state).__name__}; make one "
            "with create_state(params, tx)"
        )
    check_takes("fit", train_step, state=state, batch=None)
    check_alive("fit", state)
    together = checkpoints is not None and jax.process_count() > 1
    run = _Run(
        state=state,
        train_step=train_step,
        batches=batches,
        num_steps=num_steps,
        hooks=list(hooks),
        log_every=log_every,
        checkpoints=checkpoints,
        max_skipped=max_skipped,
        signals=Signals(
            listen=checkpoints is not None and not together, forward=together
        ),
        together=together,
    )
    failed = True
    try:
        with run.signals:
            report = run.go()
        failed = False
    finally:
        run.close(failed=failed)
    return report


@dataclasses.dataclass
class _Run:
    """A run in progress: the arguments of :func:`fit`, and what it remembers."""

    state: TrainState
    train_step: TrainStep
    batches: Iterable[Any]
    num_steps: int
    hooks: Sequence[Hook]
    log_every: int
    checkpoints: Checkpoints | None
    max_skipped: int
    signals: Signals
    together: bool
    # Metrics since the last report: those still on the device, and sums of the others.
    window: list[Metrics] = dataclasses.field(default_factory=list)
    sums: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    window_steps: int = 0
    window_seconds: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    place: Any = None  # where in the data the next batch is
    before_hooks: list[Any] | None = None  # their states before they began to run
    ended: bool = False  # whether the batches have ended

    def go(self) -> Report:
        self.step = int(self.state.step)
        self.report = Report(self.step, self.num_steps, self.state)
        iterator = iter(self.batches)
        self.place = _place_of(iterator, None)
        self.first = self.step
        self.clock = time.perf_counter()
        try:
            resumed = self.checkpoints is not None and self._restore(iterator)
            self.first = self.step
            self.clock = time.perf_counter()
            while True:
                if self._report_is_due():
                    self._report()
                self._save_if_due()
                if self.report.last:
                    break
                self._take_step(iterator, resumed)
        except Cut:
            if self.signals.received is None:  # meant for another fit around this one
                raise
        if self.checkpoints is not None:
            self._save_at_the_end()
            if self.signals.received is not None:
                self._end_early()
            self.checkpoints.last_state = self.report.state
        return self.report

    def close(self, *, failed: bool) -> None:
        """Closes all hooks and the checkpoints, whatever goes wrong."""
        closing = [getattr(hook, "close", None) for hook in self.hooks]
        if self.checkpoints is not None:
            closing.append(self.checkpoints.close)
        problem = None
        for close in closing:
            try:
                if close is not None:
                    close()
            except BaseException as error:
                problem = problem or error
        if problem is not None and not failed:
            raise problem

    # One step.

    def _take_step(self, iterator: Iterator[Any], resumed: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.check()
        try:
            with self.signals.cutting(f"waiting for batch {self.step + 1}"):
                batch = next(iterator)
        except StopIteration:
            if self.step == self.first and not resumed:
                raise ValueError("fit: batches is empty") from None
            if not self.hooks:
                warnings.warn(f"fit: {self._stop_text()}", stacklevel=5)
            self.ended = True
            return
        self.signals.doing = f"in step {self.step + 1}" + (
            ", which compiles" if self.step == self.first else ""
        )
        if self.checkpoints is not None:
            self.checkpoints.begin_step(self.step + 1)
        self.state, metrics = self.train_step(self.state, batch)
        self.window.append(metrics)
        self.window_steps += 1
        self.step += 1
        if self.checkpoints is not None:
            self.place = _place_of(iterator, self.place)
        if self._must_end():
            raise Cut

    def _must_end(self) -> bool:
        if self.together:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self.step):
                self.signals.received = 15
        return self.signals.received is not None and not self._report_is_due(last=True)

    def _stop_text(self) -> str:
        return f"batches ended after step {self.step} of {self.num_steps}"

    # Reports.

    def _report_is_due(self, *, last: bool = False) -> bool:
        if self.ended:
            return self.report.stop is None
        if last:
            return self.step >= self.num_steps
        at = self.step % self.log_every == 0 or self.step >= self.num_steps
        return bool(self.window_steps) and at

    def _fetch(self) -> None:
        """Waits for the steps taken, and adds up their metrics."""
        fetched = jax.device_get(self.window)
        before = self.step - len(fetched)
        for number, metrics in enumerate(fetched, before + 1):
            if metrics.get("skipped"):
                self.skipped += 1
                # Not counted while the loss scale can still fall.
                self.skipped_in_a_row += not metrics.get("loss_scale", 1) > 1
            else:
                self.skipped_in_a_row = 0
            if self.skipped_in_a_row > self.max_skipped:
                raise NonFiniteError(self._skipped_text(number))
        taken = [m for m in fetched if not m.get("skipped")]
        nothing = {name: (0.0, 0.0) for metrics in fetched for name in metrics}
        self.sums = sum_metrics(taken, nothing | self.sums)
        self.sums.pop("skipped", None)
        self.window = []
        now = time.perf_counter()
        self.window_seconds += now - self.clock
        self.seconds += now - self.clock
        self.clock = now

    def _skipped_text(self, last: int) -> str:
        first, n = last - self.skipped_in_a_row + 1, self.skipped_in_a_row
        steps = f"step {last}" if n == 1 else f"steps {first} to {last}"
        kept = ""
        if self.checkpoints is not None:
            self.checkpoints.wait()
            kept = f"; {self.checkpoints.describe_last()}"
        return (
            f"fit: the loss, its gradient or the carry is not finite in {steps}, which "
            f"were skipped{kept}; make_train_step(debug_nans=True), or "
            "--debug-nans, finds the operation; labels outside the classes make a loss "
            "NaN, too"
        )

    def _report(self) -> None:
        self._fetch()
        report = Report(
            step=self.step,
            num_steps=self.num_steps,
            state=self.state,
            metrics=divide(self.sums),
            counts={name: count for name, (_, count) in self.sums.items()},
            seconds=self.seconds,
            window_steps=self.window_steps,
            window_seconds=self.window_seconds,
            stop=self._stop_text() if self.ended else None,
            skipped=self.skipped,
        )
        self.before_hooks = self._hook_states()
        with self.signals.cutting(f"in the hooks of step {self.step}"):
            try:
                for hook in self.hooks:
                    hook(report)
            except Interrupted as inner:  # of a fit in a hook
                self.signals.received = inner.number
                raise Cut from None
        self.before_hooks = None
        self.report, self.sums = report, {}
        self.window_steps, self.window_seconds = 0, 0.0
        self.clock = time.perf_counter()

    # Checkpoints.

    def _restore(self, iterator: Iterator[Any]) -> bool:
        assert self.checkpoints is not None
        found = self.checkpoints.open(self.state, fingerprint(self.batches))
        if found is None:
            # Hooks that write files cut them back to what was there before.
            states = self.checkpoints.at_the_beginning(self._hook_states())
            self._restore_hooks(states)
            return False
        record = found.record
        self.state, self.step = found.state, found.step
        if self.step > self.num_steps:
            say(
                f"fit: the run has taken {self.step} steps already, more than "
                f"num_steps={self.num_steps}; nothing is left to do"
            )
        for name in _REMEMBERED:
            setattr(self, name, record[name])
        self.sums = {k: (a, b) for k, (a, b) in record["sums"].items()}
        self.report = Report(
            **record["report"], num_steps=self.num_steps, state=self.state
        )
        self._restore_hooks(record["hooks"])
        if self._report_is_due():
            self.checkpoints.saved_step = None  # save again after the report
        if not self.report.last:
            with self.signals.cutting("reading the data up to where the run was"):
                _put(iterator, self.place)
        return True

    def _hook_states(self) -> list[dict[str, Any]]:
        """Asks all hooks that have a state for a copy of it."""
        return [
            {
                "kind": kind_of(hook),
                "optional": getattr(hook, "optional", False),
                "state": frozen(hook.get_state()),
            }
            for hook in self._stateful()
        ]

    def _stateful(self) -> list[Any]:
        return [
            hook
            for hook in self.hooks
            if hasattr(hook, "get_state") and hasattr(hook, "set_state")
        ]

    def _restore_hooks(self, saved: list[dict[str, Any]]) -> None:
        left = list(saved)
        for hook in self._stateful():
            kind = kind_of(hook)
            entry = next((entry for entry in left if entry["kind"] == kind), None)
            if entry is not None:
                left.remove(entry)
                hook.set_state(entry["state"], self.report)
            elif not getattr(hook, "optional", False):
                self._refuse_hooks(saved)
        # Only the first process has the hooks that write files.
        needed = any(not entry["optional"] for entry in left)
        if needed and jax.process_index() == 0:
            self._refuse_hooks(saved)

    def _refuse_hooks(self, saved: list[dict[str, Any]]) -> None:
        was = [entry["kind"] for entry in saved]
        now = [kind_of(hook) for hook in self._stateful()]
        raise ValueError(
            f"fit: the run was saved with the hooks {was}, and cannot continue with "
            f"{now}"
        )

    def _save_if_due(self) -> None:
        if self.checkpoints is None:
            return
        at_report = not self.window_steps
        metrics = self.report.metrics if at_report else {}
        best = self.checkpoints.is_best(metrics) and self.report.step == self.step
        if best or self.checkpoints.due(self.step, at_report=at_report):
            value = metrics[self.checkpoints.best or ""] if best else None
            self._save(value)

    def _save(self, best: float | None = None) -> None:
        assert self.checkpoints is not None
        self.signals.doing = f"saving step {self.step}"
        self._fetch()
        hooks = self.before_hooks
        if hooks is None:
            hooks = self._hook_states()
        report = {
            field.name: getattr(self.report, field.name)
            for field in dataclasses.fields(Report)
            if field.name not in ("state", "num_steps")
        }
        record = {name: getattr(self, name) for name in _REMEMBERED}
        record |= {"sums": self.sums, "report": report, "hooks": hooks}
        self.checkpoints.save(self.step, self.state, record, best=best)

    def _save_at_the_end(self) -> None:
        assert self.checkpoints is not None
        if self.checkpoints.saved_step != self.step or self.before_hooks is not None:
            self._save()
        self.checkpoints.wait()
        if self.report.last:
            self.checkpoints.warn_without_best(self.report.metrics)
        barrier("jlstm_end")

    def _end_early(self) -> None:
        number = self.signals.received or 0
        assert self.checkpoints is not None
        interrupted = Interrupted(
            number,
            f"ended by a signal after step {self.step} of {self.num_steps}, saved in "
            f"{self.checkpoints.folder}; run the same command to continue"
            if self.checkpoints.steps()
            else "ended by a signal before the first step",
        )
        say(interrupted.message)
        raise interrupted


# The attributes of _Run that a checkpoint contains.
_REMEMBERED = (
    "window_steps",
    "window_seconds",
    "seconds",
    "skipped",
    "skipped_in_a_row",
    "place",
    "ended",
)


def _place_of(iterator: Any, before: Any) -> Any:
    """Returns the place of the next batch, given the place of the batch before it."""
    get_state = getattr(iterator, "get_state", None)
    if get_state is not None and hasattr(iterator, "set_state"):
        return frozen(get_state())
    return {"batches_read": 0 if before is None else before["batches_read"] + 1}


def _put(iterator: Any, place: Any) -> None:
    if hasattr(iterator, "get_state") and hasattr(iterator, "set_state"):
        iterator.set_state(place)
        return
    for number in range(place["batches_read"]):
        try:
            next(iterator)
        except StopIteration:
            raise ValueError(
                f"fit: the batches end after {number}, but {place['batches_read']} "
                "were read when the run was saved; give the same batches, from the "
                "first one on"
            ) from None


def kind_of(hook: Any) -> str:
    """Names the type of a hook, and of the hook that it wraps."""
    return getattr(hook, "kind", type(hook).__name__)


def frozen(value: Any) -> Any:
    """Copies containers and NumPy arrays, which their owner may change later."""
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return value.copy() if isinstance(value, np.ndarray) else value
