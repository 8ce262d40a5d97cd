"""Plots of gradients over time, of Jacobians, and of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlstm import door
from jlstm.diagnostics.canvas import (
    GREY,
    PALETTE,
    SEQUENTIAL,
    canvas,
    colors,
    label_steps,
)
from jlstm.diagnostics.flow import Flow
from jlstm.diagnostics.jacobians import JacobianNorms, Spectrum
from jlstm.extras import import_optional


def plot_gradient_flow(
    flow: Flow | Mapping[str, Flow],
    *,
    of: str = "carry",
    row: int | None = None,
    labels: Sequence[str] | None = None,
    axes: Any = None,
) -> Any:
    """Plots the norm of the gradient at each step, one line for each recurrence.

    Args:
      flow: what :func:`gradient_flow` returned, or several flows by label, such as
        those of different cells.
      of: what the gradient is taken with respect to: ``"carry"`` for the whole carry,
        the name of a part of it, or ``"output"``.
      row: the row of the batch; None draws the median over the valid rows.
      labels: labels of the steps, such as the symbols that were read; None numbers
        them.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: a recurrence has no such part.
      ImportError: matplotlib is not installed.
    """
    flows = {"": flow} if isinstance(flow, Flow) else dict(flow)
    with canvas(axes) as axes:
        time = 1
        for (label, each), color in zip(flows.items(), colors(), strict=False):
            parts = {"carry": each.norm, "output": each.outputs, **each.carries}
            if of not in parts:
                names = ", ".join(map(repr, parts))
                raise door.error(
                    "plot_gradient_flow", f"of must be one of {names}, got {of!r}"
                )
            values = np.ma.masked_array(parts[of], ~each.valid)
            curve = np.ma.median(values, axis=0) if row is None else values[row]
            curve = np.ma.masked_less_equal(curve, 0)
            marker = "o" if curve.count() == 1 else None
            axes.plot(curve, color=color, marker=marker, ms=4, label=label)
            time = max(time, len(curve))
        whole = "the " if of in ("carry", "output") else ""
        axes.set(yscale="log", ylabel=f"norm of the gradient by {whole}{of}")
        label_steps(axes, labels, time)
        if any(flows):
            axes.legend()
        return axes.figure


def plot_jacobian_norms(
    norms: JacobianNorms | Mapping[str, JacobianNorms],
    *,
    log_lags: bool = False,
    axes: Any = None,
) -> Any:
    """Plots how far gradients reach: the norms of Jacobians over the number of steps.

    A line is the median over rows, with the range of all rows around it. The legend
    says in how many steps the norm halves or doubles.

    Args:
      norms: what :func:`jacobian_norms` returned, or several of them by label.
      log_lags: whether the axis of steps is logarithmic too, for long sequences.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    several = {"": norms} if isinstance(norms, JacobianNorms) else dict(norms)
    with canvas(axes) as axes:
        for (label, each), color in zip(several.items(), colors(), strict=False):
            steps = _text(each)
            rows = np.exp(np.maximum(each.log_norms, -600))
            axes.plot(
                each.lags,
                np.median(rows, axis=0),
                color=color,
                label=f"{label}: {steps}" if label else steps,
            )
            low, high = rows.min(0), rows.max(0)
            axes.fill_between(each.lags, low, high, color=color, alpha=0.2, lw=0)
        axes.axhline(1.0, color=GREY, ls=":", lw=1.0)
        axes.set(yscale="log", xlabel="steps", ylabel="norm of the Jacobian")
        axes.set_xscale("log" if log_lags else "linear")
        axes.legend()
        return axes.figure


def _text(norms: JacobianNorms) -> str:
    change = abs(norms.rate) * len(norms.lags)
    if change < np.log(2):
        return "holds"
    word = "halves" if norms.rate < 0 else "doubles"
    steps = np.log(2) / abs(norms.rate)
    return f"{word} every {steps:.3g} steps"


