"""Windows of a time series."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jlstm.data.pipeline import check_positive


def windows(
    series: ArrayLike, *, input_length: int, target_length: int = 0, stride: int = 1
) -> dict[str, np.ndarray]:
    """Cuts a series into windows, each with the steps that follow it.

    They are read-only views and take no memory; :func:`batches` copies only the rows
    of a batch. Split a series in time before it is cut, else windows of the two parts
    overlap.

    Args:
      series: ``[N, ...]``.
      input_length: ``T``, the steps of a window.
      target_length: the steps to forecast after it.
      stride: the steps between the beginnings of two windows.

    Returns:
      ``inputs [B, T, ...]`` and, unless ``target_length`` is 0,
      ``targets [B, target_length, ...]``, for all windows that fit.

    Raises:
      ValueError: a series shorter than one window.

    Example:
      >>> cut = jlstm.data.windows(np.arange(6), input_length=3, target_length=1)
      >>> cut["inputs"].tolist(), cut["targets"].tolist()
      ([[0, 1, 2], [1, 2, 3], [2, 3, 4]], [[3], [4], [5]])
    """
    where = "windows"
    check_positive(where, input_length=input_length, stride=stride)
    if target_length < 0:
        raise ValueError(f"{where}: target_length must be >= 0, got {target_length}")
    array = np.asanyarray(series)
    span = input_length + target_length
    if array.ndim == 0 or len(array) < span:
        raise ValueError(
            f"{where}: series must be [N, ...] with N >= {span} (input_length="
            f"{input_length}, target_length={target_length}), got shape {array.shape}"
        )
    views = np.lib.stride_tricks.sliding_window_view(array, span, axis=0)[::stride]
    views = np.moveaxis(views, -1, 1)
    cut = {"inputs": views[:, :input_length]}
    if target_length:
        cut["targets"] = views[:, input_length:]
    return cut
