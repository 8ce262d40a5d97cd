"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlstm import data, train
from jlstm.train.checkpoint import orbax
from jlstm.train.files import InUse

SIZE = 64
EXAMPLES = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)


class Killed(Exception):
    """What a test raises where a process would be killed."""


def make_batches(seed=0, **options):
    arrays = {"x": EXAMPLES, "bad": np.zeros((SIZE,), bool)}
    return data.batches(arrays, batch_size=4, seed=seed, **options).repeat()


def loss_fn(params, batch, *, key, carry):
    noise = jax.random.normal(key, batch["x"].shape)
    error = (batch["x"] + 0.1 * noise) @ params["w"] - batch["x"].sum(-1) + carry.mean()
    error = jnp.where(batch["bad"].any(), jnp.nan, error)
    aux = train.Aux({"size": jnp.abs(error).mean()}, carry + 0.01 * error)
    return train.squared_error(error, jnp.zeros(4)), aux


TX = train.adamw(1e-2, weight_decay=0.1)
STEP = train.make_train_step(loss_fn, TX, ema_decay=0.9)


def make_state(seed=0, **options):
    key = jax.random.key(seed)
    options = {"ema": True, "carry": jnp.zeros(4)} | options
    return train.create_state({"w": jnp.ones(3)}, TX, key=key, **options)


def run(folder, *, num_steps=25, kill_at=None, batches=None, hooks=(), **options):
    """Trains; is killed when it asks for the batch after ``kill_at``."""
    every = options.pop("every", 4)
    log_every = options.pop("log_every", 3)
    batches = make_batches() if batches is None else batches

    def kill(index, batch):
        if index == kill_at:
            raise Killed
        return batch

    if hasattr(batches, "_parents"):
        batches = Cursed(batches, kill)
    checkpoints = train.Checkpoints(folder, every=every, **options)
    report = train.fit(
        make_state(), STEP, batches, num_steps=num_steps, hooks=list(hooks),
        log_every=log_every, checkpoints=checkpoints,
    )  # fmt: skip
    return report, checkpoints


class Cursed:
    """A dataset whose iterators call something before each batch."""

    def __init__(self, dataset, call):
        self._dataset, self._call, self._parents = dataset, call, dataset._parents

    def __getitem__(self, index):
        return self._dataset[index]

    def __len__(self):
        return len(self._dataset)

    def __iter__(self):
        outer, iterator = self, iter(self._dataset)

        class Iterator:
            get_state, set_state = iterator.get_state, iterator.set_state

            def __iter__(self):
                return self

            def __next__(self):
                batch = next(iterator)
                return outer._call(iterator.get_state()["next_index"] - 1, batch)

        return Iterator()


def plain():
    return Cursed(make_batches(), lambda index, batch: batch)


def watchers(folder):
    best = train.keep_best("loss")
    stop = train.early_stopping("size", patience=100)
    lines = train.write_jsonl(folder.parent / f"{folder.name}.jsonl")
    return [best, stop, train.every(5, Counter()), lines]


class Counter:
    """A user's hook that remembers: how often, and an array."""

    def __init__(self):
        self.calls, self.sum = 0, jnp.zeros(3)

    def __call__(self, report):
        self.calls += 1
        self.sum += report.state.params["w"]

    def get_state(self):
        nested = [{"sum": self.sum, "odd": (math.nan, -math.inf, b"\x00\xff", None)}]
        return {"calls": self.calls, "nested": nested}

    def set_state(self, state, report):
        self.calls, self.sum = state["calls"], state["nested"][0]["sum"]
        nan, *others = state["nested"][0]["odd"]
        assert math.isnan(nan)
        assert others == [-math.inf, b"\x00\xff", None]


def lines_of(folder):
    path = folder.parent / f"{folder.name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    hooks = watchers(folder)
    report, _ = run(folder, hooks=hooks)
    return train.hash_tree(report.state), lines_of(folder), hooks, report


