"""One of two processes that share a batch over a mesh: ``meshed.py PORT INDEX AXES``.

It compares a loss and its gradients with those of one device.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlstm


def main(port: str, index: str, axes: str) -> None:
    """Runs it."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    mesh = jax.make_mesh((4,), ("data",), (AxisType[axes],))
    layer = jlstm.stack(
        jlstm.bidirectional(jlstm.LSTM(8)), jlstm.Dropout(0.3), jlstm.RNN(jlstm.GRU(4))
    )
    xs = np.random.default_rng(0).normal(size=(8, 7, 3)).astype(np.float32)
    lengths = np.array([7, 3, 0, 5, 1, 7, 2, 6], np.int32)
    params = layer.init(jax.random.key(0), jnp.asarray(xs))

    def loss(params: Any, xs: Any, lengths: Any) -> Any:
        ys, _ = layer.apply(params, xs, lengths=lengths, key=jax.random.key(1))
        return jnp.sum(ys**2)

    compiled = jax.jit(jax.value_and_grad(loss))
    want, want_grads = compiled(params, jnp.asarray(xs), jnp.asarray(lengths))

    def place(array: Any, *names: str) -> jax.Array:
        whole = np.asarray(array)
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    with jax.set_mesh(mesh):
        got, grads = jax.jit(jax.value_and_grad(loss))(
            jax.tree.map(place, params), place(xs, "data"), place(lengths, "data")
        )
    np.testing.assert_allclose(got.addressable_data(0), want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a.addressable_data(0), b, rtol=1e-4, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
