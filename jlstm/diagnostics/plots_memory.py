"""Plots of gates and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlstm import door
from jlstm.diagnostics.canvas import (
    DIVERGING,
    GREY,
    PALETTE,
    canvas,
    colors,
    label_steps,
    plain_ticks,
)
from jlstm.diagnostics.memory import TimeConstants, only
from jlstm.diagnostics.traces import Trace, Traces

# With so many units at most, each is a line; of more, quantiles are shown.
MOST_LINES = len(PALETTE)


def plot_gates(
    trace: Trace | Traces,
    *,
    row: int = 0,
    units: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """Plots the gates of one row over its steps, one panel for each gate.

    Masked steps are shaded, and a dotted line marks each reset.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.
      row: the row of the batch.
      units: the units to draw, a line each. None draws all if there are at most six;
        otherwise it draws the median over units and the ranges of 80 % and of 100 % of
        them.
      labels: labels of the steps, such as the symbols that were read; None numbers
        them.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: the cell has no gates, or there is no such row or unit.
      ImportError: matplotlib is not installed.
    """
    trace = only(trace)
    _check("plot_gates", trace, row)
    if not trace.gates:
        raise door.error(
            "plot_gates",
            f"{trace.cell!r} names no gates; compute them with jlstm.gates",
        )
    names = list(trace.gates)
    height = 0.5 + 1.1 * len(names)
    options = {"nrows": len(names), "sharex": True, "squeeze": False}
    with canvas(height=height, **options) as panels:
        for panel, name in zip(panels[:, 0], names, strict=True):
            values = _of_row(trace.gates[name], trace, row)
            _draw_units(panel, values, _chosen("plot_gates", values, units))
            panel.set_ylabel(name, rotation=0, ha="right", va="center")
            bounds = trace.ranges[name]
            if bounds is not None:
                margin = 0.05 * (bounds[1] - bounds[0])
                panel.set_ylim(bounds[0] - margin, bounds[1] + margin)
            _mark_steps(panel, trace, row)
        label_steps(panels[-1, 0], labels, trace.valid.shape[1])
        handles, texts = panels[0, 0].get_legend_handles_labels()
        figure = panels[0, 0].figure
        figure.legend(handles, texts, loc="outside upper right", ncols=len(texts))
        return figure


def plot_memory(
    trace: Trace | Traces,
    name: str | None = None,
    *,
    row: int = 0,
    labels: Sequence[str] | None = None,
    axes: Any = None,
) -> Any:
    """Plots the carry of one row as a map of units by steps.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.
      name: the part of the carry, such as ``"c"``; None takes the last one.
      row: the row of the batch.
      labels: labels of the steps; None numbers them.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: there is no such part or row.
      ImportError: matplotlib is not installed.
    """
    trace = only(trace)
    _check("plot_memory", trace, row)
    name = list(trace.memory)[-1] if name is None else name
    if name not in trace.memory:
        names = ", ".join(map(repr, trace.memory))
        raise door.error("plot_memory", f"name must be one of {names}, got {name!r}")
    values = _of_row(trace.memory[name], trace, row).T
    with canvas(axes, height=min(6.0, 1.4 + 0.08 * len(values))) as axes:
        most = float(np.nanmax(np.abs(values), initial=0)) or 1.0
        image = axes.imshow(
            np.ma.masked_invalid(values),
            aspect="auto",
            cmap=DIVERGING,
            vmin=-most,
            vmax=most,
            interpolation="nearest",
        )
        axes.set_facecolor("#dddddd")
        axes.set_ylabel("unit")
        axes.grid(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
        _mark_steps(axes, trace, row, shade=False)
        label_steps(axes, labels, values.shape[1])
        axes.figure.colorbar(image, ax=axes, label=name, pad=0.01)
        return axes.figure


def plot_time_constants(
    found: TimeConstants | Mapping[str, TimeConstants],
    name: str | None = None,
    *,
    axes: Any = None,
) -> Any:
    """Plots the distribution of the time constants of units, as a histogram.

    Args:
      found: what :func:`time_constants` returned, or several of them by label.
      name: the part of the carry, such as ``"c"``; None takes the last one.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: there is no such part, or no time constant is positive and finite.
      ImportError: matplotlib is not installed.
    """
    several = {"": found} if isinstance(found, TimeConstants) else dict(found)
    values = {}
    for label, each in several.items():
        chosen = list(each.steps)[-1] if name is None else name
        if chosen not in each.steps:
            names = ", ".join(map(repr, each.steps))
            raise door.error(
                "plot_time_constants", f"name must be one of {names}, got {chosen!r}"
            )
        steps = each.steps[chosen].ravel()
        values[label] = steps[np.isfinite(steps) & (steps > 0)]
    merged = np.concatenate(list(values.values()))
    if not merged.size:
        raise door.error(
            "plot_time_constants",
            "no time constant is positive and finite; what only the recurrent product "
            "keeps has none; see jlstm.diagnostics.verdict",
        )
    low, high = merged.min() / 1.1, merged.max() * 1.1
    bins = np.geomspace(low, high, 25)
    with canvas(axes) as axes:
        for (label, steps), color in zip(values.items(), colors(), strict=False):
            text = f"{label}, " if label else ""
            text += f"median {np.median(steps):.3g} steps" if steps.size else "none"
            axes.hist(steps, bins, color=color, alpha=0.65, label=text)
            if steps.size:
                axes.axvline(np.median(steps), color=color, ls="--", lw=1.2)
        axes.set(xscale="log", xlabel="time constant (steps)", ylabel="units")
        plain_ticks(axes, low, high)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return axes.figure


def _check(where: str, trace: Trace, row: int) -> None:
    rows = trace.valid.shape[0]
    if not 0 <= row < rows:
        raise door.error(where, f"row must be from 0 to {rows - 1}, got {row}")


def _of_row(value: Any, trace: Trace, row: int) -> np.ndarray:
    """Returns one row as ``[T, units]``: NaN where masked, moduli if complex."""
    array = np.asarray(value)[row]
    array = np.abs(array) if np.iscomplexobj(array) else array.astype(np.float64)
    array = array.reshape(len(array), -1)
    return np.where(np.asarray(trace.valid)[row][:, None], array, np.nan)


def _chosen(
    where: str, values: np.ndarray, units: Sequence[int] | None
) -> Sequence[int] | None:
    count = values.shape[1]
    if units is None:
        return range(count) if count <= MOST_LINES else None
    if any(not 0 <= unit < count for unit in units):
        raise door.error(
            where, f"units must be from 0 to {count - 1}, got {list(units)}"
        )
    return units


def _draw_units(axes: Any, values: np.ndarray, units: Sequence[int] | None) -> None:
    steps = np.arange(len(values))
    if units is not None:
        for unit, color in zip(units, colors(), strict=False):
            axes.plot(steps, values[:, unit], color=color, label=f"unit {unit}")
        return
    found = [np.quantile(values, part, axis=1) for part in (0.0, 0.1, 0.5, 0.9, 1.0)]
    color = PALETTE[0]
    for (low, high), alpha, label in (
        ((0, 4), 0.15, "all units"),
        ((1, 3), 0.3, "80 % of units"),
    ):
        axes.fill_between(
            steps, found[low], found[high], color=color, alpha=alpha, lw=0, label=label
        )
    axes.plot(steps, found[2], color=color, label="median")


def _mark_steps(axes: Any, trace: Trace, row: int, shade: bool = True) -> None:
    """Marks where a step began from the fresh carry, and which steps are masked."""
    begins, valid = (np.asarray(flags)[row] for flags in (trace.begins, trace.valid))
    for step in np.flatnonzero(begins):
        at = step + 0.5 if trace.reverse else step - 0.5
        axes.axvline(at, color=GREY, ls=":", lw=1.2)
    if shade:
        for step in np.flatnonzero(~valid):
            axes.axvspan(step - 0.5, step + 0.5, color="#dddddd", lw=0)
