"""Sequences of different lengths as one padded array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jlstm.data.pipeline import check_positive


def pad(
    sequences: Sequence[ArrayLike], length: int | None = None, value: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences at their end to a common length.

    Args:
      sequences: ``B`` arrays ``[T_b, ...]`` of any lengths, zero included.
      length: the common length ``T``; None takes that of the longest sequence.
      value: the number that fills the padding. Layers ignore it under ``lengths``.

    Returns:
      The array ``[B, T, ...]``, in the dtype of the sequences, and ``lengths [B]``,
      int32.

    Raises:
      ValueError: there are no sequences, their shapes differ after the first axis, one
        is longer than ``length``, or ``value`` does not fit the dtype.

    Example:
      >>> xs, lengths = jlstm.data.pad([[1, 2, 3], [], [4]])
      >>> xs.tolist(), lengths.tolist()
      ([[1, 2, 3], [0, 0, 0], [4, 0, 0]], [3, 0, 1])
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays:
        raise ValueError("pad: expected at least one sequence, got none")
    # The dtype and the inner shape of an empty list mean nothing.
    example = next((array for array in arrays if array.size), arrays[0])
    for index, array in enumerate(arrays):
        if array.ndim == 0 or (len(array) and array.shape[1:] != example.shape[1:]):
            raise ValueError(
                f"pad: sequence {index} has shape {array.shape}, expected "
                f"(T, *{example.shape[1:]}); make the inner shapes equal"
            )
    lengths = np.array([len(array) for array in arrays], np.int32)
    if length is None:
        length = int(lengths.max())
    elif length < lengths.max():
        raise ValueError(
            f"pad: sequence {lengths.argmax()} has length {lengths.max()}, longer than "
            f"length={length}; raise length or cut the sequence"
        )
    dtype = np.result_type(*[a.dtype for a in arrays if a.size] or [example.dtype])
    fill = np.asarray(value).astype(dtype)
    if dtype.kind in "biu" and fill != value:
        raise ValueError(f"pad: value={value!r} does not fit the dtype {dtype}")
    padded = np.full((len(arrays), length, *example.shape[1:]), fill, dtype)
    for row, array in zip(padded, arrays, strict=True):
        if len(array):
            row[: len(array)] = array
    return padded, lengths


def bucket_lengths(lengths: ArrayLike, num_buckets: int) -> tuple[int, ...]:
    r"""Chooses the padded lengths that need the least padding.

    Among all sets of at most ``num_buckets`` lengths it finds one that minimises the
    number of padded steps,

    .. math:: \sum_i \min\{\ell : \ell \ge \mathrm{lengths}_i\} - \mathrm{lengths}_i

    exactly, by dynamic programming over the distinct lengths.

    Args:
      lengths: ``[N]``, the length of each example.
      num_buckets: the largest number of padded lengths. Each is a shape for which a
        step is compiled.

    Returns:
      The padded lengths, in ascending order; the last is the longest of ``lengths``.

    Raises:
      ValueError: there are no lengths, one is negative, or ``num_buckets`` is below 1.

    Example:
      >>> jlstm.data.bucket_lengths([1, 2, 2, 9, 10], num_buckets=2)
      (2, 10)
    """
    where = "bucket_lengths"
    check_positive(where, num_buckets=num_buckets)
    array = np.asarray(lengths)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: lengths must be integers [N] with N >= 1, got "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.min() < 0:
        raise ValueError(f"{where}: lengths must be >= 0, got {array.min()}")
    sizes, counts = np.unique(array.astype(np.int64), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    buckets = min(num_buckets, len(sizes))
    # cost[b, j]: the steps that the j shortest sizes need in b buckets.
    unreachable = int(sizes[-1] * below[-1]) + 1
    cost = np.full((buckets + 1, len(sizes) + 1), unreachable)
    cost[0, 0] = 0
    split = np.zeros_like(cost)
    for j, size in enumerate(sizes, start=1):
        candidates = cost[:-1, :j] + size * (below[j] - below[:j])
        split[1:, j] = candidates.argmin(1)
        cost[1:, j] = np.minimum(candidates.min(1), unreachable)
    chosen, j = [], len(sizes)
    for b in range(buckets, 0, -1):
        chosen.append(int(sizes[j - 1]))
        j = split[b, j]
    return tuple(reversed(chosen))
