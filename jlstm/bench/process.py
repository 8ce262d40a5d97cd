"""The options of a benchmark, its environment, and the processes that it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import jlstm
from jlstm.bench.cases import PEERS, VARIANTS, Size

PATIENCE = 900.0  # seconds in which a worker must answer
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # XLA's threads keep blocks only in the main arena
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
PACKAGES = (
    *("jlstm", "jax", "jaxlib", "flax", "numpy", "optax"),
    *("torch", "dm-haiku", "equinox", "keras"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of ``python -m jlstm bench``; lists of names are separated by commas."""

    suite: str = "lstm-train"
    """Suites to run, or all."""
    variants: str = ",".join(VARIANTS)
    """Loops of jlstm: scan (plain), xla (fused, without C++), one (fused), two (fused,
    on two virtual devices), native, checkpoint (the default, with less memory)."""
    peers: str = ",".join(PEERS)
    """Other libraries to compare with; those that are not installed are left out."""
    sizes: tuple[str, ...] = ()
    """Sizes T,B,D,H (steps, rows, input features, hidden units); by default those of
    the suite."""
    rounds: int = 7
    """Rounds, in each of which every library is measured once; an odd number."""
    seconds: float = 0.3
    """Least time of one measurement, in seconds."""
    threads: int = 2
    """Threads of each library."""
    malloc: Literal["default", "big"] = "default"
    """Settings of glibc's malloc, for all libraries; big keeps large freed blocks."""
    out: Path | None = None
    """Folder for bench.json and bench.png; other suites in bench.json are kept."""
    summary: bool = False
    """Print the ratios of the results in --out, and time nothing."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process that compiles one case and measures it when asked."""

    process: subprocess.Popen[str]
    errors: IO[str]

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, name: str, suite: str, size: Size, config: Config
    ) -> Iterator[Worker]:
        """Starts the process, and ends it afterwards."""
        order = {
            "suite": suite,
            "worker": name,
            "size": size,
            "seconds": config.seconds,
            "threads": config.threads,
        }
        command = [sys.executable, "-m", "jlstm.bench.worker", json.dumps(order)]
        pipe, environment = subprocess.PIPE, worker_environment(config)
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, env=environment,
                text=True,
            ) as process,
        ):  # fmt: skip
            try:
                yield cls(process, errors)
            finally:
                process.kill()

    def ask(self, word: str = "") -> dict[str, Any]:
        """Sends a word, if any; returns the answer, or the reason why there is none."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        if word:
            with contextlib.suppress(BrokenPipeError):
                print(word, file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            return {"error": f"no answer in {PATIENCE:.0f} s"}
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        return {"error": _reason(self.errors.read(), process.wait())}


def _reason(errors: str, code: int) -> str:
    """Finds the exception in what a process wrote before it ended."""
    lines = [line for line in errors.splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if line.partition(":")[0].endswith("Error")]
    last = (named or lines or ["no message"])[-1]
    return f"exit code {code}, {last[:200]}"


def worker_environment(config: Config) -> dict[str, str]:
    """Makes the environment of all workers, the same for every library."""
    threads = str(config.threads)
    # XLA's CPU client reads NPROC. Compiled programs must not come from a cache.
    own = {"OMP_NUM_THREADS": threads, "NPROC": threads, "KERAS_BACKEND": "jax"}
    own["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    here = str(Path(__file__).parents[2])
    path = filter(None, [here, os.environ.get("PYTHONPATH")])
    own["PYTHONPATH"] = os.pathsep.join(path)
    return {**os.environ, **own, **(MALLOC if config.malloc == "big" else {})}


def environment(config: Config | None = None) -> dict[str, Any]:
    """Collects what times depend on: versions, processor, load, options."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    names = ("XLA_FLAGS", "JAX_PLATFORMS", *MALLOC)
    options = {} if config is None else dataclasses.asdict(config)
    return {
        "versions": {**versions, "jlstm": jlstm.__version__},
        "cpu": _cpu(),
        "cores": _cores(),
        "load": os.getloadavg()[0],
        "variables": {n: os.environ[n] for n in names if n in os.environ},
        "options": {k: v for k, v in options.items() if k not in ("out", "suite")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
