"""A hook that measures gates, memory and gradients during training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jlstm import door
from jlstm.diagnostics.flow import GradientFlow, gradient_flow
from jlstm.diagnostics.memory import dead_units, saturation, time_constants
from jlstm.diagnostics.observe import check_inputs, trace
from jlstm.diagnostics.plots_flow import plot_gradient_history, plot_training
from jlstm.diagnostics.traces import Traces
from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, Layer, PyTree


class Reported(Protocol):
    """The part of a ``jlstm.train.Report`` that the hook reads."""

    step: int
    state: Any
    metrics: dict[str, float]
    window_steps: int

    @property
    def last(self) -> bool:
        """Whether this is the last report."""
        ...


def watch(
    layer: Layer,
    xs: PyTree,
    loss: Callable[[PyTree], Array] | None = None,
    *,
    every: int = 500,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    of: Callable[[PyTree], PyTree] | None = None,
    prefix: str = "diagnostics/",
    plots: str | os.PathLike[str] | None = None,
) -> Watch:
    """Makes a hook for ``jlstm.train.fit`` that measures a layer during training.

    It runs the layer on a fixed batch at the first report, every ``every`` steps, and
    at the last report. For each recurrence it adds to the metrics:

    - ``time_constant``: the median time constant of the units, in steps, for the last
      part of the carry (the ``c`` of an LSTM);
    - ``saturated``: the fraction of steps at which a gate is in the lowest or highest
      tenth of its range;
    - ``dead``: the fraction of units whose carry hardly changes;
    - with a loss, ``gradient``: the mean norm of its derivative with respect to the
      carry;
    - with a loss, ``gradient_reach``: that norm at the first step, divided by that at
      the last step. Values near 0 mean that gradients do not reach back.

    The metrics have names such as ``diagnostics/stack[0]/time_constant``. List the hook
    before those that write metrics.

    Args:
      layer: the layer that is trained.
      xs: a fixed batch of inputs ``[B, T, ...]``; eight rows are enough.
      loss: a function of the layer's outputs on this batch that returns one number.
        None measures no gradients.
      every: the number of steps between two measurements. A measurement takes a few
        times as long as a training step on that batch; the first one takes some seconds
        to compile.
      lengths: valid steps of each row of the batch, ``[B]``; None if all are valid.
      mask: true at valid steps, ``[B, T]``, for padding that is not at the end.
      resets: true where a row begins anew, ``[B, T]``; None for nowhere.
      of: a function that takes the params of the run and returns those of ``layer``,
        where the layer is a part of the model. None if they are the same.
      prefix: put before the names of the metrics.
      plots: a folder in which plots are drawn at the last report, such as ``plots`` of
        a ``jlstm.train.Workdir``; None draws none.

    Returns:
      The hook, a :class:`Watch`. If the run is continued, it keeps what it measured.

    Raises:
      TypeError: ``layer`` is no layer.
      ValueError: ``every`` is not positive, or the inputs do not fit.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(4)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> state = jlstm.train.create_state(params, jlstm.train.adamw(1e-3))
      >>> report = jlstm.train.Report(500, 900, state)
      >>> jlstm.diagnostics.watch(layer, xs)(report)
      >>> sorted(name.rpartition("/")[2] for name in report.metrics)
      ['dead', 'saturated', 'time_constant']
    """
    check_layer_field("watch", layer)
    if not isinstance(every, int) or every < 1:
        raise door.error("watch", f"every must be a positive int, got {every!r}")
    masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
    masking = check_inputs("watch", layer, xs, masking)
    folder = None if plots is None else Path(plots)
    return Watch(layer, xs, loss, masking, every, of, prefix, folder)


class Watch:
    """The hook that :func:`watch` makes.

    Attributes:
      records: what was added to the metrics, with ``step``, one dict for each
        measurement.
      curves: with a loss, for each path, one array ``[T]`` a measurement: the norm of
        the derivative with respect to the carry after each step, averaged over rows.
    """

    kind = "watch"

    def __init__(
        self,
        layer: Any,
        xs: PyTree,
        loss: Callable[[PyTree], Array] | None,
        masking: dict[str, Any],
        every: int,
        of: Callable[[PyTree], PyTree] | None,
        prefix: str,
        plots: Path | None,
    ) -> None:
        self._layer, self._xs, self._loss, self._masking = layer, xs, loss, masking
        self._every, self._of, self._prefix, self._plots = every, of, prefix, plots
        self._done: int | None = None
        self.records: list[dict[str, Any]] = []
        self.curves: dict[str, list[np.ndarray]] = {}

    def __call__(self, report: Reported) -> None:
        """Measures the layer, if it is time to."""
        before = report.step - report.window_steps
        due = report.step // self._every > before // self._every or report.last
        if (due or self._done is None) and self._done != report.step:
            report.metrics |= self.measure(report.state.params, report.step)
            self._done = report.step
        if report.last and self._plots is not None:
            self._plots.mkdir(parents=True, exist_ok=True)
            for name, figure in self.figures().items():
                figure.savefig(self._plots / f"{name}.png")

    def measure(self, params: PyTree, step: int) -> dict[str, float]:
        """Measures the layer with the given params, and records it for a step."""
        params = params if self._of is None else self._of(params)
        traces = trace(self._layer, params, self._xs, **self._masking)
        found = _of_traces(traces)
        if self._loss is not None:
            options = self._masking
            flow = gradient_flow(self._layer, params, self._xs, self._loss, **options)
            found |= _of_flow(flow)
            for path, each in flow.items():
                curve = np.asarray(_over_rows(each.norm, each.valid), np.float32)
                self.curves.setdefault(path, []).append(curve)
        metrics = {self._prefix + name: value for name, value in found.items()}
        shown = {n: v if math.isfinite(v) else None for n, v in metrics.items()}
        self.records.append({"step": step, **shown})
        return metrics

    def figures(self) -> dict[str, Any]:
        """Draws what was measured: matplotlib figures by name.

        Raises:
          ImportError: matplotlib is not installed.
        """
        made = {"diagnostics": plot_training(self.records, prefix=self._prefix)}
        if self.curves:
            steps = [record["step"] for record in self.records]
            made["gradient_flow"] = plot_gradient_history(steps, self.curves)
        return made

    def get_state(self) -> dict[str, Any]:
        """Returns what the hook must remember when the run is continued."""
        curves = {path: np.stack(found) for path, found in self.curves.items()}
        return {"done": self._done, "records": self.records, "curves": curves}

    def set_state(self, state: dict[str, Any], report: Any) -> None:
        """Restores what :meth:`get_state` returned."""
        del report
        self._done, self.records = state["done"], list(state["records"])
        self.curves = {
            path: list(np.asarray(found)) for path, found in state["curves"].items()
        }


def _of_traces(traces: Traces) -> dict[str, float]:
    found = {}
    for path, each in traces.items():
        name = list(each.memory)[-1]
        found[f"{path}/time_constant"] = np.median(time_constants(each).steps[name])
        ends = saturation(each)
        parts = [(ends.low[gate] + ends.high[gate]).mean() for gate in ends.low]
        if parts:
            found[f"{path}/saturated"] = np.mean(parts)
        dead = dead_units(each)
        found[f"{path}/dead"] = dead.units[name].size / max(1, dead.sizes[name])
    return {name: float(value) for name, value in found.items()}


def _of_flow(flow: GradientFlow) -> dict[str, float]:
    found = {}
    for path, each in flow.items():
        curve = _over_rows(each.norm, each.valid)
        steps = np.flatnonzero(each.valid.any(0))
        if not steps.size:
            continue
        first, last = curve[steps[0]], curve[steps[-1]]
        if each.reverse:
            first, last = last, first
        found[f"{path}/gradient"] = float(each.norm[each.valid].mean())
        reach = first / last if last else math.inf if first else math.nan
        found[f"{path}/gradient_reach"] = float(reach)
    return found


def _over_rows(norm: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return (norm * valid).sum(0) / np.maximum(valid.sum(0), 1)
