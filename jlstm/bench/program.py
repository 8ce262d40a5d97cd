"""The inputs of a case, the programs that are timed, and how JAX libraries are run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlstm.bench.cases import Size, Suite

Call = Callable[[], Any]
# A function (params, xs [B, T, D], lengths [B] if there are any) -> ys.
Apply = Callable[..., jax.Array]


class Refused(Exception):
    """Raised for a variant that cannot run here; the message says why."""


class Inputs(NamedTuple):
    """The arrays of one case, the same for every worker."""

    xs: np.ndarray  # [B, T, D]
    cotangent: np.ndarray  # [B, T, H], with both directions [B, T, 2H]
    lengths: np.ndarray | None  # [B]


def make_inputs(suite: Suite, size: Size) -> Inputs:
    """Draws the arrays of one case from a fixed seed."""
    rng = np.random.default_rng(0)
    T, B, D, H = size
    width = 2 * H if suite.bidirectional else H
    xs = rng.standard_normal((B, T, D), np.float32)
    cotangent = rng.standard_normal((B, T, width), np.float32)
    lengths = None
    if suite.bidirectional:
        lengths = rng.integers(max(1, T // 10), T, B, np.int32, endpoint=True)
    return Inputs(xs, cotangent, lengths)


def make_tokens(suite: Suite, size: Size, count: int = 16) -> list[np.ndarray]:
    """Draws batches ``[B, T + 1]`` of symbols from a fixed seed."""
    shape = (count, size.B, size.T + 1)
    rng = np.random.default_rng(0)
    return list(rng.integers(0, suite.vocab_size, shape, np.int32))


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a worker that are timed; each returns when its work is done.

    Attributes:
      calls: ``"call"`` is the whole program; others are parts of it.
      facts: numbers about the program, such as ``compile_s``.
    """

    calls: dict[str, Call]
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


def median_ms(call: Call, seconds: float, least: int) -> float:
    """Calls for some time, and at least ``least`` times; returns the median time."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def layer_program(
    apply: Apply, params: Any, inputs: Inputs, *, train: bool, devices: int = 1
) -> Program:
    """Compiles the outputs of a layer, or their gradients by params and inputs.

    Several devices share the rows; each has all params, whose gradients are summed.
    """
    batch = tuple(leaf for leaf in (inputs.xs, inputs.lengths) if leaf is not None)

    def gradients(params: Any, cotangent: jax.Array, *batch: jax.Array) -> Any:
        def score(params: Any, xs: jax.Array) -> jax.Array:
            return (apply(params, xs, *batch[1:]) * cotangent).sum()

        return jax.grad(score, argnums=(0, 1))(params, batch[0])

    function, args = (apply, batch)
    if train:
        function, args = gradients, (inputs.cotangent, *batch)
    if devices > 1:
        mesh = jax.make_mesh(
            (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        part = function

        def summed(*args: Any) -> Any:
            by_params, by_xs = part(*args)
            return jax.lax.psum(by_params, "data"), by_xs

        function = jax.shard_map(
            summed if train else part,
            mesh=mesh,
            in_specs=(everywhere, *[rows] * len(args)),
            out_specs=(everywhere, rows) if train else rows,
            check_vma=False,
        )
        params = jax.device_put(params, NamedSharding(mesh, everywhere))
        args = jax.device_put(args, NamedSharding(mesh, rows))
    args = jax.block_until_ready(jax.device_put((params, *args)))
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    facts = {"compile_s": time.perf_counter() - start}
    if (memory := compiled.memory_analysis()) is not None:
        facts["temp_bytes"] = memory.temp_size_in_bytes
    return Program({"call": lambda: jax.block_until_ready(compiled(*args))}, facts)
