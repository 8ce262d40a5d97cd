"""What a call asks of a loop, apart from the cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

NEEDS_NUMBERS = "needs fixed sizes, got symbolic ones, as an exported program has"


class Request(NamedTuple):
    """The facts that decide whether a loop can run; ``None`` means not known yet.

    Attributes:
      platform: where the arrays are: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      dtypes: the names of the dtypes of params, inputs and carry.
      mask: how steps are masked: ``""`` not at all, ``"lengths"`` at the end of rows,
        ``"mask"`` anywhere.
      resets: whether the fresh carry is restored somewhere.
      reverse: whether steps are taken from the last to the first.
      return_carries: whether the carry after each step is wanted.
      checkpoint_every: whether a gradient computes steps again.
      sharded: whether the rows of a batch may lie on several devices.
      any_size: whether batch size or time are symbols, as in an exported program.
      inputs: the structure of ``xs``, and the shapes and dtypes of its leaves.
    """

    platform: str | None = None
    dtypes: frozenset[str] | None = None
    mask: str = ""
    resets: bool = False
    reverse: bool = False
    return_carries: bool = False
    checkpoint_every: bool = False
    sharded: bool = False
    any_size: bool = False
    inputs: tuple[Any, tuple] | None = None

    def exceeds(self, platform: str) -> str | None:
        """Says what a plain loop for float32 on one platform lacks, or ``None``.

        A plain loop stores every step, and takes a batch that lies on one device.
        """
        if self.any_size:
            return NEEDS_NUMBERS
        if self.platform not in (None, platform):
            place = {"cpu": "a CPU", "gpu": "a GPU"}[platform]
            return f"runs only on {place}, but the arrays are on a {self.platform}"
        if self.dtypes is not None and (others := self.dtypes - {"float32"}):
            return f"computes only in float32, got {', '.join(sorted(others))}"
        if self.return_carries:
            return "cannot return the carry of every step"
        if self.checkpoint_every:
            return "stores every step, so it cannot honour checkpoint_every"
        if self.sharded:
            return (
                "would gather rows that may lie on several devices; call it inside "
                "jax.shard_map"
            )
        return None


UNKNOWN = Request()


_in_one_place = ContextVar("in_one_place", default=False)


@contextlib.contextmanager
def rows_in_one_place() -> Iterator[None]:
    """Declares that what is traced inside has no batch cut over devices."""
    token = _in_one_place.set(True)
    try:
        yield
    finally:
        _in_one_place.reset(token)


def may_be_sharded() -> bool:
    """Tells whether the batch may be cut over devices; a reshape would gather it."""
    if _in_one_place.get():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.axis_names) == set(mesh.manual_axes)
    return jax.device_count() > 1 and not manual
