"""Strictness for the whole suite: no silent promotion, two CPU devices."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
