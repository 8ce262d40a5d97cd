"""Wrappers: cells around cells, in gated form if the inner cell is."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from jlstm.types import Array, Cell, Policy, PyTree, cast, config, gated


class Prepared(NamedTuple):
    """Params of a wrapped cell, and what its wrapper needs at all steps."""

    cell: PyTree
    extra: PyTree


class Beside(NamedTuple):
    """Inputs of a wrapped cell, and what its wrapper needs at that step."""

    cell: PyTree
    extra: PyTree


class Wrapper:
    """A cell around another one, ``self.cell``; the base class of wrappers.

    A wrapper of your own is a config that derives from this class, has a field ``cell``
    and defines one or both of two methods: :meth:`before` runs once a sequence, before
    the loop, and :meth:`after` at the end of each step. Everything else is done by the
    inner cell, so the wrapper runs in the fused loop if the inner cell does.
    """

    cell: Any

    @property
    def gated(self) -> bool:
        """Whether the inner cell is written in gated form."""
        return gated(self.cell)

    @property
    def x_ndim(self) -> int:
        """The number of feature dimensions of the inner cell's input."""
        return getattr(self.cell, "x_ndim", 1)

    def before(
        self, params: PyTree, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Changes the params and inputs of the inner cell, once a sequence.

        Args:
          params: the params of the inner cell.
          xs: the inputs, ``[B, T, ...]``.
          key: a typed key for noise; ``None`` means no noise.

        Returns:
          ``(params, xs, always, each)``: the two that the inner cell gets; what the
          wrapper needs at all steps alike, with leaves ``[B, ...]`` or without a batch,
          which it finds as ``params.extra`` in ``mix`` and ``update``; and what it
          needs at each step, with leaves ``[B, T, ...]``, which :meth:`after` gets.
          ``None`` stands for nothing.
        """
        del key
        return params, xs, None, None

    def after(
        self, extra: PyTree, old: PyTree, new: PyTree, y: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Changes the carry and the output at the end of a step.

        Args:
          extra: this step's part of ``each``, from :meth:`before`.
          old: the carry before the step.
          new: the carry that the inner cell returned.
          y: the output that the inner cell returned.

        Returns:
          ``(carry, y)``, in the place of ``new`` and ``y``.
        """
        del extra, old
        return new, y

    def init(self, key: Array, x: PyTree) -> PyTree:
        """Makes the inner cell's params for inputs like ``x``."""
        return self.cell.init(key, x)

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> PyTree:
        """Makes the inner cell's fresh carry."""
        return self.cell.init_carry(params, batch_shape)

    def prepare(
        self, params: PyTree, xs: PyTree, *, key: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        """Calls :meth:`before`, and then the inner cell's ``prepare`` if it has one."""
        own, inner = (None, None) if key is None else jax.random.split(key)
        params, xs, always, each = self.before(params, xs, own)
        params, xs = prepare(self.cell, params, xs, inner)
        return Prepared(params, always), Beside(xs, each)

    def project(self, params: Any, x: Any) -> PyTree:
        """Projects as the inner cell does."""
        return Beside(self.cell.project(params.cell, x.cell), x.extra)

    def mix(self, params: Any, carry: PyTree, zx: Any) -> PyTree:
        """Mixes as the inner cell does."""
        return self.cell.mix(params.cell, carry, zx.cell)

    def update(
        self, params: Any, carry: PyTree, zx: Any, zh: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Updates as the inner cell does, and then calls :meth:`after`."""
        new, y = self.cell.update(params.cell, carry, zx.cell, zh)
        return self.after(zx.extra, carry, new, y)

    def step(self, params: Any, carry: PyTree, x: Any) -> tuple[PyTree, PyTree]:
        """Advances one step: the inner cell's, and then :meth:`after`."""
        if self.gated:
            zx = self.project(params, x)
            return self.update(params, carry, zx, self.mix(params, carry, zx))
        new, y = self.cell.step(params.cell, carry, x.cell)
        return self.after(x.extra, carry, new, y)


class PrecisionParams(NamedTuple):
    """Params in the dtypes of a policy, cast once a sequence."""

    compute: PyTree
    gates: PyTree


@config
class Precision(Wrapper):
    """Runs a cell under a dtype policy; layers make it from their ``policy``.

    The products of ``project`` and ``mix`` are computed in ``policy.compute``. All that
    ``update`` reads, pre-activations and params, is in ``policy.accumulate``, or where
    that is ``None`` in ``policy.carry``, or else in ``policy.compute``; a product
    inside ``update`` is computed in that dtype too. A cell that is not in gated form
    runs as a whole in ``policy.compute``.

    Attributes:
      cell: any cell.
      policy: the dtypes; see :class:`jlstm.Policy`.

    Example:
      >>> cell = jlstm.Precision(jlstm.LSTM(8), jlstm.Policy(compute=jnp.bfloat16))
      >>> params = cell.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> ys, _ = jlstm.unroll(cell, params, jnp.ones((2, 5, 3)))
      >>> ys.dtype.name
      'bfloat16'
    """

    cell: Any
    policy: Policy

    @property
    def _gates_dtype(self) -> Any:
        policy = self.policy
        return policy.accumulate or policy.carry or policy.compute

    def init(self, key: Array, x: PyTree) -> PyTree:
        """Makes params, in ``policy.param``."""
        param = self.policy.param
        return cast(self.cell.init(key, cast(x, param)), param)

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> PyTree:
        """Makes the fresh carry, in ``policy.carry``."""
        return cast(self.cell.init_carry(params, batch_shape), self.policy.carry)

    def prepare(
        self, params: PyTree, xs: PyTree, *, key: Array | None = None
    ) -> tuple[PrecisionParams, PyTree]:
        """Casts params and inputs once, outside the loop."""
        params, xs = cast((params, xs), self.policy.compute)
        params, xs = prepare(self.cell, params, xs, key)
        return PrecisionParams(params, cast(params, self._gates_dtype)), xs

    def project(self, params: PrecisionParams, x: PyTree) -> PyTree:
        """Projects in ``compute``, and hands on in ``accumulate``."""
        return cast(self.cell.project(params.compute, x), self._gates_dtype)

    def mix(self, params: PrecisionParams, carry: PyTree, zx: PyTree) -> PyTree:
        """Mixes in ``compute``, and hands on in ``accumulate``."""
        carry, zx = cast((carry, zx), self.policy.compute)
        return cast(self.cell.mix(params.compute, carry, zx), self._gates_dtype)

    def update(
        self, params: PrecisionParams, carry: PyTree, zx: PyTree, zh: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Applies the gates in ``accumulate``."""
        carry = cast(carry, self._gates_dtype)
        return self._out(*self.cell.update(params.gates, carry, zx, zh))

    def step(
        self, params: PrecisionParams, carry: PyTree, x: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Advances one step."""
        if self.gated:
            zx = self.project(params, x)
            return self.update(params, carry, zx, self.mix(params, carry, zx))
        carry = cast(carry, self.policy.compute)
        return self._out(*self.cell.step(params.compute, carry, x))

    def _out(self, carry: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        return cast(carry, self.policy.carry), cast(y, self.policy.compute)


class LookupParams(NamedTuple):
    """Params of a cell and the table of its inputs."""

    cell: PyTree
    table: PyTree  # [V, D]; prepared, what the cell makes of its rows


@config
class Lookup(Wrapper):
    r"""Runs a gated cell on rows of a table, given their ids.

    .. math::
        z^x_t = \mathrm{project}(\theta, E)_{x_t} \quad \text{instead of} \quad
        \mathrm{project}(\theta, E_{x_t})

    so that a table of few rows goes through ``project`` once, not once a step.
    """

    cell: Any

    @property
    def x_ndim(self) -> int:
        """An id has none."""
        return 0

    def init_carry(self, params: LookupParams, batch_shape: tuple[int, ...]) -> PyTree:
        """Makes the fresh carry of the inner cell."""
        return self.cell.init_carry(params.cell, batch_shape)

    def prepare(
        self, params: LookupParams, xs: Array, *, key: Array | None = None
    ) -> tuple[LookupParams, Array]:
        """Projects the table, outside the loop."""
        inner, table = prepare(self.cell, params.cell, params.table[None], key)
        return LookupParams(inner, self.cell.project(inner, table[0])), xs

    def project(self, params: LookupParams, x: Array) -> PyTree:
        """Looks the ids up."""
        return jax.tree.map(lambda leaf: look_up(leaf, x), params.table)

    def mix(self, params: LookupParams, carry: PyTree, zx: PyTree) -> PyTree:
        """Mixes as the inner cell does."""
        return self.cell.mix(params.cell, carry, zx)

    def update(
        self, params: LookupParams, carry: PyTree, zx: PyTree, zh: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Updates as the inner cell does."""
        return self.cell.update(params.cell, carry, zx, zh)

    def step(
        self, params: LookupParams, carry: PyTree, x: Array
    ) -> tuple[PyTree, PyTree]:
        """Advances one step."""
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


def look_up(table: Array, ids: Array) -> Array:
    """Gathers ``table[ids]``, ids clipped, sharded as the ids are."""
    sharding = jax.typeof(ids).sharding
    out_sharding = None
    if AxisType.Explicit in sharding.mesh.axis_types:
        out_sharding = PartitionSpec(*sharding.spec, *(None,) * (table.ndim - 1))
    # Without wrapping, since -1 is not the last token.
    return table.at[ids].get(
        mode="clip", out_sharding=out_sharding, wrap_negative_indices=False
    )


def prepare(
    cell: Cell, params: PyTree, xs: PyTree, key: Array | None = None
) -> tuple[PyTree, PyTree]:
    """Calls ``cell.prepare`` if the cell has one, and returns ``(params, xs)``.

    A cell of your own around another cell calls it on the inner one.

    Args:
      cell: any cell.
      params: its params.
      xs: the inputs, ``[B, T, ...]``.
      key: a typed key for noise; ``None`` means no noise.

    Returns:
      The params and inputs for the loop; those given if there is nothing to prepare.

    Example:
      >>> jlstm.prepare(jlstm.LSTM(8), "params", "xs")
      ('params', 'xs')
    """
    method = getattr(cell, "prepare", None)
    return (params, xs) if method is None else method(params, xs, key=key)
