"""Measures what ``import jlstm`` costs beyond its core dependencies.

python tests/import_time.py

Fresh processes, the two imports in turn; prints the medians and their difference.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

BASE = "import time; t = time.perf_counter(); import jax, flax.struct, optax; "
IMPORTS = {
    "jax, flax.struct, optax": BASE,
    "jlstm besides": BASE + "t = time.perf_counter(); import jlstm; ",
}
ROUNDS = 9


def seconds(code: str) -> float:
    """Runs an import in a new process, and returns what it printed of its time."""
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Prints a line an import."""
    times = {name: [] for name in IMPORTS}
    for _ in range(ROUNDS):
        for name, code in IMPORTS.items():
            times[name].append(seconds(code))
    for name, values in times.items():
        median, worst = statistics.median(values), max(values)
        print(f"{name}: median {median:.3f} s, worst {worst:.3f} s of {ROUNDS}")


if __name__ == "__main__":
    main()
