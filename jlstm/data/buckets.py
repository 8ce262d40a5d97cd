"""Padded batches of sequences of similar length, in a bounded number of shapes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from jlstm.data.padding import bucket_lengths, pad
from jlstm.data.pipeline import (
    Batch,
    check_positive,
    check_seed,
    make_dataset,
    make_rng,
)

if TYPE_CHECKING:
    import grain

Example = Mapping[str, ArrayLike]


def bucketed(
    examples: Sequence[Example],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    num_buckets: int = 8,
    seed: int | None = None,
    drop_remainder: bool = False,
    own_lengths: Collection[str] = (),
    static: Collection[str] = (),
) -> grain.MapDataset[Batch]:
    """Batches sequences of similar length, and pads each batch to a common length.

    The examples are divided into at most ``num_buckets`` buckets by length, and each
    batch comes from one bucket. There are then at most ``num_buckets`` shapes, so a
    compiled step is compiled at most that often; :func:`bucket_lengths` chooses the
    lengths so that least padding is needed.

    Every example comes exactly once in an epoch. If a bucket does not fill its last
    batch, rows of length 0 are added at the end. With ``lengths`` they contribute no
    loss and no gradient; where each row has a single label, ``lengths > 0`` is the mask
    of the real rows.

    Iterate over the result once for one epoch, or use ``.repeat(n)`` for several.

    Args:
      examples: a sequence of dicts of arrays, one for each example. Arrays
        ``[T, ...]`` are padded, scalars are stacked.
      batch_size: the number of rows of every batch. Give either this or ``max_tokens``.
      max_tokens: the largest ``B * T`` of a batch, padding included. Buckets of short
        sequences then have more rows, and batches need about the same memory.
      num_buckets: the largest number of padded lengths. More buckets mean less padding
        and more compilations.
      seed: shuffles, each epoch differently. None keeps the order of the examples
        within a bucket and takes the buckets from short to long.
      drop_remainder: whether to leave out batches that are not full.
      own_lengths: the names of fields that have a length of their own, such as the
        target sentences of a translation. For a field ``target`` the batch also has
        ``target_lengths``.
      static: the names of fields without a time axis, such as a speaker's vector. They
        are stacked, not padded.

    Returns:
      A ``grain.MapDataset`` of one epoch. A batch is a dict of arrays ``[B, T, ...]``,
      or ``[B, ...]`` for scalars and static fields, with ``lengths [B]``.

    Raises:
      ValueError: the examples are a dict of arrays, an example is empty, its fields
        differ in length or it is longer than ``max_tokens``; or not exactly one of
        ``batch_size`` and ``max_tokens`` is given.
      ImportError: grain is not installed.

    Example:
      >>> examples = [{"xs": np.ones(length)} for length in (3, 9, 2)]
      >>> for b in jlstm.data.bucketed(examples, batch_size=2, num_buckets=2):
      ...     print(b["xs"].shape, b["lengths"])
      (2, 3) [3 2]
      (2, 9) [9 0]
    """
    where = "bucketed"
    check_seed(where, seed)
    if isinstance(examples, Mapping):
        raise ValueError(
            f"{where}: examples must be a sequence of dicts, got one "
            f"{type(examples).__name__}, of {sorted(map(str, examples))}; write "
            "[{name: value, ...}, ...], or batches(...) for arrays of one length"
        )
    if (batch_size is None) == (max_tokens is None):
        raise ValueError(f"{where}: give exactly one of batch_size and max_tokens")
    check_positive(where, **{"batch_size": batch_size or max_tokens or 0})
    if not len(examples):
        raise ValueError(f"{where}: expected at least one example, got none")
    kinds = _field_kinds(examples[0], own_lengths, static)
    table = np.array([_measure(i, examples[i], kinds) for i in range(len(examples))])
    # The columns of the table: the common length, then the length of each other field.
    columns = ["", *own_lengths]
    edges = bucket_lengths(table[:, 0], num_buckets)
    bucket_of = np.searchsorted(edges, table[:, 0])
    members = [np.flatnonzero(bucket_of == b) for b in range(len(edges))]
    shapes = [
        dict(zip(columns, table[m].max(0).tolist(), strict=True)) for m in members
    ]
    rows = [batch_size or (max_tokens or 0) // max(s.values()) for s in shapes]
    if not min(rows):
        longest = max(max(shape.values()) for shape in shapes)
        raise ValueError(
            f"{where}: max_tokens={max_tokens} does not hold the longest example, of "
            f"length {longest}; raise it or cut the example"
        )

    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = None if seed is None else make_rng(seed, epoch)
        chunks = []
        for bucket, (member, size) in enumerate(zip(members, rows, strict=True)):
            order = member if rng is None else rng.permutation(member)
            stop = len(order) - len(order) % size if drop_remainder else len(order)
            chunks += [(bucket, order[i : i + size]) for i in range(0, stop, size)]
        if rng is not None:
            chunks = [chunks[i] for i in rng.permutation(len(chunks))]
        return chunks

    def make(epoch: int, index: int) -> Batch:
        bucket, order = plan(epoch)[index]
        chosen = [examples[i] for i in order]
        return _collate(chosen, rows[bucket], shapes[bucket], kinds)

    length = len(plan(0))
    if not length:
        raise ValueError(
            f"{where}: {len(examples)} examples do not fill a batch of {max(rows)} "
            "rows; lower the batch size, or leave out drop_remainder"
        )
    return make_dataset(
        where,
        length,
        make,
        batch_size=batch_size,
        max_tokens=max_tokens,
        num_buckets=num_buckets,
        seed=seed,
        drop_remainder=drop_remainder,
        examples=len(examples),
        source=_digest(examples),
    )


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for i in range(len(examples)):
        for name, value in examples[i].items():
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return f"sha256 {digest.hexdigest()}"


def _field_kinds(
    example: Example, own_lengths: Collection[str], static: Collection[str]
) -> dict[str, str | None]:
    """Tells whose length each field has: the common one, its own, or ``None``."""
    if not isinstance(example, Mapping):
        raise ValueError(
            "bucketed: examples must be dicts, got example 0 of type "
            f"{type(example).__name__}; write [{{name: value, ...}}, ...]"
        )
    unknown = sorted({*own_lengths, *static} - set(example))
    if unknown:
        raise ValueError(
            f"bucketed: own_lengths and static name {unknown}, but the examples have "
            f"{sorted(example)}"
        )
    kinds: dict[str, str | None] = {}
    for name, value in example.items():
        timeless = name in static or np.ndim(value) == 0
        kinds[name] = None if timeless else name if name in own_lengths else ""
    reserved = {"lengths", *(f"{name}_lengths" for name in own_lengths)} & set(example)
    if reserved:
        raise ValueError(
            f"bucketed: the batch has fields {sorted(reserved)} of its own; rename "
            "those of the examples"
        )
    if "" not in kinds.values():
        raise ValueError(
            f"bucketed: of the fields {sorted(example)} none gives the length; leave "
            "one array [T, ...] out of own_lengths and static"
        )
    return kinds


def _measure(
    index: int, example: Example, kinds: Mapping[str, str | None]
) -> list[int]:
    """Measures an example: its common length, then each field's own length."""
    if set(example) != set(kinds):
        raise ValueError(
            f"bucketed: example {index} has the fields {sorted(example)}, example 0 "
            f"has {sorted(kinds)}; give all examples the same fields"
        )
    timed = {
        name: len(np.asarray(example[name]))
        for name, kind in kinds.items()
        if kind is not None
    }
    common = {name: n for name, n in timed.items() if kinds[name] == ""}
    if len(set(common.values())) != 1:
        raise ValueError(
            f"bucketed: example {index}: fields differ in length: {common}; name those "
            "with a length of their own in own_lengths, those without time in static; "
            "one number for the whole sequence is a scalar, not an array of one"
        )
    length = next(iter(common.values()))
    if length == 0:
        raise ValueError(
            f"bucketed: example {index} has length 0, which marks the rows that fill "
            "up a batch; leave it out, or give it one padding symbol"
        )
    return [length, *(n for name, n in timed.items() if kinds[name] == name)]


def _collate(
    examples: Sequence[Example],
    rows: int,
    shape: Mapping[str, int],
    kinds: Mapping[str, str | None],
) -> Batch:
    missing = rows - len(examples)
    batch: Batch = {}
    for name, kind in kinds.items():
        values = [np.asarray(example[name]) for example in examples]
        if kind is None:
            batch[name] = np.stack(values + missing * [np.zeros_like(values[0])])
        else:
            empty = missing * [values[0][:0]]
            batch[name], lengths = pad(values + empty, shape[kind])
            batch[f"{kind}_lengths" if kind else "lengths"] = lengths
    return batch