@pytest.mark.core
@pytest.mark.parametrize("kills", [[1], [3, 6], [13], [14, 15, 16], [20, 24]], ids=str)
def test_killed_runs_end_with_the_same_bits(tmp_path, uninterrupted, kills):
    expected, lines, hooks_before, report_before = uninterrupted
    folder = tmp_path / "run"
    for kill_at in kills:
        with pytest.raises(Killed):
            run(folder, kill_at=kill_at, hooks=watchers(folder))
    hooks = watchers(folder)
    report, checkpoints = run(folder, hooks=hooks)
    assert train.hash_tree(report.state) == expected
    assert lines_of(folder) == lines
    assert report.metrics == report_before.metrics
    assert hooks[0].value == hooks_before[0].value
    assert train.hash_tree(hooks[0].params) == train.hash_tree(hooks_before[0].params)
    assert hooks[1].get_state() == hooks_before[1].get_state()
    counted = [hook[2]._hook for hook in (hooks, hooks_before)]
    assert counted[0].calls == counted[1].calls
    np.testing.assert_array_equal(counted[0].sum, counted[1].sum)
    assert checkpoints.resumes == sum(kill_at >= 4 for kill_at in kills)
    # From each kill back to the multiple of 4 before it.
    assert checkpoints.steps_replayed == sum(kill_at % 4 for kill_at in kills)


def test_a_list_and_a_generator_are_read_again(tmp_path):
    batches = [batch for _, batch in zip(range(25), make_batches(), strict=False)]
    whole, _ = run(tmp_path / "whole", batches=batches)
    for name, make in (("list", lambda: batches), ("gen", lambda: iter(batches))):
        run(tmp_path / name, batches=make(), num_steps=10)
        report, _ = run(tmp_path / name, batches=make())
        assert train.hash_tree(report.state) == train.hash_tree(whole.state)


def test_a_finished_run_does_nothing_when_resumed(tmp_path):
    first, _ = run(tmp_path / "run", hooks=[train.keep_best("loss")])

    def never(report):
        raise AssertionError("a hook ran")

    best = train.keep_best("loss")
    again, _ = run(tmp_path / "run", hooks=[best], kill_at=0)
    assert again.step == first.step
    assert again.metrics == first.metrics
    assert train.hash_tree(again.state) == train.hash_tree(first.state)
    assert best.params["w"].shape == (3,)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    def hooks():
        return [train.early_stopping("step_size", patience=1), set_metric]

    def set_metric(report):
        report.metrics["step_size"] = 1.0

    first, _ = run(tmp_path / "run", hooks=hooks()[::-1])
    again, _ = run(tmp_path / "run", hooks=hooks()[::-1], kill_at=0)
    assert first.stop
    assert first.stop == again.stop
    assert again.step == first.step < 25


def test_the_newest_and_the_best_are_kept(tmp_path):
    values = {3: 3.0, 6: 1.0, 9: 2.0, 12: 2.0, 15: 2.0, 18: 2.0, 21: 2.0, 24: 2.0}

    def score(report):
        report.metrics["score"] = values.get(report.step, 9.0)

    _, checkpoints = run(tmp_path / "run", hooks=[score], best="score", keep=2)
    assert checkpoints.steps() == [6, 24, 25]
    best = checkpoints.load_best(make_state())
    assert int(best.step) == 6
    stopped, _ = run(tmp_path / "whole", num_steps=6)
    assert train.hash_tree(best) == train.hash_tree(stopped.state)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        "begun.json",
        "lock", "steps_begun", "step_000000006", "step_000000024",
        "step_000000025",
    }  # fmt: skip


# What must be the same.


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batches": make_batches(seed=1)}, r"data.*seed: was 0, is now 1"),
        ({"batches": make_batches(drop_remainder=True)}, r"drop_remainder: was False"),
        ({"batches": [{"x": EXAMPLES}]}, r"data\.type: was 'Cursed', is now 'list'"),
        ({"identity": {"lr": 2}}, r"lr: was 1, is now 2"),
        ({"identity": {"lr": 1, "new": "x"}}, r"new: was absent, is now 'x'"),
    ],
    ids=["seed", "options", "kind", "config", "more"],
)
def test_another_run_is_refused_with_what_differs(tmp_path, change, line):
    run(tmp_path / "run", identity={"lr": 1}, num_steps=5)
    with pytest.raises(ValueError, match=rf"belongs to another run:\n(.*\n)*.*{line}"):
        run(tmp_path / "run", **({"identity": {"lr": 1}} | change))


def test_other_bytes_of_the_data_are_noticed(tmp_path):
    run(tmp_path / "run", num_steps=5)
    changed = EXAMPLES.copy()
    changed[-1, -1] += 1e-6
    batches = data.batches(
        {"x": changed, "bad": np.zeros((SIZE,), bool)}, batch_size=4, seed=0
    )
    with pytest.raises(
        ValueError, match=r"source\.x: was 'float32\[64, 3\] sha256"
    ) as e:
        run(tmp_path / "run", batches=batches.repeat())
    assert "data.batches" not in str(e.value)  # hashes, where words are there


