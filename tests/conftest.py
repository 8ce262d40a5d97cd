"""Strictness for the whole suite: no silent promotion, two CPU devices."""

from __future__ import annotations

import os

# One thread compiles: the suite runs in as many processes as there are cores.
FLAG = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The suite spends its time on compiling: JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the
# environment runs it on optimised code, as users do.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
