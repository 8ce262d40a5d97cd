"""Names that doctests may use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    names = {"jax": jax, "jnp": jnp, "np": np, "jlstm": jlstm, "functools": functools}
    doctest_namespace.update(names)