def plot_spectrum(found: Spectrum, *, step: int | None = None, axes: Any = None) -> Any:
    """Plots the eigenvalues of step Jacobians in the complex plane.

    The unit circle is drawn with them: eigenvalues near it keep information.

    Args:
      found: what :func:`spectrum` returned.
      step: the step whose eigenvalues are drawn; None draws all steps, from dark (the
        first) to light.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    values = found.eigenvalues
    shown = values if step is None else values[:, step][:, None]
    steps = np.broadcast_to(np.arange(shown.shape[1])[:, None], shown.shape)
    with canvas(axes, height=3.6) as axes:
        circle = import_optional("matplotlib.patches").Circle
        axes.add_patch(circle((0, 0), 1, fill=False, ec=GREY, lw=1.0))
        points = axes.scatter(
            np.real(shown).ravel(),
            np.imag(shown).ravel(),
            c=steps.ravel() if step is None else PALETTE[0],
            s=9,
            alpha=0.6,
            lw=0,
        )
        most = 1.08 * max(1.0, float(np.abs(shown).max(initial=0)))
        axes.set(xlim=(-most, most), ylim=(-most, most), aspect="equal")
        axes.set(xlabel="real part", ylabel="imaginary part")
        if step is None and shown.shape[1] > 1:
            axes.figure.colorbar(points, ax=axes, label="step", pad=0.01)
        return axes.figure


def plot_gradient_history(
    steps: Sequence[int], curves: Mapping[str, Sequence[Any]]
) -> Any:
    """Plots the norms of gradients over time, one line for each training step.

    Args:
      steps: the training steps of the measurements, in ascending order.
      curves: for each path of a recurrence, one array of norms ``[T]`` for each of
        these steps, such as the ``curves`` of a :class:`Watch`.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    options = {"nrows": len(curves), "sharex": True, "squeeze": False}
    with canvas(height=0.4 + 1.7 * len(curves), **options) as panels:
        normalize = import_optional("matplotlib.colors").Normalize
        norm = normalize(min(steps), max(*steps, min(steps) + 1))
        tones = import_optional("matplotlib.cm").ScalarMappable(norm, SEQUENTIAL)
        for panel, (path, lines) in zip(panels[:, 0], curves.items(), strict=True):
            for step, line in zip(steps, lines, strict=True):
                curve = np.ma.masked_less_equal(line, 0)
                panel.plot(curve, color=tones.to_rgba(step), lw=1.2)
            panel.set(yscale="log", ylabel="norm of the gradient\nby the carry")
            panel.set_title(path)
        label_steps(panels[-1, 0], None, len(next(iter(curves.values()))[0]))
        figure = panels[0, 0].figure
        figure.colorbar(tones, ax=panels, label="training step", pad=0.01)
        return figure


def plot_training(
    records: Sequence[Mapping[str, Any]],
    *,
    prefix: str = "diagnostics/",
) -> Any:
    """Plots what :func:`watch` measured during training, one panel for each quantity.

    Args:
      records: the metrics of the run, from ``jlstm.train.read_jsonl``, or the
        ``records`` of a :class:`Watch`.
      prefix: what the names of these metrics begin with.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: no record has such a metric.
      ImportError: matplotlib is not installed.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(prefix) and value is not None:
                path, _, quantity = name.removeprefix(prefix).rpartition("/")
                lines = curves.setdefault(quantity, {})
                lines.setdefault(path, []).append((record["step"], value))
    if not curves:
        raise door.error(
            "plot_training",
            f"no record has a metric that begins with {prefix!r}; list the hook "
            "watch(...) before the one that writes the records",
        )
    options = {"nrows": len(curves), "sharex": True, "squeeze": False}
    with canvas(height=0.5 + 1.3 * len(curves), **options) as panels:
        for panel, (quantity, lines) in zip(panels[:, 0], curves.items(), strict=True):
            for (path, points), color in zip(lines.items(), colors(), strict=False):
                steps, values = zip(*points, strict=True)
                marker = "o" if len(steps) <= 30 else None
                panel.plot(steps, values, color=color, marker=marker, ms=3, label=path)
            panel.set_ylabel(quantity.replace("_", "\n"), fontsize=8)
            positive = min(v for line in lines.values() for _, v in line) > 0
            panel.set_yscale("log" if positive and _wide(lines) else "linear")
        panels[-1, 0].set_xlabel("training step")
        handles, texts = panels[0, 0].get_legend_handles_labels()
        figure = panels[0, 0].figure
        if len(texts) > 1:
            figure.legend(handles, texts, loc="outside upper right", ncols=3)
        return figure


def _wide(lines: Mapping[str, list[tuple[float, float]]]) -> bool:
    values = [value for line in lines.values() for _, value in line]
    return max(values) / min(values) > 30
