"""Makes tables from the result files of experiments and benchmarks.

    python experiments/report.py --collect runs/*   # copies finished runs to results/
    python experiments/report.py --write            # writes the tables of both READMEs

A file in `results/` holds the `result.json`, `config.json` and `env.json` of one run.
Its name consists of the experiment, the preset, the data if any, and the seed if it is
not 0. Runs that differ only in their seed make one row, with mean and deviation. A
README holds a table between `<!-- NAME -->` and `<!-- end of NAME -->`, where NAME is a
key of `TABLES`.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlstm.bench import report

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PAGES = (FOLDER / "README.md", FOLDER.parent / "README.md")
HEAD = (
    "| script | score | beside it | time |\n"
    "|---|---|---|---|\n"
)  # fmt: skip
Run = dict[str, Any]


def name_of(run: Run) -> str:
    """The name of a run's file, less its seed."""
    result, data = run["result"], run["config"].get("data")
    parts = [
        result["experiment"],
        result["preset"],
        *([Path(data).stem] if data else []),
    ]
    return "-".join(parts)


def collect(workdirs: Sequence[Path]) -> None:
    """Copies what runs left into `results/`.

    Raises:
      SystemExit: a run has not ended.
    """
    for workdir in workdirs:
        if not (workdir / "result.json").exists():
            raise SystemExit(
                f"--collect: {workdir} has no result.json, it has not ended"
            )
        files = {"result": "result", "config": "config", "environment": "env"}
        run = {
            key: json.loads((workdir / f"{file}.json").read_text(encoding="utf-8"))
            for key, file in files.items()
        }
        if run["config"].get("data"):
            run["config"]["data"] = Path(run["config"]["data"]).name
        seed = run["result"]["seed"]
        path = RESULTS / f"{name_of(run)}{f'-seed{seed}' if seed else ''}.json"
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        print(path)


def read() -> dict[str, list[Run]]:
    """The runs in `results/`, those that differ in their seed alone together."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "result" in run:
            runs.setdefault(name_of(run), []).append(run)
    return runs


def row(runs: Sequence[Run]) -> str:
    """One line of the table."""
    result, config = runs[0]["result"], runs[0]["config"]
    script = FOLDER / f"{result['experiment']}.py"
    doc = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    command = f"`{script.name} --preset {result['preset']}`"
    task = doc.partition("\n")[0].rstrip(".")
    if data := config.get("data"):
        command = f"{command[:-1]} --data {data}`"
    score = over_seeds([run["result"]["value"] for run in runs], result)
    score += f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    beats = all(run["result"]["beats_floor"] for run in runs)
    score = f"**{score}** {result['metric']}" + ("" if beats else " (**not better**)")
    floors = statistics.fmean(run["result"]["floor"] for run in runs)
    floor = f"floor {number(floors, result)}: {result['floor_name']}"
    beside = [floor] + [
        f"{over_seeds([run['result']['others'][name] for run in runs], result)}: {name}"
        for name in result["others"]
    ]
    time = duration(statistics.fmean(run["result"]["seconds"] for run in runs))
    first = f"{task}<br>{command}"
    return f"| {first} | {score} | {'<br>'.join(beside)} | {time} |\n"


def over_seeds(values: Sequence[float], result: Run) -> str:
    """Writes a score, of several seeds as mean and deviation."""
    text = number(statistics.fmean(values), result)
    if len(values) < 2:
        return text
    deviation = statistics.stdev(values)
    if "accuracy" in result["metric"]:
        return f"{text.removesuffix(' %')} ± {100 * deviation:.2f} %"
    return f"{text} ± {deviation:.2g}"


def number(value: float, result: Run) -> str:
    """Writes a score with four figures, an accuracy as a percentage."""
    if "accuracy" in result["metric"]:
        return f"{100 * value:.2f} %"
    return f"{value:#.4g}" if 1e-3 < abs(value) < 1e4 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Writes a time as it is said."""
    text = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def table() -> str:
    """The table of experiments."""
    return HEAD + "".join(map(row, read().values()))


def speed() -> dict[str, Any]:
    """What `python -m jlstm bench` measured."""
    return report.read(RESULTS / "bench.json")


def speed_summary() -> str:
    """Speeds of all loops against other libraries."""
    return report.summary(speed())


def speed_tables() -> str:
    """Times by size, a table a suite."""
    tables = [report.table(name, entry) for name, entry in speed()["suites"].items()]
    return "\n\n".join(tables)


def speed_figure(path: Path) -> None:
    """Draws the speeds by size."""
    report.plot(speed(), path)


def speed_settings() -> str:
    """Where and with what the speeds were measured."""
    found = next(iter(speed()["suites"].values()))["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    cores = len(found["cores"])
    return f"{found['cpu']}, {cores} cores, {found['date'][:10]}; {versions}."


GLANCE = {
    ("lstm-train", "torch"): ("PyTorch", "gradients of an LSTM layer"),
    ("lstm-train", "jax"): (
        "the fastest of Flax, Haiku, Equinox and Keras on JAX",
        "gradients of an LSTM layer",
    ),
    ("bilstm-ragged", "torch"): (
        "PyTorch on packed sequences",
        "gradients of two BiLSTM layers over rows of unequal length",
    ),
    ("mgu", "scan"): ("a plain scan", "gradients of a cell that a user wrote"),
}
TIMES = "\N{MULTIPLICATION SIGN}"


def headlines() -> list[tuple[str, str, str]]:
    """What runs by default against others: a ratio, the other, and what was timed.

    Ratios are geometric means over sizes.
    """
    found = []
    for (suite, reference), words in GLANCE.items():
        cases = [case["workers"] for case in speed()["suites"][suite]["cases"]]
        for variant in ("native", "one"):  # the default: native where there is one
            ratios = [report.versus(case, variant, reference) for case in cases]
            timed = [ratio for ratio in ratios if ratio is not None]
            if len(timed) == len(cases):
                break
        found.append((f"{report.geometric_mean(timed):.1f} {TIMES}", *words))
    return found


def glance() -> str:
    """The speeds of the front page."""
    lines = ["::::{grid} 2 2 4 4", ":gutter: 2", ""]
    for ratio, other, what in headlines():
        lines += [":::{grid-item-card}", ":class-card: glance", ""]
        lines += [f"**{ratio}**", "", f"as fast as {other}: {what}", ":::", ""]
    return "\n".join([*lines, "::::"])


def speed_lines() -> str:
    """The same as a table."""
    rows = [f"| {what} | {ratio} | {other} |\n" for ratio, other, what in headlines()]
    return "".join(["| | as fast as | |\n|---|---:|---|\n", *rows])


TABLES = {"experiments": table, "speed": speed_lines}


def filled(text: str) -> str:
    """A page with its tables as they should be."""
    for name, make in TABLES.items():
        between = rf"(?<=<!-- {name} -->\n).*(?=<!-- end of {name} -->)"
        text = re.sub(between, lambda _, make=make: make(), text, flags=re.DOTALL)
    return text


def main() -> None:
    """Prints the table, or does what it is told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--collect", nargs="+", type=Path, metavar="WORKDIR", default=[]
    )
    parser.add_argument("--write", action="store_true", help="into the READMEs")
    options = parser.parse_args()
    collect(options.collect)
    if options.write:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    elif not options.collect:
        print(table(), end="")


if __name__ == "__main__":
    main()
