"""The C++ library: where it is, or why it is not there.

It computes in float32 on a CPU. It is built when jlstm is installed, if a C++ compiler
is found. The environment variable ``JLSTM_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlstm.types import Array, PyTree

LIBRARY = Path(__file__).parent / f"_native.{sys.implementation.cache_tag}.so"
HANDLERS = (
    "jlstm_memory",
    "jlstm_forward",
    "jlstm_backward",
    "jlstm_pack",
    "jlstm_product",
    "jlstm_program",
    "jlstm_cross_entropy",
)


@functools.cache
def why_not() -> str | None:
    """Loads the library; returns the reason if that is not possible."""
    if os.environ.get("JLSTM_NATIVE") == "0":
        return "is turned off by JLSTM_NATIVE=0"
    if not LIBRARY.exists():
        return (
            "was not built when jlstm was installed; install a C++17 compiler, then "
            "jlstm again"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as problem:
        return (
            f"was built for another jaxlib ({problem}); install jlstm again with pip "
            "install --no-build-isolation, so that it is built for this one"
        )
    return None


def cores() -> int:
    """Returns the number of threads that XLA has for all devices of the CPU."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def call(
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> list[Array]:
    """Calls a function of the library.

    Args:
      name: the name of its handler.
      results: the shapes and dtypes of its results.
      *operands: the arrays that it reads.
      aliases: for some operands, the result that takes over their memory, by index.
      **attributes: what is known when the call is traced.
    """
    made = jax.ffi.ffi_call(
        name,
        results,
        vmap_method="sequential",
        input_output_aliases=aliases,
    )(
        *operands,
        # All devices of a CPU share one pool of threads.
        devices=np.int64(jax.local_device_count("cpu")),
        **attributes,
    )
    return list(made)


def memory(like: PyTree) -> PyTree:
    """Makes uninitialised arrays, each with memory of its own.

    XLA would fill equal arrays with zeros once, and then copy them.
    """
    leaves, tree = jax.tree.flatten(like)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return tree.unflatten(jax.ffi.ffi_call("jlstm_memory", shapes)() if shapes else [])