def test_other_numbers_in_a_list_are_noticed(tmp_path):
    run(tmp_path / "run", batches=[{"x": EXAMPLES[:4], "bad": False}] * 9, num_steps=5)
    with pytest.raises(ValueError, match=r"the same types and length, but other"):
        run(tmp_path / "run", batches=[{"x": EXAMPLES[4:8], "bad": False}] * 9)


def test_a_run_that_went_further_says_so(tmp_path, capsys):
    run(tmp_path / "run", num_steps=5)
    report, _ = run(tmp_path / "run", num_steps=3)
    assert report.step == 5
    assert "has taken 5 steps already, more than num_steps=3" in capsys.readouterr().err


def test_resume_says_whether_it_must_or_never(tmp_path):
    with pytest.raises(ValueError, match=r"resume='must', but .* has no checkpoint"):
        run(tmp_path / "run", resume="must")
    run(tmp_path / "run", num_steps=5)
    with pytest.raises(ValueError, match=r"resume='never', but .* of step 5"):
        run(tmp_path / "run", resume="never")
    report, _ = run(tmp_path / "run", resume="must")
    assert report.step == 25


def test_one_run_at_a_time(tmp_path):
    (tmp_path / "run").mkdir()
    hold = (
        "import sys, pathlib; from jlstm.train.files import Lock; "
        "Lock(pathlib.Path(sys.argv[1]), 'test'); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=rf"run, of process {other.pid}, is at work in"):
            run(tmp_path / "run")
        other.kill()
    run(tmp_path / "run")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"params": {"w": jnp.ones(4)}},
            r"state/params/w .* is float32\[3\], expected",
        ),
        ({"params": {"v": jnp.ones(3)}}, r"state/params/v, float32\[3\], is missing"),
        (
            {"params": {"w": jnp.ones(3, jnp.bfloat16)}},
            r"is float32\[3\], expected bfloat16",
        ),
    ],
    ids=["shape", "name", "dtype"],
)
def test_another_model_is_refused_before_anything_is_read(tmp_path, state, message):
    run(tmp_path / "run", num_steps=5)
    new = dataclasses.replace(make_state(), **state)
    checkpoints = train.Checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train.fit(new, STEP, plain(), num_steps=9, checkpoints=checkpoints)


# Damage.


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [flip, truncate, empty, remove])
def test_every_file_of_a_checkpoint_is_guarded(tmp_path, capfd, harm):
    run(tmp_path / "run", num_steps=8)
    state = make_state()
    newest = tmp_path / "run" / "step_000000008"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 5
    harmed = 0
    for path in files:
        if not path.stat().st_size and harm is not remove:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", copy)
        harm(copy / path.relative_to(tmp_path / "run"))
        checkpoints = train.Checkpoints(copy)
        restored = checkpoints.open(state, train.fingerprint(plain()))
        checkpoints.close()
        assert restored is not None
        assert restored.step == 4, f"{harm.__name__} of {path} went unnoticed"
        assert "step 8 is damaged" in capfd.readouterr().err
        assert (copy / "step_000000008.damaged").is_dir()
        shutil.rmtree(copy)
        harmed += 1
    assert harmed >= 5


def test_no_whole_checkpoint_is_an_error(tmp_path):
    run(tmp_path / "run", num_steps=4)
    empty(tmp_path / "run" / "step_000000004" / "run.json")
    for _ in range(2):  # nor does it begin anew the second time
        with pytest.raises(ValueError, match=r"no checkpoint in .* is intact .*run.js"):
            run(tmp_path / "run")


def test_a_damaged_file_of_params_is_not_loaded(tmp_path):
    train.save(tmp_path / "params", {"w": jnp.arange(9.0)})
    for path in sorted((tmp_path / "params").rglob("*")):
        if path.is_file() and path.stat().st_size:
            before = path.read_bytes()
            flip(path)
            with pytest.raises(
                train.Damaged,
                match="is not an intact checkpoint",
            ):
                train.load(tmp_path / "params", {"w": jnp.zeros(9)})
            path.write_bytes(before)
    assert float(train.load(tmp_path / "params", {"w": jnp.zeros(9)})["w"][8]) == 8


