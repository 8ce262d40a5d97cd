"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

import numpy as np
import pytest

from jlstm import doctor
from jlstm.__main__ import main


def run(tmp_path, capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--dir", str(tmp_path / "new"), *options])
    return stop.value.code, capsys.readouterr().out


def test_all_is_well_here(tmp_path, capsys):
    code, printed = run(tmp_path, capsys, "--no-processes")
    assert code == 0, printed
    assert len(printed.splitlines()) == len(doctor.CHECKS)
    assert "loop equals NumPy up to" in printed
    assert "a flipped bit noticed" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_meet(tmp_path, capsys):
    code, printed = run(tmp_path, capsys)
    assert code == 0, printed
    assert "ok   processes: two of this machine added their numbers" in printed


def test_failures_have_a_line_and_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(doctor.LEAST, "optax", "99.0")
    monkeypatch.setattr(doctor, "ROOM", 1 << 60)
    (tmp_path / "new").write_text("a file")
    code, printed = run(tmp_path, capsys, "--no-processes")
    assert code == 1
    assert "FAIL versions: optax is " in printed
    assert 'run pip install --upgrade "optax>=99.0"' in printed
    assert f"FAIL disk: {tmp_path / 'new'} is not a folder" in printed
    assert "FAIL checkpoint: " in printed
    assert "cannot be written" in printed
    (tmp_path / "new").unlink()
    _, printed = run(tmp_path, capsys, "--no-processes")
    assert "FAIL disk: " in printed
    assert "GiB are free" in printed


def test_the_oracle_of_the_doctor_has_the_gradient_of_finite_differences():
    rng = np.random.default_rng(0)
    weights = {
        "w_ih": rng.normal(size=(2, 12)),
        "w_hh": rng.normal(size=(3, 12)),
        "b": rng.normal(size=12),
    }
    xs, goal = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 3))
    lengths = np.array([4, 0, 2])

    def loss(weights):
        return float((doctor.lstm(weights, xs, lengths, goal)[0] * goal).sum())

    _, grads = doctor.lstm(weights, xs, lengths, goal)
    for name, weight in weights.items():
        direction = rng.normal(size=weight.shape)
        ends = [
            loss(weights | {name: weight + sign * 1e-5 * direction}) for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / 2e-5, (grads[name] * direction).sum(), rtol=1e-6
        )


def test_a_wrong_lstm_is_noticed(tmp_path, capsys, monkeypatch):
    right = doctor.lstm

    def wrong(weights, *others):
        return right(weights | {"b": weights["b"] + 0.01}, *others)

    monkeypatch.setattr(doctor, "lstm", wrong)
    code, printed = run(tmp_path, capsys, "--no-processes")
    assert code == 1
    assert "FAIL lstm: an LSTM differs from NumPy by" in printed
