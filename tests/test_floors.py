"""Floors are exactly the predictors they name, checked against slow ones."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from jlstm import data


def oracle(train, context, symbol, num_symbols):
    """Witten-Bell by its formula, with all occurrences counted anew."""
    if context is None:
        return 1 / num_symbols
    n = len(context)
    after = collections.Counter(
        train[i] for i in range(n, len(train)) if train[i - n : i] == context
    )
    shorter = oracle(train, context[1:] if n else None, symbol, num_symbols)
    if not after:
        return shorter
    kinds = len(after)
    return (after[symbol] + kinds * shorter) / (after.total() + kinds)


@pytest.mark.parametrize("num_symbols", [2, 5, 300])
def test_ngram_bits_equal_the_slow_ones(num_symbols):
    rng = np.random.default_rng(num_symbols)
    used = min(num_symbols, 6)
    train = rng.integers(0, used, 90).tolist()
    # The end of the training stream, a context that nothing follows, and new symbols.
    test = [*train[-6:], *rng.integers(0, used, 30).tolist(), num_symbols - 1, 0, 1]
    found = data.ngram_bits(train, test, num_symbols, orders=(1, 2, 4, 7))
    assert list(found) == [1, 2, 4, 7]
    for order, bits in found.items():
        expected = [
            -math.log2(
                oracle(train, test[max(0, t - order + 1) : t], symbol, num_symbols)
            )
            for t, symbol in enumerate(test)
        ]
        assert bits == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("prefix", [[0, 1, 2], [2, 2, 2], [3, 3, 3]])
def test_ngram_probabilities_sum_to_one(prefix):
    train = np.random.default_rng(0).integers(0, 3, 60)
    before = 3 * data.ngram_bits(train, prefix, 4, orders=[4])[4]
    total = sum(
        2 ** (before - 4 * data.ngram_bits(train, [*prefix, symbol], 4, orders=[4])[4])
        for symbol in range(4)
    )
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 4], [0], 4), r"train_ids must lie in 0 ... 3 \(num_symbols=4\), got 0"),
        (([0, 1], [-1], 4), "test_ids must lie"),
        (([0, 1], [], 4), "test_ids must be integers"),
        (([0.5], [0], 4), "train_ids must be integers"),
        (([0, 1], [0], 4, [3]), "2 symbols, too few for order 3"),
        (([0, 1], [0], 4, [0]), "orders must be integers >= 1"),
    ],
)
def test_ngram_bits_refuse_with_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.ngram_bits(*arguments)


def test_majority_breaks_ties_to_the_lowest():
    assert data.majority([2, 1, 1, 2], [1, 1, 2]) == pytest.approx(2 / 3)
    assert data.majority(["b", "b", "a"], ["b"]) == 1.0
    with pytest.raises(ValueError, match="majority: expected at least one"):
        data.majority([], [1])


def test_majority_by_symbol_equals_counting():
    rng = np.random.default_rng(0)
    train_x, test_x = rng.integers(0, 9, 200), rng.integers(0, 12, 100)
    train_y, test_y = rng.integers(5, 8, 200), rng.integers(5, 8, 100)
    overall = min(collections.Counter(sorted(train_y.tolist())).most_common(1))[0]
    guesses = {}
    for symbol in set(train_x.tolist()):
        counts = collections.Counter(sorted(train_y[train_x == symbol].tolist()))
        guesses[symbol] = counts.most_common(1)[0][0]
    hits = [guesses.get(x, overall) == y for x, y in zip(test_x, test_y, strict=True)]
    found = data.majority_by_symbol(train_x, train_y, test_x, test_y)
    assert found == pytest.approx(np.mean(hits))
    folded = train_x.reshape(20, 10), train_y.reshape(20, 10), test_x, test_y
    assert data.majority_by_symbol(*folded) == found
    with pytest.raises(ValueError, match="one class for each symbol"):
        data.majority_by_symbol(train_x, train_y[:-1], test_x, test_y)


def test_naive_bayes_equals_its_formula():
    rng = np.random.default_rng(0)
    train = [rng.integers(0, 6, n).tolist() for n in rng.integers(1, 9, 30)]
    test = [rng.integers(0, 8, n).tolist() for n in rng.integers(1, 9, 40)]
    train_y, test_y = rng.integers(0, 3, 30).tolist(), rng.integers(0, 3, 40).tolist()
    size = len({x for xs in train for x in xs})
    known = {x for xs in train for x in xs}

    def score(xs, label):
        seen = [
            x for ys, y in zip(train, train_y, strict=True) if y == label for x in ys
        ]
        terms = [(seen.count(x) + 1) / (len(seen) + size) for x in xs if x in known]
        return math.log(train_y.count(label)) + sum(map(math.log, terms))

    hits = [
        max(range(3), key=lambda label, xs=xs: score(xs, label)) == y
        for xs, y in zip(test, test_y, strict=True)
    ]
    assert data.naive_bayes(train, train_y, test, test_y) == pytest.approx(
        np.mean(hits)
    )
    with pytest.raises(ValueError, match="each of the 30 sequences of train_xs"):
        data.naive_bayes(train, train_y[1:], test, test_y)


def test_nearest_neighbour_is_perfect_on_its_own_examples():
    rng = np.random.default_rng(0)
    xs, y = rng.normal(size=(20, 5, 2)), rng.integers(0, 3, 20)
    assert data.nearest_neighbour(xs, y, xs + 1e-6, y) == 1.0
    order = rng.permutation(20)
    expected = np.mean(y == y[order])
    assert data.nearest_neighbour(xs, y[order], xs, y) == pytest.approx(expected)
    with pytest.raises(ValueError, match="nearest_neighbour: expected train_x"):
        data.nearest_neighbour(xs, y, xs[:, :4], y)


@pytest.mark.parametrize("period", [1, 3, 5])
def test_seasonal_naive_is_perfect_on_seasons(period):
    series = np.tile(np.random.default_rng(0).normal(size=(period, 2)), (9, 1))
    cut = data.windows(series, input_length=5, target_length=4)
    forecast = data.seasonal_naive(cut["inputs"], 4, period=period)
    np.testing.assert_array_equal(forecast, cut["targets"])


def test_seasonal_naive_refuses_short_windows():
    with pytest.raises(ValueError, match="T >= period=6"):
        data.seasonal_naive(np.ones((2, 5)), 4, period=6)
