"""The command: starts a process for each library, and measures them in turn.

All processes run on the same cores. Ratios are taken within each round, so that a slow
minute of the machine affects all libraries alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from jlstm.bench import peers, report
from jlstm.bench.cases import PEERS, SUITES, VARIANTS, Size
from jlstm.bench.process import Config, Worker, environment
from jlstm.extras import import_optional
from jlstm.train.files import write_json


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config whose names and numbers were checked."""

    suites: dict[str, tuple[Size, ...]]
    workers: tuple[str, ...]
    absent: tuple[str, ...]


def main(argv: Sequence[str]) -> None:
    """Runs the command line; bad options print one line and exit with code 2."""
    try:
        tyro = import_optional("tyro")
        config = tyro.cli(
            Config, args=argv, prog="python -m jlstm bench", description=report.ABOUT
        )
        run(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def make_plan(config: Config) -> Plan:
    """Checks a config, and finds which peers are installed.

    Raises:
      ValueError: an unknown name, a bad size, or a number out of range.
    """
    suites = _names("suite", config.suite, ("all", *SUITES))
    chosen = tuple(SUITES) if "all" in suites else suites
    variants = _names("variants", config.variants, VARIANTS)
    wanted = _names("peers", config.peers, PEERS)
    for name, least in (("rounds", 1), ("threads", 1), ("seconds", 0)):
        if getattr(config, name) < least:
            raise ValueError(
                f"--{name}: must be at least {least}, got {getattr(config, name)}"
            )
    sizes = tuple(map(Size.parse, config.sizes))
    for name in chosen:
        if sizes and not SUITES[name].resizable:
            raise ValueError(f"--sizes: {name} has a fixed size; leave the option out")
    workers = variants + tuple(filter(peers.installed, wanted))
    for name in chosen:
        if not {*SUITES[name].variants, *SUITES[name].peers} & set(workers):
            raise ValueError(
                f"--variants, --peers: must name some that take part in {name}, got "
                "none"
            )
    return Plan(
        suites={name: sizes or SUITES[name].sizes for name in chosen},
        workers=workers,
        absent=tuple(peer for peer in wanted if not peers.installed(peer)),
    )


def _names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part))
    for name in names:
        if name not in known:
            raise ValueError(
                f"--{option}: must be among {', '.join(known)}, got {name!r}"
            )
    return names


def run(config: Config) -> dict[str, Any]:
    """Measures the suites of a config.

    It prints a table for each suite and, with ``out``, writes ``bench.json`` and
    ``bench.png``.

    Returns:
      The content of ``bench.json``.
    """
    plan = make_plan(config)
    file = None if config.out is None else config.out / "bench.json"
    results: dict[str, Any] = report.read(file) if file else {"suites": {}}
    if config.summary:
        if not results["suites"]:
            raise ValueError(f"--summary: needs --out with results, got {config.out}")
        print(report.summary(results))
        return results
    if plan.absent:
        print(f"not installed: {', '.join(plan.absent)}", flush=True)
    load = environment()["load"]
    if load > 0.5:
        print(f"other programs load this machine ({load:.1f}): the times will mislead")
    start, done = time.perf_counter(), 0
    total = sum(map(len, plan.suites.values()))
    for name, sizes in plan.suites.items():
        before, cases = environment(config), []
        for size in sizes:
            spent = time.perf_counter() - start
            left = f", {spent / done * (total - done):.0f} s left" if done else ""
            print(f"[{done + 1}/{total}] {name} {size}{left}", flush=True)
            names = [w for w in plan.workers if SUITES[name].takes(w, size)]
            measure = _compile_times if SUITES[name].compile_only else _measure
            cases.append(
                {"size": list(size), "workers": measure(name, size, names, config)}
            )
            done += 1
        entry = {"environment": before, "cases": cases}
        results = report.merge(results, name, entry)
        print(f"\n{report.table(name, entry)}\n", flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
    if file is not None:
        report.plot(results, file.with_suffix(".png"))
    return results


def _measure(
    suite: str, size: Size, names: Sequence[str], config: Config
) -> dict[str, Any]:
    """Starts all workers of a case one after another, then measures them in turn."""
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            worker = stack.enter_context(Worker.start(name, suite, size, config))
            results[name] = worker.ask()
            if "facts" in results[name]:
                workers[name] = worker
                results[name]["rounds"] = []
        for _ in range(config.rounds):
            for name, worker in list(workers.items()):
                answer = worker.ask("go")
                if "error" in answer:
                    del workers[name]
                    results[name] = answer
                else:
                    results[name]["rounds"].append(answer)
    return results


def _compile_times(
    suite: str, size: Size, names: Sequence[str], config: Config
) -> dict[str, Any]:
    """Starts each worker once a round, and takes the time that it needs to compile."""
    results: dict[str, Any] = {}
    for _ in range(config.rounds):
        for name in names:
            if "rounds" not in results.get(name, {"rounds": []}):
                continue
            with Worker.start(name, suite, size, config) as worker:
                answer = worker.ask()
            if "facts" not in answer:
                results[name] = answer
                continue
            result = results.setdefault(name, {**answer, "rounds": []})
            result["rounds"].append({"call": answer["facts"]["compile_s"] * 1e3})
    return results
