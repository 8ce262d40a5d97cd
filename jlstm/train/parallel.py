"""One batch on several devices: the cores of a CPU, or several accelerators."""

from __future__ import annotations

import contextlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jlstm.kernels.request import rows_in_one_place
from jlstm.train.losses import Mean
from jlstm.train.step import Aux, LossFn
from jlstm.types import Array, PyTree


def data_parallel(loss_fn: LossFn, devices: int) -> LossFn:
    r"""Makes a loss function that shares the rows of each batch among devices.

    With :math:`(S_d, N_d)` the total and the count of the :class:`jlstm.train.Mean`
    that device :math:`d` computes from its rows, the loss is
    :math:`\sum_d S_d / \sum_d N_d`. The loss and its gradient are those of one device,
    up to the order in which sums are taken. Metrics are combined in the same way. A
    plain scalar has no count; it is averaged over rows.

    If the number of devices does not divide the batch, every device computes the rows
    that are left over. Each device draws its own noise from the key, so dropout masks
    differ from those of one device.

    On a CPU, XLA spreads large matrix products over the cores, but runs the steps of a
    recurrence of ordinary size on one core. With as many devices as cores, all are
    used. The loops in C++ use all cores by themselves, so gated cells in float32 gain
    little here. A CPU has several devices only if you ask for them before JAX is first
    used: ``jax.config.update("jax_num_cpu_devices", 2)``.

    Args:
      loss_fn: the loss; see :class:`jlstm.train.LossFn`. Every array of the batch and
        of the carry must begin with the batch axis.
      devices: the number of devices, the first ones of ``jax.devices()``; 1 returns
        ``loss_fn`` unchanged.

    Returns:
      A loss function, for :func:`jlstm.train.make_train_step` and
      :func:`jlstm.train.make_eval_step`.

    Raises:
      ValueError: JAX has fewer devices; or, when the loss is called, an array of the
        batch or carry does not begin with the batch axis.

    Example:
      >>> train = jlstm.train
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> step = train.make_train_step(train.data_parallel(loss_fn, 1), train.sgd(0.1))
    """
    found = len(jax.devices())
    if not isinstance(devices, int) or not 1 <= devices <= found:
        raise ValueError(
            f"data_parallel: devices must lie in 1..{found}, the number that JAX has, "
            f"got {devices}; on a CPU call jax.config.update('jax_num_cpu_devices', N) "
            "before anything else"
        )
    if devices == 1:
        return loss_fn
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows_of, everywhere = PartitionSpec("data"), PartitionSpec()

    def parallel_loss_fn(
        params: PyTree, batch: PyTree, *, key: Array | None, carry: PyTree
    ) -> tuple[Mean | Array, Aux]:
        rows = _batch_size(batch, carry)
        even = rows - rows % devices
        keys = None if key is None else jax.random.split(key, devices + 1)

        def part(params: PyTree, batch: PyTree, carry: PyTree, keys: Any) -> Any:
            key = None if keys is None else keys[0]
            loss, aux = loss_fn(params, batch, key=key, carry=carry)
            count = jax.tree.leaves(batch)[0].shape[0]
            sums = jax.tree.map(
                lambda metric: _with_weight(metric, count),
                (loss, dict(aux.metrics)),
                is_leaf=_is_mean,
            )
            return jax.tree.map(lambda leaf: leaf[None], sums), aux.carry

        # Each device returns its totals, which are summed outside, so that the gradient
        # of each device is that of its own rows.
        sharded = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(everywhere, rows_of, rows_of, rows_of),
            out_specs=rows_of,
            check_vma=False,
        )

        def cut(start: int | None, stop: int | None) -> tuple[PyTree, PyTree]:
            return jax.tree.map(lambda leaf: leaf[start:stop], (batch, carry))

        parts = []
        if even:
            some = None if keys is None else keys[:-1]
            parts.append(sharded(params, *cut(None, even), some))
        if even < rows:
            last = None if keys is None else keys[-1:]
            alone = contextlib.nullcontext() if even else rows_in_one_place()
            with alone:
                parts.append(part(params, *cut(even, None), last))
        sums, carries = zip(*parts, strict=True)
        sums, carry = (
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
            for trees in (sums, carries)
        )
        loss, metrics = jax.tree.map(_joined, sums, is_leaf=_is_mean)
        return loss, Aux(metrics, carry)

    return parallel_loss_fn


@flax.struct.dataclass
class _Scalar(Mean):
    """A plain scalar, weighted by the rows that it stands for."""


def _is_mean(metric: Any) -> bool:
    return isinstance(metric, Mean)


def _with_weight(metric: Any, rows: int) -> Mean:
    if isinstance(metric, Mean):
        return jax.tree.map(jnp.asarray, metric)
    metric = jnp.asarray(metric)
    count = jnp.asarray(rows, metric.dtype)
    return _Scalar(metric * count, count)


def _joined(metric: Mean) -> Any:
    whole = type(metric)(jnp.sum(metric.total), jnp.sum(metric.count))
    return whole.value if isinstance(metric, _Scalar) else whole


def _batch_size(batch: PyTree, carry: PyTree) -> int:
    leaves = jax.tree.leaves_with_path((batch, carry))
    sizes = {jnp.shape(leaf)[:1] for _, leaf in leaves}
    if len(sizes) == 1 and () not in sizes:
        return sizes.pop()[0]
    names = ", ".join(
        f"{('batch', 'carry')[path[0].idx]}{jax.tree_util.keystr(path[1:])} "
        f"{list(jnp.shape(leaf))}"
        for path, leaf in leaves
    )
    raise ValueError(
        "data_parallel: every leaf of the batch and the carry must begin with the same "
        f"batch size, got {names}"
    )
