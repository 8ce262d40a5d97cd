"""What a trace holds: gates, carries and retention of every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import struct

from jlstm.types import Array, PyTree

RANGES = {"s": (0.0, 1.0), "t": (-1.0, 1.0)}


@struct.dataclass
class Trace:
    r"""What one recurrence did over a batch; prints itself as a table.

    The retention of a unit at a step is the derivative of its new carry by its old one,
    the recurrent product held: how much of what was there is kept,

    .. math::
        r_t = \left.\frac{\partial c_t}{\partial c_{t-1}}\right|_{zx, zh}

    which is the forget gate for the ``c`` of an LSTM, and z for a GRU. Of a cell that
    has a ``step`` alone it is the diagonal of the step's Jacobian. It is that of the
    step itself: a boundary before it or a mask does not count.

    Attributes:
      path: where the recurrence stands in its layer.
      cell: the cell.
      reverse: whether the steps were taken from the last to the first.
      gates: the gates by name, ``[B, T, H]``; those that a user's cell did not name are
        ``s0``, ``t1`` and so on, by the letters of :func:`jlstm.gates`.
      memory: the carry after each step by name, ``[B, T, H]`` or what the cell has; a
        ``re`` and an ``im`` are one complex ``s``. Masked steps hold it.
      retention: by the same names, of the same shape.
      initial: the incoming carry by the same names, ``[B, H]``.
      carries: the carry after each step as the cell has it, ``[B, T, ...]`` each.
      before: the carry that each step began from, in the same form.
      outputs: ``[B, T, ...]``, zeros at masked steps.
      valid: ``[B, T]`` booleans, false at masked steps.
      begins: ``[B, T]`` booleans, true where a reset gave the step the fresh carry; at
        masked steps too.
    """

    path: str = struct.field(pytree_node=False)
    cell: Any = struct.field(pytree_node=False)
    reverse: bool = struct.field(pytree_node=False)
    names: tuple[tuple[tuple[str, str], ...], tuple[str, ...]] = struct.field(
        pytree_node=False
    )
    values: tuple[tuple[Array, ...], ...]  # gates, memory, retention, initial
    carries: PyTree
    before: PyTree
    outputs: PyTree
    valid: Array
    begins: Array

    @property
    def gates(self) -> dict[str, Array]:
        """The gates by name, ``[B, T, H]``."""
        names = (name for name, _ in self.names[0])
        return dict(zip(names, self.values[0], strict=True))

    @property
    def ranges(self) -> dict[str, tuple[float, float] | None]:
        """Between which values each gate lies; ``None`` if that is not known."""
        return {name: RANGES.get(kind) for name, kind in self.names[0]}

    @property
    def memory(self) -> dict[str, Array]:
        """The carry after each step by name."""
        return dict(zip(self.names[1], self.values[1], strict=True))

    @property
    def retention(self) -> dict[str, Array]:
        """The derivative of each unit's carry by the one before, by name."""
        return dict(zip(self.names[1], self.values[2], strict=True))

    @property
    def initial(self) -> dict[str, Array]:
        """The incoming carry by name, ``[B, ...]``."""
        return dict(zip(self.names[1], self.values[3], strict=True))

    def __repr__(self) -> str:
        valid = np.asarray(self.valid)
        (rows, steps), count = valid.shape, int(valid.sum())
        where = f"{self.path}: " if self.path else ""
        order = ", in reverse" if self.reverse else ""
        lines = [f"{where}{self.cell!r}, {rows} rows of {steps} steps{order}"]
        lines[0] += "" if count == valid.size else f", {count} valid"
        kept = {f"retention of {k}": v for k, v in self.retention.items()}
        for name, value in {**self.gates, **self.memory, **kept}.items():
            seen = np.asarray(value)[valid]
            seen = np.abs(seen) if np.iscomplexobj(seen) else seen.astype(np.float64)
            shape = list(value.shape[2:])
            if not seen.size:
                lines.append(f"  {name} {shape}")
                continue
            low, high = np.quantile(seen, [0.05, 0.95])
            lines.append(
                f"  {name} {shape}: mean {seen.mean():.3g}, 90 % within "
                f"{low:.3g} .. {high:.3g}"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, repr=False)
class Traces(Mapping[str, Trace]):
    """The traces of a layer's recurrences by path, in the order in which they ran.

    Attributes:
      outputs: what the layer returned, outputs or answers.
      carry: its final carry.
    """

    traces: tuple[Trace, ...]
    outputs: PyTree
    carry: PyTree

    def __getitem__(self, path: str) -> Trace:
        for each in self.traces:
            if each.path == path:
                return each
        raise KeyError(f"{path!r}; there are {', '.join(map(repr, self))}")

    def __iter__(self) -> Iterator[str]:
        return (each.path for each in self.traces)

    def __len__(self) -> int:
        return len(self.traces)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.traces))
