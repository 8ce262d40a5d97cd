"""A long text as parallel lanes, for truncated backpropagation through time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jlstm.data.pipeline import (
    Batch,
    check_positive,
    check_seed,
    describe,
    make_dataset,
    make_rng,
)

if TYPE_CHECKING:
    import grain


def lanes(
    ids: ArrayLike,
    *,
    batch_size: int,
    length: int,
    segment: int | None = None,
    seed: int | None = None,
) -> grain.MapDataset[Batch]:
    """Cuts a text into ``B`` lanes, and the lanes into chunks of ``T`` steps.

    Each batch is one chunk of every lane. Row by row, batch ``i + 1`` continues batch
    ``i``, so train on the batches in order and give each the carry of the one before.
    Symbols that do not fill a chunk in every lane are left out; with a seed, they are
    others in each epoch.

    A lane that reads on and on stays in one document for a long time, and a model that
    learns from few lanes adapts to them. With ``segment``, a lane jumps to a random
    other place after so many chunks, and ``resets`` is true there. An epoch still reads
    every segment once.

    Iterate over the result once for one epoch, or use ``.repeat(n)`` for several. Do
    not shuffle it.

    Args:
      ids: ``[N]``, the symbols of the text as integers. A memory map is read only where
        it is needed.
      batch_size: ``B``, the number of lanes.
      length: ``T``, the number of steps of a chunk, over which gradients flow.
      segment: the number of chunks that a lane reads before it jumps; None reads the
        lane to its end.
      seed: begins each epoch at another random offset, and shuffles the segments. None
        begins at the first symbol and keeps the order.

    Returns:
      A ``grain.MapDataset`` of one epoch. A batch is a dict with ``inputs [B, T]`` and
      ``targets [B, T]`` (the symbol after each input), both int32, and
      ``resets [B, T]``, true at the first step of a segment.

    Raises:
      ValueError: the text is too short for one chunk, or for one segment, in each lane.
      ImportError: grain is not installed.

    Example:
      >>> chunks = jlstm.data.lanes(np.arange(13), batch_size=2, length=3)
      >>> len(chunks), chunks[1]["inputs"].tolist(), chunks[1]["targets"].tolist()
      (2, [[3, 4, 5], [9, 10, 11]], [[4, 5, 6], [10, 11, 12]])
    """
    where = "lanes"
    stream = _check_stream(where, ids, batch_size, length)
    check_seed(where, seed)
    if segment is not None:
        check_positive(where, segment=segment)
    # Leaves room for any offset within a chunk, so that chunks may end anywhere.
    room = 0 if seed is None else length - 1
    num_chunks = (len(stream) - 1 - room) // (batch_size * length)
    run = num_chunks if segment is None else segment
    rounds = num_chunks // max(run, 1)
    if rounds < 1:
        raise ValueError(
            f"{where}: {len(stream)} symbols are too few for batch_size={batch_size}, "
            f"length={length} and segment={segment}, which need "
            f"{batch_size * length * (segment or 1) + 1 + room}; lower them"
        )
    slack = len(stream) - 1 - rounds * run * batch_size * length
    steps = np.arange(length + 1)

    def make(epoch: int, index: int) -> Batch:
        places = np.arange(rounds * batch_size).reshape(batch_size, rounds)
        offset = 0
        if seed is not None:
            rng = make_rng(seed, epoch)
            offset = int(rng.integers(slack + 1))
            if segment is not None:
                places = rng.permutation(places.ravel()).reshape(places.shape)
        turn, chunk = divmod(index, run)
        starts = offset + (places[:, turn, None] * run + chunk) * length
        window = stream[starts + steps].astype(np.int32)
        resets = np.zeros((batch_size, length), bool)
        resets[:, 0] = chunk == 0
        return {"inputs": window[:, :-1], "targets": window[:, 1:], "resets": resets}

    return make_dataset(
        where,
        rounds * run,
        make,
        batch_size=batch_size,
        length=length,
        segment=segment,
        seed=seed,
        source=describe(stream),
    )


def scoring_lanes(
    ids: ArrayLike, *, batch_size: int, length: int
) -> grain.MapDataset[Batch]:
    """Cuts a text into lanes for scoring, with every symbol as a target exactly once.

    Unlike :func:`lanes` it leaves nothing out: the score is over all ``N - 1`` targets.
    Each lane begins without the symbols before it. With a single lane
    (``batch_size=1``) the score is exactly that of the text; more lanes are faster.

    Args:
      ids: ``[N]``, the symbols of the text as integers. A memory map is read only where
        it is needed.
      batch_size: ``B``, the number of lanes, whose lengths differ by at most one step.
      length: ``T``, the number of steps of a chunk. It does not change the score, since
        the carry goes from chunk to chunk.

    Returns:
      A ``grain.MapDataset`` as that of :func:`lanes`, with ``lengths [B]`` as well,
      which fall below ``T`` at the end of the lanes. Symbols after them are 0.

    Raises:
      ValueError: the text has fewer than two symbols.
      ImportError: grain is not installed.

    Example:
      >>> chunks = jlstm.data.scoring_lanes(np.arange(8), batch_size=2, length=3)
      >>> [chunk["lengths"].tolist() for chunk in chunks]
      [[3, 3], [0, 1]]
    """
    where = "scoring_lanes"
    stream = _check_stream(where, ids, batch_size, length)
    if len(stream) < 2:
        raise ValueError(
            f"{where}: {len(stream)} symbols are too few for a target; give at least "
            "two"
        )
    bounds = np.arange(batch_size + 1) * (len(stream) - 1) // batch_size
    longest = int(np.diff(bounds).max())
    steps = np.arange(length + 1)

    def make(epoch: int, index: int) -> Batch:
        del epoch
        start = bounds[:-1] + index * length
        lengths = np.clip(bounds[1:] - start, 0, length).astype(np.int32)
        where_to = np.minimum(start[:, None] + steps, len(stream) - 1)
        chunk = stream[where_to].astype(np.int32)
        valid = steps[:-1] < lengths[:, None]
        resets = np.zeros((batch_size, length), bool)
        resets[:, 0] = index == 0
        return {
            "inputs": np.where(valid, chunk[:, :-1], 0),
            "targets": np.where(valid, chunk[:, 1:], 0),
            "resets": resets,
            "lengths": lengths,
        }

    return make_dataset(
        where,
        -(-longest // length),
        make,
        batch_size=batch_size,
        length=length,
        source=describe(stream),
    )


def _check_stream(
    where: str, ids: ArrayLike, batch_size: int, length: int
) -> np.ndarray:
    check_positive(where, batch_size=batch_size, length=length)
    stream = np.asanyarray(ids)
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: ids must be integers [N], got {stream.dtype} of shape "
            f"{stream.shape}; encode the text first"
        )
    return stream
