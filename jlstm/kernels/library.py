"""The library in C++: where it is, and why it is not there.

It is for float32 on a CPU, and is there where a C++ compiler was found when jlstm was
installed. The environment variable ``JLSTM_NATIVE=0`` leaves it out.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import jax

from jlstm.types import PyTree

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
    """Loads the library; returns the reason if there is none."""
    if os.environ.get("JLSTM_NATIVE") == "0":
        return "is left out by JLSTM_NATIVE=0"
    if not LIBRARY.exists():
        return "was not built when jlstm was installed; that takes a C++17 compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as problem:
        return (
            f"was built for another jaxlib ({problem}); install jlstm again beside "
            "this one, with pip install --no-build-isolation"
        )
    return None


def memory(like: PyTree) -> PyTree:
    """Makes arrays of any contents, each with memory of its own.

    XLA would fill equal ones with zeros once, and then copy them.
    """
    leaves, tree = jax.tree.flatten(like)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return tree.unflatten(jax.ffi.ffi_call("jlstm_memory", shapes)() if shapes else [])
