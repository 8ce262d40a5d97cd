"""Learning curves: reads the metrics of a run, and plots them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlstm.extras import import_optional

Records = Sequence[Mapping[str, Any]]


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the file that :func:`jlstm.train.write_jsonl` wrote, in order of steps.

    If a continued run has repeated steps, the later lines count. A half-written last
    line is left out.

    Args:
      path: the path of the file.

    Returns:
      One dict for each step, with ``step``, ``seconds`` and the metrics.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a JSON object with a step.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
      >>> jlstm.train.write_jsonl(path)(jlstm.train.Report(1, 2, None, {"loss": 0.5}))
      >>> jlstm.train.read_jsonl(path)
      [{'step': 1, 'seconds': 0.0, 'loss': 0.5}]
    """
    lines = Path(path).read_text().split("\n")[:-1]
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"read_jsonl: line {number} of {path} is not a JSON object with an "
                "entry 'step'"
            ) from None
        records[step] = records.get(step, {}) | record
    return [records[step] for step in sorted(records)]


def plot_metrics(
    source: str | os.PathLike[str] | Records,
    path: str | os.PathLike[str],
    metric: str = "loss",
    *,
    unit: str = "",
    floor: float | None = None,
    floor_name: str = "floor",
    prefix: str = "validation_",
    log_scale: bool = False,
) -> None:
    """Plots a metric over the training steps, in training and in validation.

    Args:
      source: the path of a file of :func:`jlstm.train.write_jsonl`, or its records as
        :func:`jlstm.train.read_jsonl` returns them.
      path: where to write the picture. The suffix gives the format, such as ``.png`` or
        ``.svg``.
      metric: the name of the metric, such as ``"loss"``.
      unit: the unit of the metric, for the label of its axis; none if empty.
      floor: the score of a trivial predictor, drawn as a dashed line; None draws none.
      floor_name: the name of that predictor, for the legend.
      prefix: what the names of validation metrics begin with, as in
        :func:`jlstm.train.evaluate_every`.
      log_scale: whether the axis of the metric is logarithmic.

    Raises:
      ValueError: no record has a number for the metric.
      ImportError: matplotlib is not installed.

    Example:
      >>> import tempfile
      >>> records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
      >>> path = tempfile.mkdtemp() + "/loss.png"
      >>> jlstm.train.plot_metrics(records, path, unit="nats")
    """
    records = read_jsonl(source) if isinstance(source, str | os.PathLike) else source
    train, validation = _curve(records, metric), _curve(records, prefix + metric)
    if not train and not validation:
        names = sorted({name for record in records for name in record})
        raise ValueError(
            f"plot_metrics: no record has a number for {metric!r}; they have {names}"
        )
    figure = import_optional("matplotlib.figure").Figure(
        figsize=(6.4, 4.0), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#4477aa", lw=1.2, label="training")
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color="#cc6622",
            lw=1.6,
            marker="o" if len(validation) <= 40 else None,
            ms=3.5,
            label=prefix.strip("_ ") or "validation",
        )
    if floor is not None:
        label = f"{floor_name} ({floor:.4g})"
        axes.axhline(floor, color="#555555", ls="--", lw=1.0, label=label)
    name = metric.replace("_", " ")
    axes.set_xlabel("step")
    axes.set_ylabel(f"{name} ({unit})" if unit else name)
    if log_scale:
        axes.set_yscale("log")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curve(records: Records, name: str) -> list[tuple[float, float]]:
    points = [(record["step"], record.get(name)) for record in records]
    return [(step, value) for step, value in points if value is not None]