def test_what_a_killed_save_left_is_removed(tmp_path):
    run(tmp_path / "run", num_steps=4)
    half = tmp_path / "run" / "step_000000008.part"
    shutil.copytree(tmp_path / "run" / "step_000000004", half)
    (half / "manifest.json").unlink()
    report, _ = run(tmp_path / "run", num_steps=6)
    assert report.step == 6
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_disk_that_fails_for_a_moment_damages_nothing(tmp_path, monkeypatch):
    run(tmp_path / "run", num_steps=8)

    def fail(path):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("jlstm.train.files.sha256", fail)
        with pytest.raises(OSError, match="too many open files"):
            run(tmp_path / "run")
    _, checkpoints = run(tmp_path / "run")
    assert checkpoints.resumes == 1
    assert not list((tmp_path / "run").glob("*.damaged"))


def test_hooks_that_changed_are_refused_by_name(tmp_path):
    run(tmp_path / "run", num_steps=5, hooks=[train.keep_best("loss")])
    with pytest.raises(
        ValueError, match=r"hooks \['Best'\], and cannot continue with \[\]"
    ):
        run(tmp_path / "run")
    hooks = [train.keep_best("loss"), train.every(3, Counter())]
    with pytest.raises(
        ValueError, match=r"cannot continue with \['Best', 'every 3: Cou"
    ):
        run(tmp_path / "run", hooks=hooks)
    # What has no state, and what is optional, may come and go.
    board = train.write_tensorboard(tmp_path / "board")
    run(tmp_path / "run", hooks=[print, train.keep_best("loss"), board])


def test_lines_that_were_there_before_stay(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"step": 0}\n')
    with pytest.raises(Killed):
        run(tmp_path / "run", kill_at=3, hooks=[train.write_jsonl(path)])
    run(tmp_path / "run", num_steps=6, hooks=[train.write_jsonl(path)])
    assert [record["step"] for record in train.read_jsonl(path)] == [0, 3, 6]
    path.write_text("")
    with pytest.warns(UserWarning, match="has lost lines"):
        run(tmp_path / "run", hooks=[train.write_jsonl(path)])


def test_what_a_hook_remembers_keeps_its_type(tmp_path):
    class Odd:
        seen = None

        def __call__(self, report):
            pass

        def get_state(self):
            long = np.array([2**40 + 1])
            return {"long": long, "half": np.float64(0.1), "none": jnp.zeros((0, 3))}

        def set_state(self, state, report):
            self.seen = state

    run(tmp_path / "run", num_steps=5, hooks=[Odd()])
    hook = Odd()
    run(tmp_path / "run", hooks=[hook])
    assert hook.seen
    assert hook.seen["long"].dtype == np.int64
    assert hook.seen["long"][0] == 2**40 + 1
    assert hook.seen["half"] == 0.1
    assert hook.seen["none"].shape == (0, 3)


def signalled_at(step, number=signal.SIGTERM):
    """A hook that asks its own process to end."""

    def ask(report):
        if report.step == step:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    return ask


class Live:
    """A hook that hands out the very list that it changes."""

    def __init__(self):
        self.steps = []

    def __call__(self, report):
        self.steps.append(report.step)

    def get_state(self):
        return {"steps": self.steps}

    def set_state(self, state, report):
        self.steps = state["steps"]


def test_a_signal_in_a_hook_leaves_no_trace_of_the_hooks_before_it(tmp_path, capfd):
    live = Live()
    with pytest.raises(train.Interrupted) as stop:
        run(tmp_path / "run", hooks=[live, signalled_at(6)])
    assert stop.value.code == 143
    assert "SIGTERM, in the hooks of step 6" in capfd.readouterr().err
    live = Live()
    run(tmp_path / "run", num_steps=12, hooks=[live])
    assert live.steps == [3, 6, 9, 12]


def test_a_signal_in_the_last_hooks_still_ends_the_process(tmp_path):
    with pytest.raises(train.Interrupted):
        run(tmp_path / "run", num_steps=6, hooks=[signalled_at(6)])
    report, _ = run(tmp_path / "run", num_steps=6)
    assert report.step == 6
    again, _ = run(tmp_path / "run", num_steps=6, hooks=[signalled_at(6)])
    assert again.metrics == report.metrics


