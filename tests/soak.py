"""An hour of training at a small size: memory stays flat, files stay few.

::

    python tests/soak.py --minutes 60

starts ``survivor.py``, samples its memory and its files, and ends it by SIGTERM. It
fails if files become more in the second half, or if memory does, by more than what
TensorStore, by which Orbax writes, leaves behind with each checkpoint: what it returns
as JSON is never freed, 13 KiB a save and half a KiB an array in version 0.1.86.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY = 250  # steps between two checkpoints
LEFT_BEHIND = 64  # KiB with each, at most
SCRIPT = Path(__file__).with_name("survivor.py")


def resident(pid: int) -> float:
    """Reads the resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [
            sys.executable, str(SCRIPT), "--workdir", str(workdir), "--num-steps",
            "10000000", "--checkpoint-every", str(EVERY), "--slow-data", "0.5",
            "--log-every", "50",
        ]  # fmt: skip
        path = str(SCRIPT.parent.parent)
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        samples, end = [], time.monotonic() + 60 * minutes
        while time.monotonic() < end and process.poll() is None:
            time.sleep(min(10, 6 * minutes))
            files = sum(1 for p in workdir.rglob("*") if p.is_file())
            samples.append((resident(process.pid), files))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        steps = int.from_bytes(
            (workdir / "checkpoints/steps_begun").read_bytes(), "little"
        )
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
    half = samples[len(samples) // 2 :]
    first, second = half[: len(half) // 2], half[len(half) // 2 :]
    before, after = (statistics.median(m for m, _ in part) for part in (first, second))
    tenth = max(len(samples) // 10, 1)
    course = [
        statistics.median(m for m, _ in samples[i : i + tenth])
        for i in range(0, len(samples), tenth)
    ]
    print("MiB over time:", " ".join(f"{m:.1f}" for m in course))
    most = [max(files for _, files in part) for part in (first, second)]
    saves = steps // EVERY
    # From the middle of the third quarter to that of the last.
    rate = (after - before) * 1024 / (saves / 4)
    print(
        f"{steps:,} steps, {saves} checkpoints, {len(lines):,} lines of metrics "
        f"(the last of step {last['step']:,}), exit code {code}; "
        f"memory {before:.1f} MiB in the third quarter, {after:.1f} in the last, "
        f"{rate:.0f} KiB a checkpoint; "
        f"at most {most[0]} files, then {most[1]}"
    )
    flat = rate <= LEFT_BEHIND and most[1] <= most[0] + 1
    return 0 if flat and code == 143 else 1


if __name__ == "__main__":
    sys.exit(main())
