"""Batches hold every example as often as they say, and resume exactly."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import subprocess
import sys
from typing import Any

import grain
import numpy as np
import pytest

from jlstm import data


def collect(dataset: Any) -> list[dict[str, Any]]:
    """All batches of one epoch, read without threads."""
    return [dataset[index] for index in range(len(dataset))]


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) for name in left
    )


# Readers.


def test_import_needs_neither_jax_nor_grain():
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('jlstm')\n"
        f"package.__path__ = [{str(data.__path__[0])!r} + '/..']\n"
        "sys.modules['jlstm'] = package\n"
        "sys.modules['grain'] = None\n"
        "from jlstm import data\n"
        "assert 'jax' not in sys.modules\n"
        "try:\n"
        "    data.lanes([1, 2, 3], batch_size=1, length=1)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        'lanes: grain is not installed; run pip install "jlstm[train]"'
    )


# Without the time, which would make every process collect tests of other names.
CUT = gzip.compress(b"abc" * 100, mtime=0)[:-9]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_read_text_normalises_newlines(tmp_path, name):
    raw = "é\r\nb\rc\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert data.read_text(tmp_path / name) == "é\nb\nc\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin", b"abc\xe9", "byte 0xe9 at offset 3"),
        ("empty", b"", "is empty"),
        ("plain.gz", b"abc", "is not a valid gzip file"),
        ("cut.gz", CUT, "is not a valid gzip file"),
    ],
)
def test_read_text_refuses_what_is_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_text(tmp_path / name)


def test_read_text_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_text: no file at"):
        data.read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        data.read_text(tmp_path)


def test_split_files_keeps_files_whole_and_fractions():
    files = [(f"f{i}", "x" * (1 + i % 17)) for i in range(400)]
    parts = data.split_files(files, (0.8, 0.1, 0.1), seed=1)
    assert sorted(itertools.chain(*parts)) == sorted(files)
    total = sum(len(text) for _, text in files)
    shares = [sum(len(text) for _, text in part) / total for part in parts]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)
    assert data.split_files(files[::-1], (0.8, 0.1, 0.1), seed=1) == parts
    assert data.split_files(files, (0.8, 0.1, 0.1), seed=2) != parts
    with pytest.raises(ValueError, match="too few"):
        data.split_files(files[:1], (0.5, 0.5))
    with pytest.raises(ValueError, match="sum 1"):
        data.split_files(files, (0.5, 0.4))


# The standard library as a corpus.


def test_python_sources_are_plain_varied_and_bounded():
    files = data.python_sources(limit=200_000)
    total = sum(len(source) for _, source in files)
    assert 150_000 < total <= 200_000
    assert files == sorted(files) == data.python_sources(limit=200_000)
    assert len({name[0] for name, _ in files}) > 5
    symbols = set("".join(source for _, source in files))
    assert symbols <= {chr(code) for code in range(32, 127)} | {"\n"}
    folders = {part for name, _ in files for part in name.split("/")}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "encodings"}
    for _, source in files:
        assert data.python_token_classes(source).shape == (len(source),)


def test_python_sources_refuses_a_limit_below_every_file():
    with pytest.raises(ValueError, match="raise the limit"):
        data.python_sources(limit=0)


SOURCE = '''@a.b(c)
async def f(x: int = 0x1F) -> str:
    """Doc # no comment"""
    match = x @ g (y)  # def
    return f"{x + g('a')!r:>{w}}" + rb\'\'\'1
2\'\'\' \\
        if not x else (h
        @ y)
