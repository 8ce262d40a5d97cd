"""Turns the times of rounds into ratios, tables and a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlstm.bench.cases import JAX_PEERS, SUITES, VARIANTS, Size, Suite
from jlstm.extras import import_optional

ABOUT = """Times jlstm beside other libraries, each in a process of its own, in rounds
that take turns. Ratios are medians over rounds; above 1, jlstm is faster."""


def read(path: Path) -> dict[str, Any]:
    """Reads ``bench.json``, or begins a new one.

    Raises:
      ValueError: the file holds something else.
    """
    if not path.exists():
        return {"suites": {}}
    try:
        results = json.loads(path.read_text())
        results["suites"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--out: {path} is not a result of this command") from None
    return results


def merge(results: Mapping[str, Any], suite: str, entry: Any) -> dict[str, Any]:
    """Replaces the results of one suite, and keeps the others."""
    return {**results, "suites": {**results["suites"], suite: entry}}


def times(workers: Mapping[str, Any], name: str) -> list[float] | None:
    """Returns the times of a worker in milliseconds, by round, or ``None``."""
    rounds = workers.get(name, {}).get("rounds")
    return [times["call"] for times in rounds] if rounds else None


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Divides round by round, and returns the median; above 1, ours is faster."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    """Averages ratios by their geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def best_jax(workers: Mapping[str, Any]) -> str | None:
    """Names the JAX library with the least median time, if there is one."""
    medians = {
        name: statistics.median(found)
        for name in JAX_PEERS
        if (found := times(workers, name))
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


def versus(workers: Mapping[str, Any], variant: str, reference: str) -> float | None:
    """Returns how many times faster a variant is than a reference."""
    name = best_jax(workers) if reference == "jax" else reference
    theirs, ours = times(workers, name or ""), times(workers, variant)
    return ratio(theirs, ours) if theirs and ours else None


def table(name: str, entry: Mapping[str, Any]) -> str:
    """Writes a suite as a Markdown table, with notes on what went wrong."""
    suite = SUITES[name]
    cases = [(Size(*case["size"]), case["workers"]) for case in entry["cases"]]
    seen = {
        worker for _, workers in cases for worker in workers if times(workers, worker)
    }
    seen |= {w for _, found in cases for w in found if "error" in found[w]}
    variants = [v for v in VARIANTS if v in seen]
    head, references = ["T,B,D,H"], []
    for reference in suite.references:
        if reference == "jax" and seen & set(JAX_PEERS):
            head.append("best other JAX, ms")
            references.append(reference)
        elif reference in seen:
            if reference not in variants:
                head.append(f"{reference}, ms")
            references.append(reference)
    for variant in variants:
        head.append(f"{variant}, ms")
        head += [f"vs {_title(r)}" for r in references if r != variant]

    rows, ratios = [], {}
    for size, workers in cases:
        row = [str(size)]
        for reference in references:
            if reference == "jax":
                best = best_jax(workers)
                row.append(f"{_ms(workers, best)} {best}" if best else "-")
            elif reference not in variants:
                row.append(_ms(workers, reference))
        for variant in variants:
            row.append(_ms(workers, variant))
            for reference in (r for r in references if r != variant):
                value = versus(workers, variant, reference)
                row.append("-" if value is None else f"{value:.2f}")
                if value is not None:
                    ratios.setdefault(len(row) - 1, []).append(value)
        rows.append(row)
    if len(rows) > 1:
        means = {i: f"{geometric_mean(found):.2f}" for i, found in ratios.items()}
        cells = [means.get(i, "") for i in range(1, len(head))]
        rows.append(["geometric mean", *cells])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([f"**{name}**: {suite.about}", "", text, *_notes(suite, cases)])


TITLES = {
    "scan": "plain scan",
    "xla": "fused by XLA alone",
    "one": "fused",
    "two": "fused, two virtual devices",
    "native": "native",
}
REFERENCES = {
    "torch": "PyTorch",
    "jax": "the fastest of Flax, Haiku, Equinox and Keras on JAX",
    "scan": "its own plain scan",
}


def summary(results: Mapping[str, Any]) -> str:
    """Writes how many times faster each loop is, as a Markdown table.

    A row is a suite and what it is compared with. Ratios are geometric means over the
    sizes of the suite.
    """
    lines = [["", *TITLES.values()], ["---", *["---:"] * len(TITLES)]]
    suites = {name: SUITES[name] for name in SUITES if name in results["suites"]}
    for name, suite in suites.items():
        if suite.compile_only or suite.shows_memory:
            continue
        found = [case["workers"] for case in results["suites"][name]["cases"]]
        for reference in suite.references:
            ratios = {
                variant: [versus(workers, variant, reference) for workers in found]
                for variant in TITLES
            }
            cells = [_mean(ratios[variant]) for variant in TITLES]
            if any(cells):
                lines.append(
                    [f"{suite.about}, against {REFERENCES[reference]}", *cells]
                )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(ratios: Sequence[float | None]) -> str:
    found = [ratio for ratio in ratios if ratio is not None]
    # A mean over some of the sizes cannot be compared with one over all.
    return f"{geometric_mean(found):.2f}" if len(found) == len(ratios) else ""


def _title(reference: str) -> str:
    return "best JAX" if reference == "jax" else reference


def _ms(workers: Mapping[str, Any], name: str) -> str:
    found = times(workers, name)
    if found is None:
        return "died" if "error" in workers.get(name, {}) else "-"
    text = f"{statistics.median(found):.3g}"
    if "e" in text:
        text = f"{statistics.median(found):.0f}"
    return text


def _notes(suite: Suite, cases: Sequence[tuple[Size, Mapping[str, Any]]]) -> list[str]:
    """Writes a line for everything that has no column in the table."""
    notes: dict[str, None] = {}
    for size, workers in cases:
        for name, result in workers.items():
            if "refused" in result:
                notes[f"{name}: {result['refused']}"] = None
            elif "error" in result:
                notes[f"{name} at {size} died: {result['error']}"] = None
            else:
                notes |= dict.fromkeys(_details(suite, name, size, result))
    return ["", *(f"- {note}" for note in notes)] if notes else []


def _details(
    suite: Suite, name: str, size: Size, result: Mapping[str, Any]
) -> list[str]:
    rounds, facts = result["rounds"], result["facts"]
    medians = {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
    whole, details = medians.pop("call"), []
    if "tokens" in facts:
        details.append(f"{facts['tokens'] / whole * 1e3:,.0f} tokens/s")
    details += [f"{part} {ms:.3g} ms alone" for part, ms in medians.items()]
    if suite.shows_memory and "temp_bytes" in facts:
        details.append(f"{facts['temp_bytes'] / 2**20:,.0f} MiB of temporary memory")
    return [f"{name} at {size}: {', '.join(details)}"] if details else []


# Strong colours for jlstm, pale ones for others.
COLOURS = {
    "scan": "#88ccee",
    "xla": "#ddcc77",
    "one": "#4477aa",
    "two": "#cc3311",
    "native": "#aa3377",
}
MARKERS: dict[str, str] = dict(zip(JAX_PEERS, "ovsP^Xd*", strict=True))


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws speeds relative to PyTorch: a panel for each suite, a row for each size."""
    suites = {
        name: entry["cases"]
        for name, entry in results["suites"].items()
        if any(times(case["workers"], "torch") for case in entry["cases"])
        and len(entry["cases"]) > 1
    }
    if not suites:
        return
    figures = import_optional("matplotlib.figure")
    ticker = import_optional("matplotlib.ticker")
    heights = [len(cases) + 1.2 for cases in suites.values()]
    figure = figures.Figure(
        figsize=(8, 0.34 * sum(heights) + 1.2), dpi=160, layout="constrained"
    )
    panels = figure.subplots(
        len(suites), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]
    labels: dict[str, Any] = {}
    for axes, (name, cases) in zip(panels, suites.items(), strict=True):
        for row, case in enumerate(cases):
            _draw_row(axes, row, case["workers"], labels)
        axes.axvline(1, color="#222222", lw=1)
        axes.set_yticks(range(len(cases)), [str(Size(*c["size"])) for c in cases])
        axes.set_ylim(len(cases) - 0.4, -0.6)
        axes.set_title(SUITES[name].about, loc="left", fontsize=9, weight="bold")
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", which="both", alpha=0.3, lw=0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel(
        "speed relative to PyTorch = 1 (right is faster); rows are T,B,D,H", fontsize=8
    )
    figure.legend(
        labels.values(), labels, loc="outside upper center", ncols=6, fontsize=8,
        frameon=False,
    )  # fmt: skip
    figure.savefig(path)


def _draw_row(
    axes: Any, row: int, workers: Mapping[str, Any], labels: dict[str, Any]
) -> None:
    for name in (*JAX_PEERS, *COLOURS):
        value = versus(workers, name, "torch")
        if value is None:
            continue
        own = name in COLOURS
        style = {"marker": "o", "s": 52, "color": COLOURS[name]} if own else {
            "marker": MARKERS[name], "s": 22, "color": "#999999"
        }  # fmt: skip
        label = f"jlstm {name}" if own else name
        labels[label] = axes.scatter(value, row, zorder=3 if own else 2, **style)
