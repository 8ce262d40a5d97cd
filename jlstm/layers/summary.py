"""The layers that a layer or model is made of, in one table."""

from __future__ import annotations

import dataclasses
import math

import jax

from jlstm import door
from jlstm.layers.recurrent import RNN, Row, check_layer_field, recording, run_layer
from jlstm.types import Layer, PyTree

ROOT = ""


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One layer of a summary.

    Attributes:
      path: the names of its place, outermost first.
      layer: the layer, as it prints.
      output: the shapes of its outputs.
      params: the number of scalars in its params.
      carry_bytes: the size of its carry.
      implementation: the loop that would run it; empty if it has no recurrence.
    """

    path: tuple[str, ...]
    layer: str
    output: str
    params: int
    carry_bytes: int
    implementation: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of layers that prints itself.

    Attributes:
      rows: one entry for each line, with the fields ``path``, ``layer``, ``output``,
        ``params``, ``carry_bytes`` and ``implementation``.
    """

    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        head = (
            "layer",
            "output",
            "params",
            "carry bytes",
            "implementation",
        )
        table: list[tuple[str, ...]] = [head]
        for row in self.rows:
            indent = "  " * (len(row.path) - 1)
            name = f"{row.path[-1]}: " if row.path[-1] else ""
            table.append(
                (
                    f"{indent}{name}{row.layer}",
                    row.output,
                    f"{row.params:,}",
                    f"{row.carry_bytes:,}",
                    row.implementation,
                )
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = []
        for cells in table:
            left = [c.ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True)]
            right = [c.rjust(w) for c, w in zip(cells[2:4], widths[2:4], strict=True)]
            lines.append("  ".join([*left, *right, cells[4]]).rstrip())
        return "\n".join(lines)


def summary(layer: Layer, xs: PyTree) -> Summary:
    """Lists the layers of a layer or model, with shapes, params and implementations.

    Nothing is computed: of ``xs`` only shapes and dtypes are read.

    Args:
      layer: a layer or model.
      xs: an example of its input, ``[B, T, ...]``; arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A :class:`Summary`, which ``print`` shows as a table: for each layer its output
      shapes, the number of its params, the bytes of its carry for this batch, and the
      loop that runs it.

    Raises:
      TypeError: a cell is in the place of the layer.

    Example:
      >>> print(jlstm.summary(jlstm.RNN(jlstm.Elman(4)), jnp.ones((2, 5, 3))))
      layer          output     params  carry bytes  implementation
      RNN(Elman(4))  [2, 5, 4]      32           32  fused
    """
    check_layer_field("summary", layer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(layer.init, key, xs)
    with recording() as rows:
        jax.eval_shape(lambda p, x: run_layer(ROOT, layer, p, x), params, xs)
    depths = [len(row.path) for row in rows]
    made = []
    for i, row in enumerate(rows):
        has_parts = i + 1 < len(rows) and depths[i + 1] > depths[i]
        made.append(_summarise(row, has_parts))
    return Summary(tuple(made))


def _summarise(row: Row, has_parts: bool) -> SummaryRow:
    params, carry = jax.tree.leaves(row.params), jax.tree.leaves(row.carry)
    implementation = ""
    if isinstance(row.layer, RNN):
        implementation = door.explain(
            row.layer.cell,
            (row.params, row.ys),
            checkpoint_every=row.layer.checkpoint_every,
            implementation=row.layer.implementation,
        ).implementation
    return SummaryRow(
        path=row.path,
        # The parts of a layer have rows of their own.
        layer=type(row.layer).__name__ if has_parts else repr(row.layer),
        output=door.shapes(row.ys),
        params=sum(math.prod(leaf.shape) for leaf in params),
        carry_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in carry),
        implementation=implementation,
    )