class A(B): pass
'''


def spell(source):
    """The classes of a source, a letter a character, newlines kept."""
    letters = dict(zip(data.TOKEN_CLASSES, ".#snoknfcd", strict=True))
    letters |= {"name": "v", "definition": "f", "number": "n"}
    labels = data.python_token_classes(source)
    names = [letters[data.TOKEN_CLASSES[label]] for label in labels]
    return "".join(
        "\n" if char == "\n" and name == "." else name
        for char, name in zip(source, names, strict=True)
    )


def test_python_token_classes_label_every_character():
    assert spell(SOURCE) == (
        "ddddovo\n"
        "kkkkk.kkk.fovo.vvv.o.nnnno.oo.vvvo\n"
        "....ssssssssssssssssssssss\n"
        "....vvvvv.o.v.o.c.ovo..#####\n"
        "....kkkkkk.ssssssssssssssssssssss.o.sssssssssss..\n"
        "........kk.kkk.v.kkkk.ov\n"
        "........o.vo\n"
        "kkkkk.fovoo.kkkk\n"
    )


@pytest.mark.parametrize("source", ["(", "x = ?\n", "'a\n", "if x:\ny\n  z\n w\n"])
def test_python_token_classes_refuse_what_is_not_python(source):
    with pytest.raises(
        ValueError, match="python_token_classes: the text must be valid"
    ):
        data.python_token_classes(source)


# Vocabularies.


def test_vocabulary_decodes_what_it_encodes():
    text = "naïve \U0001d6fc\n" * 3
    vocabulary = data.Vocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == text
    assert len(vocabulary) == len(set(text))
    assert data.Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_vocabulary_of_words_keeps_the_frequent():
    words = ["b", "a", "b", "c", "a", "b", "d", "d"]
    vocabulary = data.Vocabulary.from_words(words, min_count=2, max_size=3)
    assert vocabulary.symbols == ("<unk>", "b", "a")
    assert vocabulary.encode(["a", "zebra", "b"]).tolist() == [2, 0, 1]
    assert vocabulary.decode([2, 0, 1]) == "a <unk> b"
    assert data.Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, w: v.encode("abx"), "'x' at position 2 is not among the 2"),
        (lambda v, w: v.decode([0, 2]), "id 2 at position 1 is outside"),
        (lambda v, w: v.decode([-1]), "id -1 at position 0 is outside"),
        (lambda v, w: v.decode([[0]]), r"got int64 of shape \(1, 1\)"),
        (lambda v, w: w.encode("a b"), "split it first"),
        (lambda v, w: data.Vocabulary(("a", "a")), "1 are different"),
        (lambda v, w: data.Vocabulary(("a",), "b"), "unknown='b'"),
        (lambda v, w: data.Vocabulary.from_json("{}"), "expected what to_json wrote"),
        (lambda v, w: data.Vocabulary.from_json("["), "expected what to_json wrote"),
        (lambda v, w: data.Vocabulary.from_json("[]"), "expected what to_json wrote"),
        (lambda v, w: data.Vocabulary.from_json(json.dumps({"symbols": 1})), "not"),
    ],
)
def test_vocabulary_refuses_what_it_lacks(call, message):
    characters = data.Vocabulary.from_text("ab")
    words = data.Vocabulary.from_words(["a", "b"])
    with pytest.raises(ValueError, match=message):
        call(characters, words)


# Padding and buckets.


def test_pad_keeps_dtype_and_marks_lengths():
    rows = [np.ones((2, 3), np.float16), np.zeros((0, 3), np.float16), []]
    xs, lengths = data.pad(rows, length=4, value=-1)
    assert xs.shape == (3, 4, 3)
    assert xs.dtype == np.float16
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [2, 0, 0]
    assert (xs[0, :2] == 1).all()
    assert (xs[0, 2:] == -1).all()
    assert (xs[1:] == -1).all()
    assert data.pad([[], [1]])[0].dtype.kind == "i"
    assert data.pad([[], []])[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one"),
        (([[1], [1, 2, 3]], 2), "sequence 1 has length 3, longer than length=2"),
        (([np.ones((1, 2)), np.ones((1, 3))],), r"sequence 1 has shape \(1, 3\)"),
        (([1, 2],), r"sequence 0 has shape \(\)"),
        (([[1]], None, 0.5), "value=0.5 does not fit"),
        (([np.array([1], np.uint8)], None, -1), "value=-1 does not fit"),
    ],
)
def test_pad_refuses_with_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.pad(*arguments)


def waste(lengths, edges):
    return sum(min(e for e in edges if e >= n) - n for n in lengths)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_buckets", [1, 2, 3, 20])
def test_bucket_lengths_waste_the_least_possible(seed, num_buckets):
    lengths = np.random.default_rng(seed).geometric(0.15, size=30)
    distinct = sorted(set(lengths.tolist()))
    found = data.bucket_lengths(lengths, num_buckets)
    assert found == tuple(sorted(found))
    assert found[-1] == distinct[-1]
    assert len(found) == min(num_buckets, len(distinct))
    if num_buckets > 3:
        assert waste(lengths, found) == 0
        return
    choices = itertools.combinations(distinct[:-1], len(found) - 1)
    best = min(waste(lengths, (*choice, distinct[-1])) for choice in choices)
    assert waste(lengths, found) == best


def make_examples(count=57):
    rng = np.random.default_rng(0)
    return [
        {
            "xs": np.full((n, 2), i, np.float32),
            "tags": np.full(n, i, np.int32),
            "target": np.full(n // 2 + 1, i, np.int32),
            "speaker": np.full(4, i, np.float32),
            "id": i,
        }
        for i, n in enumerate(rng.integers(1, 30, size=count).tolist())
    ]


OPTIONS = {"own_lengths": ["target"], "static": ["speaker"], "num_buckets": 3}


@pytest.mark.parametrize("size", [{"batch_size": 8}, {"max_tokens": 90}])
@pytest.mark.parametrize("seed", [None, 3])
def test_bucketed_holds_every_example_once_in_few_shapes(size, seed):
    examples = make_examples()
    batches = collect(data.bucketed(examples, seed=seed, **size, **OPTIONS))
    seen = collections.Counter()
    for batch in batches:
        rows, time, _ = batch["xs"].shape
        assert rows * time <= size.get("max_tokens", 8 * time)
        assert batch["lengths"].dtype == np.int32
        for row, length in enumerate(batch["lengths"].tolist()):
            example = examples[batch["id"][row]]
            if length == 0:
                assert not any(batch[name][row].any() for name in batch)
                continue
            seen[int(batch["id"][row])] += 1
            assert np.array_equal(batch["xs"][row, :length], example["xs"])
            assert not batch["xs"][row, length:].any()
            assert np.array_equal(batch["tags"][row, :length], example["tags"])
            short = batch["target_lengths"][row]
            assert np.array_equal(batch["target"][row, :short], example["target"])
            assert np.array_equal(batch["speaker"][row], example["speaker"])
    assert seen == dict.fromkeys(range(57), 1)
    shapes = {tuple(array.shape for array in batch.values()) for batch in batches}
    assert len(shapes) <= 3


def test_bucketed_drops_only_what_fills_no_batch():
    examples = make_examples()
    dropped = data.bucketed(examples, batch_size=8, drop_remainder=True, **OPTIONS)
    assert all(batch["lengths"].all() for batch in collect(dropped))
    assert len(dropped) >= (57 - 3 * 7) // 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": []}, "at least one example"),
        ({"batch_size": None}, "exactly one of"),
        ({"max_tokens": 9}, "exactly one of"),
        ({"batch_size": 0}, "must be an integer >= 1, got 0"),
        ({"batch_size": None, "max_tokens": 2}, "max_tokens=2 does not hold"),
        ({"examples": {"xs": [[1]], "y": [0]}}, r"got one dict, of \['xs', 'y'\]; wr"),
        ({"examples": [{"xs": []}]}, "example 0 has length 0"),
        (
            {"examples": [{"xs": [1]}, {"ys": [1]}]},
            r"example 1 has the fields \['ys'\]",
        ),
        ({"examples": [{"xs": [1], "ys": [1, 2]}]}, "differ in length: {'xs': 1"),
        ({"examples": [[1, 2]]}, "must be dicts, got example 0 of type list"),
        ({"examples": [{"id": 3}]}, "none gives the length"),
        ({"examples": [{"xs": [1], "lengths": 3}]}, "rename those of the ex"),
        ({"static": ["zs"]}, r"name \['zs'\]"),
        ({"seed": -1}, "seed must be None or an integer >= 0"),
        ({"drop_remainder": True}, "do not fill a batch of 4 rows"),
    ],
)
def test_bucketed_refuses_with_numbers(arguments, message):
    defaults = {"examples": [{"xs": [1, 2, 3]}], "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        data.bucketed(**(defaults | arguments))


# Lanes.


def test_lanes_continue_row_by_row():
    ids = np.random.default_rng(0).integers(0, 250, 1000).astype(np.uint8)
    dataset = data.lanes(ids, batch_size=4, length=7)
    chunks = collect(dataset)
    assert len(chunks) == 999 // 28
    inputs = np.concatenate([chunk["inputs"] for chunk in chunks], axis=1)
    targets = np.concatenate([chunk["targets"] for chunk in chunks], axis=1)
    resets = np.concatenate([chunk["resets"] for chunk in chunks], axis=1)
    used = inputs.size
    assert inputs.dtype == targets.dtype == np.int32
    assert np.array_equal(inputs.ravel(), ids[:used])
    assert np.array_equal(targets.ravel(), ids[1 : used + 1])
    assert resets[:, 0].all()
    assert not resets[:, 1:].any()


def test_lanes_begin_each_epoch_elsewhere():
    dataset: Any = data.lanes(np.arange(1000), batch_size=4, length=7, seed=5)
    offsets = []
    for epoch in range(6):
        first = dataset[epoch * len(dataset)]
        last = dataset[(epoch + 1) * len(dataset) - 1]
        assert first["resets"][:, 0].all()
        assert not last["resets"].any()
        offsets.append(int(first["inputs"][0, 0]))
        lane = 7 * len(dataset)
        assert last["inputs"][0, -1] == offsets[-1] + lane - 1
        assert last["targets"][3, -1] == offsets[-1] + 4 * lane
    assert len(set(offsets)) > 2
    assert same(
        dataset[3], data.lanes(np.arange(1000), batch_size=4, length=7, seed=5)[3]
    )


def test_lanes_read_every_segment_once():
    dataset = data.lanes(np.arange(1000), batch_size=4, length=7, segment=3, seed=0)
    chunks = collect(dataset)
    assert len(chunks) % 3 == 0
    targets = np.concatenate([chunk["targets"] for chunk in chunks], axis=1)
    seen = np.sort(targets.ravel())
    assert np.array_equal(seen, seen[0] + np.arange(seen.size))
    assert (np.diff(targets.reshape(4, -1, 21), axis=2) == 1).all()
    for index, chunk in enumerate(chunks):
        assert (chunk["resets"][:, 0] == (index % 3 == 0)).all()
        assert not chunk["resets"][:, 1:].any()


@pytest.mark.parametrize("size", [2, 3, 9, 57, 58, 200])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scoring_lanes_hold_every_target_once(size, batch_size):
    ids = np.arange(1, size + 1)
    chunks = collect(data.scoring_lanes(ids, batch_size=batch_size, length=7))
    seen = []
    for number, chunk in enumerate(chunks):
        valid = np.arange(7) < chunk["lengths"][:, None]
        assert valid.any()
        assert np.array_equal(chunk["targets"][valid], chunk["inputs"][valid] + 1)
        assert not chunk["targets"][~valid].any()
        assert not chunk["inputs"][~valid].any()
        assert (chunk["resets"][:, 0] == (number == 0)).all()
        seen += chunk["targets"][valid].tolist()
    assert sorted(seen) == list(range(2, size + 1))
    lanes = np.concatenate([chunk["targets"] for chunk in chunks], axis=1)
    for lane in lanes:
        assert (np.diff(lane[lane > 0]) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.lanes(np.arange(28), batch_size=4, length=7), "need 29"),
        (lambda: data.lanes(np.arange(34), batch_size=4, length=7, seed=0), "need 35"),
        (lambda: data.lanes([1.0], batch_size=4, length=7), "must be integers"),
        (lambda: data.lanes([1, 2], batch_size=0, length=1), "batch_size must be"),
        (
            lambda: data.scoring_lanes([1], batch_size=1, length=7),
            "too few for a target",
        ),
    ],
)
def test_lanes_refuse_with_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Windows and batches.


def test_windows_are_views_of_the_series():
    series = np.arange(40.0).reshape(20, 2)
    cut = data.windows(series, input_length=5, target_length=2, stride=3)
    assert cut["inputs"].shape == (5, 5, 2)
    assert cut["targets"].shape == (5, 2, 2)
    for row in range(5):
        assert np.array_equal(cut["inputs"][row], series[3 * row : 3 * row + 5])
        assert np.array_equal(cut["targets"][row], series[3 * row + 5 : 3 * row + 7])
    assert np.shares_memory(cut["inputs"], series)
    assert data.windows(series, input_length=20).keys() == {"inputs"}
    with pytest.raises(ValueError, match="N >= 21"):
        data.windows(series, input_length=20, target_length=1)


def test_elapsed_is_the_recursion_of_the_paper():
    rng = np.random.default_rng(0)
    mask = rng.random((9, 3)) < 0.4
    mask[:, 2] = False  # never observed: counts from the first step
    times = 1.7e9 + np.cumsum(rng.random(9))  # of a clock, which float32 cannot hold
    expected = np.zeros((9, 3))
    for t in range(1, 9):
        passed = times[t] - times[t - 1]
        expected[t] = passed + np.where(mask[t - 1], 0, expected[t - 1])
    for given in (mask, mask.astype(int), mask.tolist()):
        delta = data.elapsed(given, times)
        assert delta.dtype == np.float32
        np.testing.assert_allclose(delta, expected, rtol=1e-6)
    np.testing.assert_allclose(delta[:, 2], times - times[0], rtol=1e-6)
    assert data.elapsed(np.zeros((0, 3)), []).shape == (0, 3)
    np.testing.assert_array_equal(data.elapsed(mask[:1], times[:1]), [[0, 0, 0]])


def test_elapsed_refuses_what_does_not_fit():
    message = (
        r"^elapsed: mask must be \[T, D\] and times \[T\], got \[2, 3, 4\] and \[3\]; "
        r"give one sequence per call$"
    )
    with pytest.raises(ValueError, match=message):
        data.elapsed(np.ones((2, 3, 4)), np.arange(3))
    with pytest.raises(
        ValueError, match=r"^elapsed: mask must be .*\[3, 4\] and \[2\];"
    ):
        data.elapsed(np.ones((3, 4)), np.arange(2))
    for times in ([0, 2, 1], [0, np.nan, 1]):
        with pytest.raises(
            ValueError, match=r"^elapsed: times must be in order and not"
        ):
            data.elapsed(np.ones((3, 4)), times)


@pytest.mark.parametrize(("drop", "count"), [(False, 3), (True, 2)])
def test_batches_keep_rows_together(drop, count):
    arrays = {"xs": np.arange(20).reshape(10, 2), "ys": np.arange(10)}
    dataset = data.batches(arrays, batch_size=4, seed=1, drop_remainder=drop)
    batches = collect(dataset)
    assert len(batches) == count
    rows = np.concatenate([batch["ys"] for batch in batches])
    assert len(set(rows.tolist())) == len(rows) == (8 if drop else 10)
    for batch in batches:
        assert np.array_equal(batch["xs"][:, 0], 2 * batch["ys"])


def test_batches_refuse_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="of one N"):
        data.batches({"xs": np.ones(3), "ys": np.ones(4)}, batch_size=1)
    with pytest.raises(ValueError, match="3 rows do not fill a batch of 4"):
        data.batches({"xs": np.ones(3)}, batch_size=4, drop_remainder=True)


# What every pipeline promises.

PIPELINES = {
    "batches": lambda seed: data.batches(
        {"xs": np.arange(40)}, batch_size=3, seed=seed
    ),
    "bucketed": lambda seed: data.bucketed(
        make_examples(), batch_size=4, seed=seed, **OPTIONS
    ),
    "lanes": lambda seed: data.lanes(
        np.arange(999), batch_size=2, length=30, seed=seed
    ),
}


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES.keys())
def test_epochs_differ_and_a_seed_decides(make):
    dataset, again, other = make(1), make(1), make(2)
    size = len(dataset)
    first = collect(dataset)
    later = [dataset[size + index] for index in range(size)]
    assert all(map(same, first, collect(again)))
    assert all(map(same, later, [again[size + index] for index in range(size)]))
    assert not all(map(same, first, later))
    assert not all(map(same, first, collect(other)))
    assert same(dataset[-1], dataset[size - 1])


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES.keys())
def test_iterators_resume_where_they_stopped(make):
    dataset = make(1).repeat(3)
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(read))
    stop = len(dataset) // 2 + 1
    for index in range(stop):
        assert same(next(iterator), dataset[index])
    resumed = iter(make(1).repeat(3).to_iter_dataset(read))
    resumed.set_state(iterator.get_state())
    rest = list(resumed)
    assert len(rest) == len(dataset) - stop
    assert all(map(same, rest, list(iterator)))
