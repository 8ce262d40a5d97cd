"""One run over several processes: the same losses, ended and resumed together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_survival import finish, newest, result, start, wait_for

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(workdir, processes, devices, *options):
    """Starts processes that share the devices."""
    port = free_port()
    return [
        start(
            workdir, "--mesh", f"data={devices}", "--dropout", 0, "--coordinator",
            f"127.0.0.1:{port}", "--num-processes", processes, "--process-id", i,
            "--checkpoint-every", 10, *options,
        )
        for i in range(processes)
    ]  # fmt: skip


def lines(workdir):
    from jlstm import train

    return [record["loss"] for record in train.read_jsonl(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: with one device, and with four."""
    found = {}
    for devices in (1, 4):
        workdir = tmp_path_factory.mktemp("alone") / str(devices)
        code, output = finish(
            start(workdir, "--dropout", 0, "--mesh", f"data={devices}")
        )
        assert code == 0, output
        found[devices] = lines(workdir)
    np.testing.assert_allclose(found[1], found[4], rtol=2e-5)
    return found


def test_two_processes_take_the_same_steps(tmp_path, alone):
    outputs = [finish(p) for p in launch(tmp_path / "run", 2, 4)]
    assert [code for code, _ in outputs] == [0, 0], outputs
    np.testing.assert_allclose(lines(tmp_path / "run"), alone[4], rtol=2e-5)
    np.testing.assert_allclose(lines(tmp_path / "run"), alone[1], rtol=2e-5)


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_a_mesh_over_two_processes_computes_what_one_device_does(axes):
    """Dropout included: its masks do not depend on where rows are computed."""
    port, script = str(free_port()), Path(__file__).with_name("meshed.py")
    both = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(index), axes],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(script.parent.parent)},
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [output.splitlines()[-1] for output in outputs] == ["equal"] * 2, outputs


def test_a_signal_to_one_ends_both_at_the_same_step(tmp_path, alone):
    workdir = tmp_path / "run"
    both = launch(workdir, 2, 4, "--slow-data", 0.05)
    wait_for(lambda: newest(workdir) >= 10, both[0])
    both[1].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    outputs = [finish(process) for process in both]
    assert [code for code, _ in outputs] == [143, 143], outputs
    print(f"both ended {time.monotonic() - asked:.1f} s after the signal")
    ends = [output.partition("after step ")[2].split()[0] for _, output in outputs]
    assert ends[0] == ends[1] == str(newest(workdir))
    # The rest in one process of one device.
    code, output = finish(start(workdir, "--dropout", 0))
    assert code == 0, output
    assert result(workdir)["resumes"] == 1
    np.testing.assert_allclose(lines(workdir), alone[1], rtol=2e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_go_on_as_two(tmp_path, alone, number):
    workdir = tmp_path / "run"
    both = launch(workdir, 2, 4, "--slow-data", 0.05)
    wait_for(lambda: newest(workdir) >= 10, both[0])
    for process in both:
        process.send_signal(number)
    outputs = [finish(process) for process in both]
    assert [code for code, _ in outputs] == [143, 143], outputs
    outputs = [finish(process) for process in launch(workdir, 2, 4)]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert result(workdir)["resumes"] == 1
    np.testing.assert_allclose(lines(workdir), alone[4], rtol=2e-5)


def test_what_fails_in_the_first_process_ends_both(tmp_path, alone):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("else")
    began = time.monotonic()
    outputs = [finish(process) for process in launch(tmp_path / "run", 2, 4)]
    assert [code for code, _ in outputs] == [2, 2], outputs
    assert time.monotonic() - began < 60
    assert "is not empty, but holds no run" in outputs[0][1]
    assert "process 0 could not begin" in outputs[1][1]


def test_a_run_goes_on_when_a_process_was_killed(tmp_path, alone):
    workdir = tmp_path / "run"
    both = launch(workdir, 2, 4, "--slow-data", 0.02)
    wait_for(lambda: newest(workdir) >= 20, both[0])
    both[1].kill()
    outputs = [finish(process, timeout=200) for process in both]
    assert outputs[0][0] != 0
    assert not (workdir / "result.json").exists()
    code, output = finish(start(workdir, "--dropout", 0, "--mesh", "data=2"))
    assert code == 0, output
    assert result(workdir)["resumes"] == 1
    np.testing.assert_allclose(lines(workdir), alone[1], rtol=2e-5)
