"""Floors: scores of trivial predictors, to be put beside the score of a model.

A score that does not beat the best of them on the same data shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def ngram_bits(
    train_ids: ArrayLike,
    test_ids: ArrayLike,
    num_symbols: int,
    orders: Iterable[int] = range(1, 9),
) -> dict[int, float]:
    r"""Scores n-gram models with Witten-Bell smoothing, in bits a symbol.

    The probability of a symbol :math:`w` after a context :math:`c` is

    .. math::
      P(w \mid c) = \frac{N(cw) + T(c)\, P(w \mid c')}{N(c) + T(c)}

    Here :math:`N` counts occurrences in the training stream, :math:`T(c)` is the number
    of different symbols that follow :math:`c` there, and :math:`c'` is the context
    without its first symbol. The shortest model, below the empty context, gives each
    symbol :math:`1 / V`. After a context that training does not have,
    :math:`P(w \mid c')` is used.

    Args:
      train_ids: the training stream ``[N]``, integers below ``num_symbols``.
      test_ids: the stream to score ``[N]``, likewise. Its first symbols have shorter
        contexts.
      num_symbols: ``V``, the size of the vocabulary.
      orders: the values of n to score. An n-gram model has a context of n - 1 symbols.

    Returns:
      Bits a symbol for each n, averaged over all symbols of ``test_ids``.

    Raises:
      ValueError: ids outside the vocabulary, a stream without symbols or shorter than
        an order, or an order below one.

    Example:
      >>> stream = np.arange(100) % 2
      >>> bits = jlstm.data.ngram_bits(stream, stream, num_symbols=2, orders=(1, 2))
      >>> round(bits[1], 1), round(bits[2], 1)
      (1.0, 0.0)
    """
    where = "ngram_bits"
    train = _check_ids(where, "train_ids", train_ids, num_symbols)
    test = _check_ids(where, "test_ids", test_ids, num_symbols)
    orders = sorted(set(orders))
    if not orders or orders[0] < 1:
        raise ValueError(f"{where}: orders must be integers >= 1, got {orders}")
    if len(train) < orders[-1]:
        raise ValueError(
            f"{where}: train_ids has {len(train)} symbols, too few for order "
            f"{orders[-1]}; lower the order"
        )
    # The context before each symbol, as its rank among the contexts of the training
    # stream, or -1 if it is not there. Ranks grow by one symbol with each order, so no
    # number of symbols and no order overflows.
    contexts, size = np.zeros(len(train), np.int64), 1
    test_contexts = np.zeros(len(test), np.int64)
    probability = np.full(len(test), 1 / num_symbols)
    bits: dict[int, float] = {}
    for order in range(1, orders[-1] + 1):
        grams, ranks, counts = np.unique(
            contexts * num_symbols + train[order - 1 :],
            return_inverse=True,
            return_counts=True,
        )
        totals = np.bincount(grams // num_symbols, counts, size)
        kinds = np.bincount(grams // num_symbols, minlength=size)
        test_ranks = _find(grams, test_contexts * num_symbols + test[order - 1 :])
        # The last context of the stream may have no symbol after it.
        known = (test_contexts >= 0) & (totals[test_contexts] > 0)
        context = test_contexts[known]
        count = np.where(test_ranks >= 0, counts[test_ranks], 0)[known]
        shorter = probability[order - 1 :]
        shorter[known] = (count + kinds[context] * shorter[known]) / (
            totals[context] + kinds[context]
        )
        if order in orders:
            bits[order] = float(-np.log2(probability).mean())
        contexts, test_contexts, size = ranks[:-1], test_ranks[:-1], len(grams)
    return bits


def majority(train_y: ArrayLike, test_y: ArrayLike) -> float:
    """Scores the predictor that always answers the most frequent class of training.

    If several classes are equally frequent, the lowest is taken.

    Args:
      train_y: the classes of the training set, of any shape.
      test_y: the classes of the test set.

    Returns:
      The accuracy on the test set.

    Raises:
      ValueError: an empty set.

    Example:
      >>> jlstm.data.majority([0, 1, 1], [1, 1, 0, 1])
      0.75
    """
    classes, counts = np.unique(_filled("majority", train_y), return_counts=True)
    guess = classes[counts.argmax()]
    return float(np.mean(_filled("majority", test_y) == guess))


def majority_by_symbol(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike
) -> float:
    """Scores the predictor that answers each symbol with its most frequent class.

    It is a tagger without context. A symbol that the training set lacks gets the most
    frequent class of all; if several classes are equally frequent, the lowest is taken.

    Args:
      train_x: the symbols of the training set, of any shape.
      train_y: their classes, of the same shape.
      test_x: the symbols of the test set.
      test_y: their classes.

    Returns:
      The accuracy on the test set.

    Raises:
      ValueError: a set is empty, or symbols and classes differ in shape.

    Example:
      >>> jlstm.data.majority_by_symbol([7, 7, 8], [1, 1, 0], [7, 8, 9], [1, 0, 1])
      1.0
    """
    where = "majority_by_symbol"
    train_x, train_y = _paired(where, "train", train_x, train_y)
    test_x, test_y = _paired(where, "test", test_x, test_y)
    symbols, x = np.unique(train_x, return_inverse=True)
    classes, y = np.unique(train_y, return_inverse=True)
    shape = len(symbols), len(classes)
    table = np.bincount(x.ravel() * len(classes) + y.ravel(), minlength=np.prod(shape))
    table = table.reshape(shape)
    found = _find(symbols, test_x)
    guess = np.where(found >= 0, table.argmax(1)[found], table.sum(0).argmax())
    return float(np.mean(classes[guess] == test_y))


def naive_bayes(
    train_xs: Sequence[ArrayLike],
    train_y: ArrayLike,
    test_xs: Sequence[ArrayLike],
    test_y: ArrayLike,
) -> float:
    r"""Scores multinomial naive Bayes, a classifier that ignores the order of symbols.

    With :math:`N(y)` the number of training sequences of class :math:`y` and
    :math:`N(x, y)` the number of symbols :math:`x` in them, it answers

    .. math::
      \hat y = \arg\max_y \log N(y) + \sum_t \log \frac{N(x_t, y) + 1}{N(y, \cdot) + V}

    Args:
      train_xs: the training sequences, each ``[T]`` of symbols, without padding.
      train_y: ``[N]``, one class for each sequence.
      test_xs: the test sequences. Symbols that training lacks are left out.
      test_y: their classes.

    Returns:
      The accuracy on the test set.

    Raises:
      ValueError: a set is empty, or there is not one class for each sequence.

    Example:
      >>> jlstm.data.naive_bayes([[1, 1], [2]], [0, 1], [[1, 3], [2, 2]], [0, 1])
      1.0
    """
    where = "naive_bayes"
    train_y, test_y = _filled(where, train_y), _filled(where, test_y)
    for name, xs, labels in ("train", train_xs, train_y), ("test", test_xs, test_y):
        if labels.shape != (len(xs),):
            raise ValueError(
                f"{where}: expected one class for each of the {len(xs)} sequences of "
                f"{name}_xs, got {name}_y of shape {labels.shape}"
            )
    classes, y = np.unique(train_y, return_inverse=True)
    symbols, x = np.unique(np.concatenate(train_xs), return_inverse=True)
    counts = np.ones((len(classes), len(symbols)))
    np.add.at(counts, (np.repeat(y, [np.size(xs) for xs in train_xs]), x), 1)
    likelihood = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.log(np.bincount(y))
    found = [_find(symbols, np.asarray(xs)) for xs in test_xs]
    scores = [prior + likelihood[:, ids[ids >= 0]].sum(1) for ids in found]
    return float(np.mean(classes[np.argmax(scores, 1)] == test_y))


def nearest_neighbour(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike
) -> float:
    """Scores the predictor that answers with the class of the nearest training example.

    Distances are Euclidean; of equally near examples, the first is taken.

    Args:
      train_x: ``[N, ...]``, training sequences of one length.
      train_y: ``[N]``, their classes.
      test_x: the test sequences, of the same shape.
      test_y: their classes.

    Returns:
      The accuracy on the test set.

    Raises:
      ValueError: a set is empty, or shapes do not fit.

    Example:
      >>> jlstm.data.nearest_neighbour([[0.0], [1.0]], [5, 6], [[0.4], [0.9]], [5, 6])
      1.0
    """
    where = "nearest_neighbour"
    train = _filled(where, train_x).astype(np.float64)
    test = _filled(where, test_x).astype(np.float64)
    labels, answers = _filled(where, train_y), _filled(where, test_y)
    shapes = [array.shape for array in (train, labels, test, answers)]
    if train.shape[1:] != test.shape[1:] or (shapes[1], shapes[3]) != (
        train.shape[:1],
        test.shape[:1],
    ):
        raise ValueError(
            f"{where}: expected train_x [N, ...], train_y [N], test_x [M, ...], test_y "
            f"[M], got shapes {shapes}"
        )
    train = train.reshape(len(train), -1)
    nearest = [
        ((train - row) ** 2).sum(1).argmin() for row in test.reshape(len(test), -1)
    ]
    return float(np.mean(labels[nearest] == answers))


def seasonal_naive(
    inputs: ArrayLike, target_length: int, *, period: int = 1
) -> np.ndarray:
    """Forecasts by repeating the last period of each series.

    With a period of 1 it repeats the last value; this is called *persistence*.

    Args:
      inputs: ``[B, T, ...]``, the steps before those to forecast.
      target_length: the number of steps to forecast.
      period: the length of the period in steps, such as 24 for hourly data that repeat
        daily.

    Returns:
      Forecasts ``[B, target_length, ...]``. Score them with the loss of your model.

    Raises:
      ValueError: the inputs are shorter than one period.

    Example:
      >>> jlstm.data.seasonal_naive([[1, 2, 3]], 4, period=2).tolist()
      [[2, 3, 2, 3]]
    """
    array = np.asarray(inputs)
    if period < 1 or array.ndim < 2 or array.shape[1] < period:
        raise ValueError(
            f"seasonal_naive: inputs must be [B, T, ...] with T >= period={period} "
            f">= 1, got shape {array.shape}"
        )
    return array[:, array.shape[1] - period + np.arange(target_length) % period]


def _find(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Finds the index of each element among sorted known ones, or -1."""
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, place, -1)


def _filled(where: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if not array.size:
        raise ValueError(f"{where}: expected at least one example, got none")
    return array


def _paired(
    where: str, name: str, x: ArrayLike, y: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = _filled(where, x), _filled(where, y)
    if xs.shape != ys.shape:
        raise ValueError(
            f"{where}: expected one class for each symbol, got {name}_x of shape "
            f"{xs.shape} and {name}_y of shape {ys.shape}"
        )
    return xs, ys


def _check_ids(where: str, name: str, ids: ArrayLike, num_symbols: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: {name} must be integers [N] with N >= 1, got {array.dtype} of "
            f"shape {array.shape}"
        )
    if array.min() < 0 or array.max() >= num_symbols:
        raise ValueError(
            f"{where}: {name} must lie in 0 ... {num_symbols - 1} (num_symbols="
            f"{num_symbols}), got {array.min()} ... {array.max()}"
        )
    return array.astype(np.int64)
