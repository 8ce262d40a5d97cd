"""The speed harness measures in processes, divides rightly, and says what is wrong."""

from __future__ import annotations

import json
import re

import pytest

from jlstm.__main__ import main
from jlstm.bench import process, report, run
from jlstm.bench.cases import SUITES, Size

TINY = ("3,2,2,2",)


def rounds(*milliseconds):
    return {"facts": {}, "rounds": [{"call": ms} for ms in milliseconds]}


def entry(*workers):
    cases = [
        {"size": [100, 32, 128, 128 + i], "workers": w} for i, w in enumerate(workers)
    ]
    return {"environment": {}, "cases": cases}


def test_run_writes_times_of_processes_of_its_own(tmp_path, capsys):
    options = {
        "suite": "mgu",
        "variants": "one,native",
        "peers": "",
        "sizes": TINY,
        "out": tmp_path,
    }
    run.run(process.Config(**options, rounds=1, seconds=0.0))

    results = json.loads((tmp_path / "bench.json").read_text())
    suite = results["suites"]["mgu"]
    assert suite["environment"]["options"]["rounds"] == 1
    assert {"versions", "cpu", "cores", "variables", "date"} <= set(
        suite["environment"]
    )
    (case,) = suite["cases"]
    assert case["size"] == [3, 2, 2, 2]
    assert case["workers"]["one"]["facts"]["compile_s"] > 0
    assert [set(times) for times in case["workers"]["one"]["rounds"]] == [{"call"}]
    assert "native" in case["workers"]["native"]["refused"]
    printed = capsys.readouterr().out
    assert "| T,B,D,H | one, ms |\n" in printed
    assert "- native: native: has loops only for LSTM and GRU" in printed


def test_worker_that_dies_answers_with_its_reason():
    reason = process._reason("Traceback\n  File x\nValueError: no\n\nhint\n", 1)
    assert reason == "exit code 1, ValueError: no"
    dead = {"torch": {"error": reason}, "one": rounds(1.0)}
    text = report.table("lstm-train", entry(dead))
    assert "| 100,32,128,128 | died | 1 | - |" in text
    assert "- torch at 100,32,128,128 died: exit code 1, ValueError: no" in text


def test_ratio_is_the_median_over_rounds():
    # The rounds say 3, 1 and 2; the quotient of the medians would be 3.
    assert report.ratio([30.0, 10.0, 80.0], [10.0, 10.0, 40.0]) == 2.0
    # A slow minute that meets both sides changes nothing.
    assert report.ratio([2.0, 2.0, 200.0], [1.0, 1.0, 100.0]) == 2.0


def test_table_divides_by_torch_and_by_the_best_of_each_size():
    first = {
        "torch": rounds(2.0, 2.0, 2.0),
        "nnx": rounds(8.0, 8.0, 8.0),
        "linen": rounds(6.0, 6.0, 6.0),
        "one": rounds(4.0, 4.0, 4.0),
    }
    second = {
        "torch": rounds(8.0, 8.0, 8.0),
        "nnx": rounds(3.0, 3.0, 3.0),
        "linen": rounds(9.0, 9.0, 9.0),
        "one": rounds(1.0, 1.0, 1.0),
    }
    lines = report.table("lstm-train", entry(first, second)).splitlines()
    head = "T,B,D,H | torch, ms | best other JAX, ms | one, ms | vs torch | vs best JAX"
    assert lines[2:] == [
        f"| {head} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 100,32,128,128 | 2 | 6 linen | 4 | 0.50 | 1.50 |",
        "| 100,32,128,129 | 8 | 3 nnx | 1 | 8.00 | 3.00 |",
        "| geometric mean |  |  |  | 2.00 | 2.12 |",
    ]


def test_summary_has_means_over_all_sizes(tmp_path, capsys):
    first = {"torch": rounds(8.0), "scan": rounds(4.0), "one": rounds(2.0)}
    second = {"torch": rounds(2.0), "one": rounds(1.0), "native": rounds(1.0)}
    results = report.merge({"suites": {}}, "lstm-train", entry(first, second))
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(results))
    main(["bench", "--summary", "--out", str(tmp_path)])
    about = SUITES["lstm-train"].about
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row == f"| {about}, against PyTorch |  |  | 2.83 |  |  |"
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--summary"])
    assert "--summary: needs --out with results" in capsys.readouterr().err


def test_plot_draws_suites_that_have_torch(tmp_path):
    both = {"torch": rounds(2.0), "nnx": rounds(8.0), "one": rounds(4.0)}
    results = report.merge({"suites": {}}, "lstm-train", entry(both, both))
    report.plot(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    report.plot({"suites": {"mgu": entry({"one": rounds(1.0)})}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_merge_replaces_one_suite_alone(tmp_path):
    old = {"suites": {"mgu": "old", "step": "old"}}
    assert report.merge(old, "mgu", "new")["suites"] == {"mgu": "new", "step": "old"}
    assert old["suites"]["mgu"] == "old"
    file = tmp_path / "bench.json"
    assert report.read(file) == {"suites": {}}
    file.write_text('{"something": "else"}')
    with pytest.raises(ValueError, match=r"--out: .* is not a result of this command"):
        report.read(file)


def test_suites_leave_out_who_cannot_take_part():
    assert SUITES["lstm-train"].takes("two", Size(3, 4, 2, 2))
    assert SUITES["lstm-train"].takes("two", Size(3, 1, 2, 2))  # as on one device
    assert not SUITES["lstm-train"].takes("two", Size(3, 3, 2, 2))
    assert not SUITES["bilstm-ragged"].takes("haiku", Size(3, 4, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "lstm"], "--suite: must be among all, lstm-train,.* got 'lstm'"),
        (["--variants", "three"], "--variants: must be among .* got 'three'"),
        (["--peers", "torch,tf"], "--peers: must be among .* got 'tf'"),
        (["--sizes", "3,2,2"], "--sizes: must be T,B,D,H, .* got '3,2,2'"),
        (["--suite", "step", "--sizes", "3,2,2,2"], "--sizes: step has a fixed size"),
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (
            ["--suite", "mgu", "--variants", "checkpoint"],
            "some that take part in mgu, got none",
        ),
    ],
)
def test_errors_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *options])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed


def test_commands_are_listed_and_an_unknown_one_is_refused(capsys):
    main([])
    assert "bench" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "must be bench, doctor or info, got 'speed'" in capsys.readouterr().err
    main(["info"])
    assert "bench compares with:" in capsys.readouterr().out
