"""Strictness for the whole suite: no silent promotion, two CPU devices.

Devices share the threads of a call to C++, so that on two cores each has one;
JLSTM_TEST_DEVICES=1 in the environment gives one device all of them.

The suite spends its time on compiling, so its programs are optimised little;
JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment runs it on code like that of users.
"""

from __future__ import annotations

import os
from importlib.metadata import version

QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
# One thread compiles: the suite runs in as many processes as there are cores.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if QUICK:
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # the older are quicker
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JLSTM_TEST_DEVICES", "2")))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
