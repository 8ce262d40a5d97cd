"""Real processes, killed and asked to end: nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("survivor.py")
STEPS = 120


def start(workdir, *options, **environment):
    command = [
        sys.executable, str(SCRIPT), "--workdir", str(workdir), "--num-steps",
        str(STEPS), *map(str, options),
    ]  # fmt: skip
    root = str(SCRIPT.parent.parent)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables | {"PYTHONPATH": root} | environment,
    )


def finish(process, timeout=120):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(finish(process)[1])
        time.sleep(0.005)


def saved(workdir):
    return list((workdir / "checkpoints").glob("step_*[0-9]"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, output = finish(start(workdir))
    assert code == 0, output
    return result(workdir)


def kill_and_resume(workdir, kills, rng, every=5):
    """Kills a run so often, each time after another checkpoint, and lets it end."""
    for _ in range(kills):
        process = start(workdir, "--checkpoint-every", every, "--slow-data", 0.01)
        before = len(saved(workdir)), newest(workdir)
        wait_for(lambda before=before: newest(workdir) > before[1], process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        code, output = finish(process)
        assert code == -signal.SIGKILL, output
    code, output = finish(start(workdir, "--checkpoint-every", every))
    assert code == 0, output
    return result(workdir)


def newest(workdir):
    return max((int(path.name[5:14]) for path in saved(workdir)), default=0)


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path, whole):
    found = kill_and_resume(tmp_path / "run", 1, random.Random(0))
    assert found["state_sha256"] == whole["state_sha256"]
    assert found["value"] == whole["value"]
    assert found["resumes"] == 1
    code, output = finish(start(tmp_path / "run"))
    assert code == 0
    assert "finished: " in output
    assert result(tmp_path / "run") == found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_kills_of_a_run(tmp_path, whole, seed):
    found = kill_and_resume(tmp_path / "run", 10, random.Random(seed), every=3)
    assert found["state_sha256"] == whole["state_sha256"]
    assert found["resumes"] == 10
    print(f"seed {seed}: 10 kills, {found['steps_replayed']} steps replayed, equal")


SIGNALLED = {
    "data": ("--slow-data", 30.0),
    "evaluation": ("--slow-eval", 60.0),
    "step": ("--slow-data", 0.005),
    "save": ("--checkpoint-every", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("data", signal.SIGTERM),
        ("evaluation", signal.SIGTERM),
        ("evaluation", signal.SIGINT),
        ("step", signal.SIGTERM),
        ("step", signal.SIGINT),
        ("save", signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_ends(tmp_path, whole, where, number):
    workdir = tmp_path / "run"
    process = start(workdir, *SIGNALLED[where])
    begun = workdir / "checkpoints" / "steps_begun"
    step = 20 if where in ("evaluation",) else 0

    def under_way():
        if where == "data":
            return begun.exists()
        return begun.exists() and int.from_bytes(begun.read_bytes(), "little") >= max(
            step, 3
        )

    wait_for(under_way, process)
    time.sleep(1.5 if where == "evaluation" else 0.3)
    asked = time.monotonic()
    process.send_signal(number)
    code, output = finish(process)
    took = time.monotonic() - asked
    assert code == 128 + number, output
    assert took < 10
    assert f"{signal.Signals(number).name}, " in output
    assert "saved in" in output
    print(f"{where}: {took:.2f} s; {output.strip().splitlines()[-2:]}")
    code, output = finish(start(workdir))
    assert code == 0, output
    assert result(workdir)["state_sha256"] == whole["state_sha256"]


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    # A step of seconds, in which the process is deaf to Python's handlers.
    process = start(
        tmp_path / "run", "--hidden-size", 3000, "--batch-size", 64, "--symbols", 20_000
    )
    begun = tmp_path / "run" / "checkpoints" / "steps_begun"
    wait_for(lambda: begun.exists() and any(begun.read_bytes()), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 143, output
    assert time.monotonic() - asked < 1
    assert "SIGTERM, in step 1, which compiles: the run will save and end" in output
    assert "SIGTERM again: ended without saving" in output


@pytest.mark.slow
def test_another_run_of_the_same_folder_is_kept_out(tmp_path):
    first = start(tmp_path / "run", "--slow-data", 30.0)
    begun = tmp_path / "run" / "checkpoints" / "steps_begun"
    wait_for(begun.exists, first)
    code, output = finish(start(tmp_path / "run", "--slow-data", 30.0))
    assert code == 2
    assert f"another run, of process {first.pid}, is at work in" in output
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_another_config_is_refused_with_what_differs(tmp_path):
    code, _ = finish(start(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "plots")
    code, output = finish(start(tmp_path / "run", "--seed", 3, "--batch-size", 2))
    assert code == 2
    assert "seed: was 0, is now 3; batch_size: was 4, is now 2" in output


@pytest.mark.slow
def test_a_disk_that_takes_no_more(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True).returncode

    if mount("size=400k"):
        pytest.skip("may not mount")
    options = ("--checkpoint-every", 10, "--keep", 40)
    try:
        # Full: what was saved before stays.
        code, output = finish(start(disk / "run", *options))
        assert code == 2, output
        last = output.strip().splitlines()[-1]
        assert "cannot be written" in last or "could not be saved" in last
        print(last)
        assert newest(disk / "run") >= 10
        # Read only.
        mount("remount,ro")
        code, output = finish(start(disk / "run", *options))
        assert code == 2, output
        print(output.strip().splitlines()[-1])
        # With room again it goes on.
        mount("remount,rw,size=20m")
        code, output = finish(start(disk / "run", *options))
        assert code == 0, output
        assert result(disk / "run")["resumes"] >= 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