@pytest.mark.parametrize("inner_saves", [False, True])
def test_a_fit_in_a_hook_is_cut_with_the_one_around_it(tmp_path, inner_saves):
    def inner(report):
        def batches():
            for number, batch in enumerate(make_batches()):
                if number == 4 and report.step == 6 and not list(tmp_path.glob("cut")):
                    (tmp_path / "cut").touch()
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                yield batch

        checkpoints = None
        if inner_saves:
            checkpoints = train.Checkpoints(tmp_path / f"inner{report.step}")
        found = train.fit(
            make_state(), STEP, batches(), num_steps=9, checkpoints=checkpoints
        )
        report.metrics["inner"] = found.metrics["loss"]

    path = tmp_path / "m.jsonl"
    with pytest.raises(train.Interrupted):
        run(tmp_path / "run", num_steps=9, hooks=[inner, train.write_jsonl(path)])
    run(tmp_path / "run", num_steps=9, hooks=[inner, train.write_jsonl(path)])
    records = train.read_jsonl(path)
    assert [record["step"] for record in records] == [3, 6, 9]
    assert len({record["inner"] for record in records}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_that_is_ended_is_not_the_run(tmp_path):
    def end_a_child(report):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    report, _ = run(tmp_path / "run", num_steps=6, hooks=[end_a_child])
    assert report.step == 6


def test_a_generator_that_ends_too_soon_is_refused(tmp_path):
    batches = [batch for _, batch in zip(range(9), make_batches(), strict=False)]
    run(tmp_path / "run", batches=iter(batches), num_steps=8)
    with pytest.raises(ValueError, match="batches end after 3, but 8 were read"):
        run(tmp_path / "run", batches=iter(batches[:3]))


def test_what_may_be_infinite_or_empty(tmp_path):
    def loss(params, batch, *, key, carry):
        ys = batch["x"] @ jnp.where(jnp.isinf(params["mask"]), 0.0, params["w"])
        return train.squared_error(ys, jnp.ones_like(ys)), train.Aux({}, carry)

    tx = optax.masked(train.sgd(0.1), {"w": True, "mask": False, "none": False})
    params = {
        "w": jnp.ones(3),
        "mask": jnp.array([0.0, -jnp.inf, 0.0]),
        "none": jnp.zeros((0, 2)),
    }
    carry = jnp.array([-jnp.inf, 0.0])

    def fit(folder, num_steps):
        step = train.make_train_step(frozen_mask(loss), tx)
        return train.fit(
            train.create_state(params, tx, carry=carry), step, make_batches(),
            num_steps=num_steps, checkpoints=train.Checkpoints(folder),
        )  # fmt: skip

    fit(tmp_path / "run", 3)
    resumed, whole = fit(tmp_path / "run", 6), fit(tmp_path / "whole", 6)
    assert whole.skipped == 0
    assert train.hash_tree(resumed.state) == train.hash_tree(whole.state)
    assert resumed.state.params["none"].shape == (0, 2)


def frozen_mask(loss):
    def wrapped(params, batch, **options):
        stopped = jax.lax.stop_gradient(params["mask"])
        return loss(params | {"mask": stopped}, batch, **options)

    return wrapped


def test_leaves_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 leaves have only 1 different names"):
        train.save(tmp_path / "x", {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


def test_a_metric_that_never_came_is_named(tmp_path):
    with pytest.warns(UserWarning, match="no report had a number for best='accuracy'"):
        run(tmp_path / "run", num_steps=3, best="accuracy")


def test_bad_options_of_checkpoints_have_one_line(tmp_path):
    with pytest.raises(ValueError, match="every: must be an integer of at least 1"):
        train.Checkpoints(tmp_path, every=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoints must be a Checkpoints, got 'x'"):
        train.fit(make_state(), STEP, [], num_steps=1, checkpoints="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="identity: must be a dict, got 'lr'"):
        train.Checkpoints(tmp_path, identity="lr")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, expected a folder"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot save a PosixPath; the identity"):
        run(tmp_path / "run", identity={"path": tmp_path})


def test_half_a_replacement_is_undone(tmp_path):
    run(tmp_path / "run", num_steps=4)
    folder = tmp_path / "run" / "step_000000004"
    folder.rename(folder.with_suffix(".former"))
    report, checkpoints = run(tmp_path / "run", num_steps=6)
    assert report.step == 6
    assert checkpoints.resumes == 1


def test_a_folder_that_is_gone_ends_the_run(tmp_path):
    def remove_all(report):
        while list((tmp_path / "run").glob("*.part")):
            time.sleep(0.01)
        if report.step == 6:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(OSError, match=r"could not be saved in .*run \(.*gone"):
        run(tmp_path / "run", hooks=[remove_all])
    assert not list((tmp_path / "run").glob("step_*[0-9]"))
    lines = train.write_jsonl(tmp_path / "lines" / "metrics.jsonl")

    def remove_lines(report):
        shutil.rmtree(tmp_path / "lines")

    with pytest.raises(OSError, match=r"write_jsonl: .*jsonl cannot be written"):
        run(tmp_path / "other", hooks=[lines, remove_lines])


# Numbers.


def poisoned(*bad):
    def spoil(index, batch):
        return batch | {"bad": np.full((4,), index in bad)}

    return make_batches().map_with_index(spoil)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    state = make_state()
    batches = list(zip(range(3), poisoned(1), strict=False))
    before = train.hash_tree(dataclasses.replace(state, step=jnp.int32(0)))
    first, metrics = STEP(state, batches[1][1])
    assert int(metrics["skipped"]) == 1
    assert int(first.step) == 1
    assert train.hash_tree(dataclasses.replace(first, step=jnp.int32(0))) == before
    _, metrics = STEP(first, batches[0][1])
    assert int(metrics["skipped"]) == 0


def test_skipped_steps_are_counted_and_end_a_run(tmp_path):
    path = tmp_path / "m.jsonl"
    hooks = [train.write_jsonl(path)]
    report, _ = run(tmp_path / "some", batches=poisoned(2, 3, 9), hooks=hooks)
    assert report.skipped == 3
    assert np.isfinite(report.metrics["loss"])
    assert [r.get("skipped") for r in train.read_jsonl(path)][:4] == [1, 2, 2, 3]

    with pytest.raises(
        train.NonFiniteError,
        match=r"not finite in steps 11 to 16, .* the last checkpoint is of step 12",
    ):
        run(tmp_path / "many", batches=poisoned(*range(10, 25)))
    checkpoints = train.Checkpoints(tmp_path / "many")
    checkpoints.close()
    for step in checkpoints.steps():
        like = {f"state/{n}": x for n, x in leaves(make_state()).items()}
        folder = tmp_path / "many" / f"step_{step:09d}" / "arrays"
        saved: Any = orbax().load(str(folder), like)
        assert all(np.isfinite(saved[n]).all() for n in like if "params" in n)


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    def spoiling(state, batch):
        new, metrics = STEP(state, batch)
        step = int(new.step)
        params = {"w": new.params["w"] * (np.inf if step == 7 else 1)}
        return dataclasses.replace(new, params=params), metrics

    checkpoints = train.Checkpoints(tmp_path / "run", every=4)
    with pytest.raises(
        train.NonFiniteError,
        match=r"after step 8 is not finite, in params/w; .* checkpoint is of step 4",
    ):
        train.fit(
            make_state(), spoiling, make_batches(), num_steps=25,
            checkpoints=checkpoints, max_skipped=100,
        )  # fmt: skip
    assert checkpoints.steps() == [4]


def test_an_infinite_gradient_is_skipped_and_no_loss_is_none():
    def loss(params, batch, *, key, carry):
        root = jnp.sqrt(params["w"] * batch["x"])
        return train.squared_error(root, 0 * root, mask=batch["valid"]), train.Aux({})

    tx = train.sgd(0.1)
    step = train.make_train_step(loss, tx, donate=False)
    state = train.create_state({"w": jnp.ones(3)}, tx)
    everything, nothing = jnp.ones(3, bool), jnp.zeros(3, bool)
    x = jnp.array([1.0, 0.0, 2.0])
    after, metrics = step(state, {"x": x, "valid": everything})
    assert np.isfinite(metrics["loss"].value)
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(after.params["w"], 1.0)
    # Where all is masked there is nothing to learn, and nothing that is not finite.
    after, metrics = step(state, {"x": x + 1, "valid": nothing})
    assert int(metrics["skipped"]) == 0
    assert float(metrics["grad_norm"]) == 0
    np.testing.assert_array_equal(after.params["w"], 1.0)


def test_debug_nans_names_the_operation():
    step = train.make_train_step(loss_fn, TX, ema_decay=0.9, debug_nans=True)
    state = make_state()
    batches = [batch for _, batch in zip(range(2), poisoned(1), strict=False)]
    state, _ = step(state, batches[0])
    with pytest.raises(train.NonFiniteError, match=r"step 2 is not finite: .*nan.* in"):
        step(state, batches[1])
    assert not state.params["w"].is_deleted()


def test_the_loss_scale_falls_and_rises():
    def loss(params, batch, *, key, carry):
        return train.squared_error(params["w"] * batch, 0 * batch), train.Aux({})

    tx = train.sgd(0.1, clip_norm=None)
    step = train.make_train_step(loss, tx, donate=False)
    params = {"w": jnp.ones(2, jnp.float16)}
    state = train.create_state(params, tx, loss_scale=2.0**30)
    batch = jnp.full(2, 0.01, jnp.float16)
    skipped = []
    for _ in range(20):
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped"]))
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert state.loss_scale is not None
    scale = float(state.loss_scale.scale)
    assert 1 < scale < 2.0**30
    # Unscaled, the gradient is what it is without a scale.
    plain = train.create_state(params, tx)
    scaled = train.create_state(params, tx, loss_scale=1024.0)
    for start in (plain, scaled):
        _, metrics = step(start, batch)
        np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2) * 1e-4, rtol=2e-2)
    with pytest.raises(ValueError, match="loss_scale must be positive"):
        train.create_state(params, tx, loss_scale=0.0)


# Parts of a batch, averages.


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_large_batch(parts):
    lengths = jnp.array([5, 0, 2, 1, 5, 3, 0, 0])
    xs = jax.random.normal(jax.random.key(0), (8, 5, 3))

    def loss(params, batch, *, key, carry):
        ys = jnp.tanh(batch["xs"] @ params["w"]) + carry[:, None]
        value = train.squared_error(ys, jnp.ones_like(ys), lengths=batch["lengths"])
        return value, train.Aux({"mean": ys.mean()}, ys[:, -1])

    tx = train.sgd(0.1, clip_norm=None)
    batch = {"xs": xs, "lengths": lengths}
    results = []
    for accumulate in (1, parts):
        step = train.make_train_step(loss, tx, accumulate=accumulate)
        start = train.create_state({"w": jnp.ones(3)}, tx, carry=jnp.ones(8))
        state, metrics = step(start, batch)
        results.append((state.params, state.carry, train.average([metrics])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *results)
    step = train.make_train_step(loss, tx, accumulate=3)
    start = train.create_state({"w": jnp.ones(3)}, tx, carry=jnp.ones(8))
    with pytest.raises(ValueError, match="accumulate=3 needs a number of rows that"):
        step(start, batch)


def test_the_average_of_params_is_what_it_says():
    state, decay = make_state(), 0.9
    want = np.ones(3)
    for n, batch in zip(range(30), make_batches(), strict=False):
        state, _ = STEP(state, batch)
        d = min(decay, (1 + n) / (10 + n))
        want = d * want + (1 - d) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], want, rtol=1e-5)
    step = train.make_train_step(loss_fn, TX)
    with pytest.raises(ValueError, match=r"needs both create_state\(ema=True\)"):
        step(make_state(), make_batches()[0])


# Meshes.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_run_goes_on_to_the_same_bits(tmp_path, kind):
    mesh = jax.make_mesh((2,), ("data",), (kind,))
    rows, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))

    def loss(params, batch, *, key, carry):
        del key
        error = batch["x"] @ params["w"] + carry
        return train.squared_error(error, 0 * error), train.Aux({}, carry + 0.1 * error)

    def go(folder, num_steps):
        state = jax.device_put(train.create_state({"w": jnp.ones(3)}, TX), everywhere)
        carry = jax.device_put(jnp.zeros(4), rows)
        return train.fit(
            dataclasses.replace(state, carry=carry),
            train.make_train_step(loss, TX),
            Cursed(make_batches(), lambda _, batch: jax.device_put(batch, rows)),
            num_steps=num_steps,
            checkpoints=train.Checkpoints(folder),
        ).state

    with jax.set_mesh(mesh):
        go(tmp_path / "run", 3)
        resumed, whole = go(tmp_path / "run", 6), go(tmp_path / "whole", 6)
    assert train.hash_tree(resumed) == train.hash_tree(whole)
    assert resumed.carry.sharding == whole.carry.sharding
