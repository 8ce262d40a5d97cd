"""Windows of a time series, and the times between observations."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jlstm.data.pipeline import check_positive


def windows(
    series: ArrayLike, *, input_length: int, target_length: int = 0, stride: int = 1
) -> dict[str, np.ndarray]:
    """Cuts a series into windows, each with the steps that follow it.

    The windows are read-only views, which take no memory; :func:`batches` copies only
    the rows of a batch. Split the series into training and test parts before you cut
    it: otherwise windows of one part overlap those of the other.

    Args:
      series: ``[N, ...]``, one entry for each time step.
      input_length: ``T``, the number of steps that the model sees.
      target_length: the number of steps after them, to be forecast; 0 for none.
      stride: the number of steps from the start of one window to the start of the next.
        1 gives all windows.

    Returns:
      A dict with ``inputs [B, T, ...]`` and, unless ``target_length`` is 0,
      ``targets [B, target_length, ...]``, for all windows that fit.

    Raises:
      ValueError: the series is shorter than one window.

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


def elapsed(mask: ArrayLike, times: ArrayLike) -> np.ndarray:
    r"""Computes the time since each variable was last observed, before each step.

    With :math:`s_t` the time of step t and :math:`m_t` its mask,

    .. math::
        \delta_t = s_t - s_{t-1} + (1 - m_{t-1}) \delta_{t-1}, \qquad \delta_1 = 0

    A variable that was never observed counts from the first step. ``jlstm.GRUDInput``
    takes the result as ``delta``.

    Args:
      mask: ``[T, D]``, true or 1 where a variable was observed.
      times: ``[T]``, the time of each step, in ascending order. Choose a unit in which
        typical gaps are about 1, such as hours or days.

    Returns:
      ``[T, D]``, float32, in the unit of ``times``.

    Raises:
      ValueError: shapes do not fit, or the times are not in order.

    Example:
      >>> observed = [[1, 0], [0, 1], [1, 1]]
      >>> jlstm.data.elapsed(observed, [0.0, 1.0, 4.0]).tolist()
      [[0.0, 0.0], [1.0, 1.0], [4.0, 3.0]]

    References:
      Che et al., Recurrent neural networks for multivariate time series with missing
      values, 2018.
    """
    where, seen, at = "elapsed", np.asarray(mask), np.asarray(times, np.float64)
    if seen.ndim != 2 or at.shape != seen.shape[:1]:
        raise ValueError(
            f"{where}: mask must be [T, D] and times [T], got {list(seen.shape)} and "
            f"{list(at.shape)}; give one sequence per call"
        )
    if not (np.diff(at) >= 0).all():
        raise ValueError(f"{where}: times must be in order and not NaN; sort the steps")
    # For each variable, the last step before this one at which it was observed.
    steps = np.where(seen > 0, np.arange(len(at))[:, None], 0)
    last = np.maximum.accumulate(steps, axis=0)[:-1]
    delta = np.zeros(seen.shape, np.float32)
    delta[1:] = at[1:, None] - at[last]
    return delta
