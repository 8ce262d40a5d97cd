"""Traces: the gates, the carries and the retention of every step."""

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
    r"""What one recurrence did on a batch, step by step; it prints as a table.

    The *retention* of a unit at a step says how much of its old carry the step keeps.
    It is the derivative of the new carry with respect to the old one, with the
    recurrent product held fixed:

    .. math::
        \kappa_t = \left.\frac{\partial c_t}{\partial c_{t-1}}\right|_{zx, zh}

    For the ``c`` of an LSTM it is the forget gate :math:`f_t`, for a GRU it is
    :math:`z_t`. For a cell that has a ``step`` only, it is the diagonal of the step's
    Jacobian. It belongs to the step itself: resets and masks do not change it.

    Attributes:
      path: the path of the recurrence in its layer, such as ``"stack[0]"``.
      cell: the cell.
      reverse: whether the steps were taken from the last to the first.
      gates: the gates and candidates by name, ``[B, T, H]``, after their activation:
        ``i`` is :math:`\sigma(a_i)`. If the cell gives no names, they are ``s0``,
        ``t1`` and so on, with the letters of :func:`jlstm.gates`.
      memory: the carry after each step, by the names of its parts, ``[B, T, H]`` or the
        shape of the cell. A real part ``re`` and an imaginary part ``im`` become one
        complex ``s``. At masked steps the carry is unchanged.
      retention: the retention, by the same names, of the same shape.
      initial: the incoming carry by the same names, ``[B, H]``.
      carries: the carry after each step in the structure of the cell, ``[B, T, ...]``.
      before: the carry from which each step began, in the same structure.
      outputs: the outputs ``[B, T, ...]``, zeros at masked steps.
      valid: true at valid steps, ``[B, T]``.
      begins: true where a reset gave the step the fresh carry, ``[B, T]``, at masked
        steps too.
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
        """The range of each gate by name, such as ``(0, 1)``; None if not known."""
        return {name: RANGES.get(kind) for name, kind in self.names[0]}

    @property
    def memory(self) -> dict[str, Array]:
        """The carry after each step, by the names of its parts, ``[B, T, H]``."""
        return dict(zip(self.names[1], self.values[1], strict=True))

    @property
    def retention(self) -> dict[str, Array]:
        """How much of the old carry each step keeps, by the names of its parts."""
        return dict(zip(self.names[1], self.values[2], strict=True))

    @property
    def initial(self) -> dict[str, Array]:
        """The incoming carry, by the names of its parts, ``[B, ...]``."""
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
    """The traces of all recurrences in a layer, by their paths.

    It is a mapping from paths such as ``"stack[0]"`` to :class:`Trace`, in the order in
    which the recurrences ran.

    Attributes:
      traces: the traces, in that order.
      outputs: what the layer returned: its outputs, or a model's answer.
      carry: the final carry of the layer.
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
