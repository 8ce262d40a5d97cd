"""What all pipelines share: epochs over a grain dataset, checks, and plain batches."""

from __future__ import annotations

import functools
import hashlib
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


def make_dataset(
    where: str, length: int, make: Callable[[int, int], Batch], /, **about: Any
) -> grain.MapDataset[Batch]:
    """Makes a grain dataset of ``make(epoch, index)``, with ``index < length``.

    Grain passes indices beyond the first epoch on as they are. With ``repeat``, each
    epoch therefore has an order of its own, and random access is exact. ``about``, the
    options and the source, becomes an attribute of the mapped function.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            f'{where}: grain is not installed; run pip install "jlstm[train]"'
        ) from error

    def get(index: int, _: object) -> Batch:
        return make(max(index // length, 0), index % length)

    get.about = {"kind": where, **about}  # type: ignore[attr-defined]
    return grain.MapDataset.range(length).map_with_index(get)


# Larger arrays are hashed in part, since a whole memory map takes long to read.
_HASHED = 1 << 30


def describe(array: np.ndarray) -> str:
    """Describes an array by its dtype, its shape and the SHA-256 of its contents."""
    digest = hashlib.sha256()
    rows = array.reshape(-1)
    if array.dtype.hasobject:
        digest.update(repr(array.tolist()).encode())
    elif array.nbytes <= _HASHED:
        digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
    else:
        # Blocks at even distances, the two ends included.
        block = (1 << 20) // max(array.itemsize, 1)
        for start in np.linspace(0, len(rows) - block, 1024).astype(int):
            digest.update(np.ascontiguousarray(rows[start : start + block]).data)
    return f"{array.dtype}{list(array.shape)} sha256 {digest.hexdigest()}"


def make_rng(seed: int, epoch: int) -> np.random.Generator:
    """Makes the random generator of one epoch, the same wherever a run continues."""
    return np.random.default_rng((seed, epoch))


def check_positive(where: str, **values: int) -> None:
    """Refuses what is not a positive integer."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{where}: {name} must be an integer >= 1, got {value!r}")


def check_seed(where: str, seed: int | None) -> None:
    """Refuses what is neither ``None`` nor an integer of at least zero."""
    if seed is not None and (not isinstance(seed, numbers.Integral) or seed < 0):
        raise ValueError(f"{where}: seed must be None or an integer >= 0, got {seed!r}")


def batches(
    arrays: Mapping[str, ArrayLike],
    *,
    batch_size: int,
    seed: int | None = None,
    drop_remainder: bool = False,
) -> grain.MapDataset[Batch]:
    """Makes batches from arrays whose rows are the examples.

    Iterate over the result once for one epoch, or use ``.repeat(n)`` for several.

    Args:
      arrays: a dict of arrays ``[N, ...]``, all with the same ``N``. They are read only
        when a batch is made, so memory maps and views such as :func:`windows` makes are
        never copied whole.
      batch_size: the number of rows of a batch.
      seed: shuffles, each epoch differently; None keeps the rows in order.
      drop_remainder: whether to leave out the last rows if they do not fill a batch;
        otherwise they make a smaller batch, for which a step is compiled once more.

    Returns:
      A ``grain.MapDataset`` of one epoch; a batch is a dict of arrays ``[B, ...]``.

    Raises:
      ValueError: the arrays differ in length, or are too short for one batch.
      ImportError: grain is not installed.

    Example:
      >>> xs = {"xs": np.arange(5), "labels": np.arange(5) % 2}
      >>> for batch in jlstm.data.batches(xs, batch_size=3):
      ...     print(batch["xs"], batch["labels"])
      [0 1 2] [0 1 0]
      [3 4] [1 0]
    """
    where = "batches"
    check_positive(where, batch_size=batch_size)
    check_seed(where, seed)
    columns = {name: np.asanyarray(array) for name, array in arrays.items()}
    sizes = {column.shape[:1] for column in columns.values()}
    if len(sizes) != 1 or () in sizes:
        shapes = {name: column.shape for name, column in columns.items()}
        raise ValueError(
            f"{where}: expected arrays [N, ...] of one N, got shapes {shapes}"
        )
    ((size,),) = sizes
    length = size // batch_size if drop_remainder else -(-size // batch_size)
    if length == 0:
        raise ValueError(
            f"{where}: {size} rows do not fill a batch of {batch_size}; lower "
            "batch_size"
        )

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rows = np.arange(size)
        return rows if seed is None else make_rng(seed, epoch).permutation(rows)

    def make(epoch: int, index: int) -> Batch:
        rows = order(epoch)[index * batch_size : (index + 1) * batch_size]
        return {name: column[rows] for name, column in columns.items()}

    return make_dataset(
        where,
        length,
        make,
        batch_size=batch_size,
        seed=seed,
        drop_remainder=drop_remainder,
        source={name: describe(column) for name, column in columns.items()},
    )
