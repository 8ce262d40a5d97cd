"""The training loop, and what it tells its hooks."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jlstm.train.losses import divide, sum_metrics
from jlstm.train.state import TrainState, check_alive
from jlstm.train.step import Metrics, TrainStep


@dataclasses.dataclass
class Report:
    """Where a run stands; hooks read it, add metrics to it, and may stop the run.

    Attributes:
      step: number of steps taken.
      num_steps: number of steps wanted.
      state: the training state. The next step takes its memory: a hook that keeps
        anything of it beyond its return keeps a copy.
      metrics: averages over the window, that is, the steps since the last report.
      counts: how much each average weighs: the summed counts of a ``Mean``, the number
        of steps for a plain scalar.
      seconds: since the beginning of :func:`fit`.
      window_steps: number of steps in the window; 0 in a report that only says that
        the batches ended.
      window_seconds: what these steps took, hooks not counted.
      stop: None, or why the run ends here. A hook sets it to end the run.
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

    @property
    def last(self) -> bool:
        """Whether no step follows, as far as is known by now."""
        return self.step >= self.num_steps or self.stop is not None


Hook = Callable[[Report], None]


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterable[Any],
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    log_every: int = 50,
) -> Report:
    """Trains until ``num_steps`` steps have been taken in all.

    The run begins at ``state.step``: to resume, pass the state and the batches that
    remain. Metrics stay on the device, where steps queue up, until a report is due:
    after each multiple of ``log_every`` and after the last step. A report goes to the
    hooks in order. However the run ends, each hook that has a method ``close()`` has it
    called.

    Exactly one batch is read a step, so that an iterator saved by a hook continues with
    the next one.

    Args:
      state: from ``create_state``, or from a checkpoint. It is donated: use the state
        in the returned report from here on.
      train_step: from ``make_train_step``.
      batches: any iterable; where it ends early, so does the run, as the report says,
        and where there are no hooks to show it, a warning.
      num_steps: the step to stop at.
      hooks: called with each :class:`Report`.
      log_every: number of steps between reports.

    Returns:
      The last report; its ``state`` is the trained one.

    Raises:
      ValueError: ``num_steps`` or ``log_every`` is not positive, there is no batch,
        ``hooks`` is one hook, or an earlier step has taken the state.

    Example:
      >>> train, tx = jlstm.train, jlstm.train.sgd(0.1)
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> state = train.create_state(jnp.zeros(()), tx)
      >>> step = train.make_train_step(loss_fn, tx)
      >>> report = train.fit(state, step, [jnp.ones(4)] * 9, num_steps=9)
    """
    for name, value in (("num_steps", num_steps), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"fit: {name} must be at least 1, got {value}")
    if callable(hooks):
        raise ValueError(
            f"fit: hooks must be a sequence, got the one hook {hooks!r}; write "
            "hooks=[hook]"
        )
    check_alive("fit", state)
    try:
        return _fit(state, train_step, batches, num_steps, hooks, log_every)
    finally:
        for hook in hooks:
            close = getattr(hook, "close", None)
            if close is not None:
                close()


def _fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterable[Any],
    num_steps: int,
    hooks: Sequence[Hook],
    log_every: int,
) -> Report:
    step = first = int(state.step)
    report = Report(step, num_steps, state)
    window: list[Metrics] = []
    iterator = iter(batches)
    start = mark = time.perf_counter()
    while not report.last:
        try:
            batch = next(iterator)
        except StopIteration:
            if step == first:
                raise ValueError("fit: batches is empty") from None
            stop = f"batches ended after step {step} of {num_steps}"
            if not hooks:
                warnings.warn(f"fit: {stop}", stacklevel=3)
        else:
            state, metrics = train_step(state, batch)
            window.append(metrics)
            step += 1
            stop = None
            if step % log_every and step < num_steps:
                continue
        sums = sum_metrics(window)
        now = time.perf_counter()
        report = Report(
            step=step,
            num_steps=num_steps,
            state=state,
            metrics=divide(sums),
            counts={name: count for name, (_, count) in sums.items()},
            seconds=now - start,
            window_steps=len(window),
            window_seconds=now - mark,
            stop=stop,
        )
        window = []
        for hook in hooks:
            hook(report)
        mark = time.perf_counter()
    return report
