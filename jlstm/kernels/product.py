"""Products with weights inside a loop, in C++.

XLA brings the weights of a product into order again at every step, and computes a small
product on one core of a CPU. Here the weights are put in order once, before the loop,
and the cores share each product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jlstm.kernels import library
from jlstm.kernels.request import Request, may_be_sharded
from jlstm.types import Array, PyTree


def why_not(request: Request) -> str | None:
    """Says why XLA computes products, or ``None`` if C++ does."""
    if request.platform not in (None, "cpu"):
        return (
            "the C++ loops run only on a CPU, but the arrays are on a "
            f"{request.platform}"
        )
    if request.sharded:
        return "the rows may lie on several devices; call it inside jax.shard_map"
    floats = [d for d in sorted(request.dtypes or ()) if "float" in d]  # no token ids
    if floats and "float32" not in floats:
        return f"the C++ loops compute only in float32, got {', '.join(floats)}"
    reason = library.why_not()
    return reason and f"the C++ library {reason}"


def why_not_here() -> str | None:
    """Says the same for what is being traced now."""
    here = Request(platform=jax.default_backend(), sharded=may_be_sharded())
    return why_not(here)


def with_weights(fun: Callable, params: PyTree, *args: PyTree) -> Callable:
    """Returns ``lambda *args: fun(params, *args)``, with its products in C++.

    This applies to float32 products of several rows with a leaf of the params, or with
    its transpose. Other products are unchanged.

    Args:
      fun: a function of the params and ``args``.
      params: the params to bind.
      *args: examples of the arguments to come.
    """
    if why_not_here() is None:
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(params, *args)
        leaves, out = jax.tree.leaves(params), jax.tree.structure(shape)
        weights = dict(zip(closed.jaxpr.invars, leaves, strict=False))
        if products := _products(closed, weights):

            def run(*args: PyTree) -> PyTree:
                given = [*leaves, *jax.tree.leaves(args)]
                return out.unflatten(_evaluate(closed, products, given))

            return run
    return partial(fun, params)


CONTRACTIONS = {(((1,), (0,)), ((), ())): False, (((1,), (1,)), ((), ())): True}


def _products(closed: ClosedJaxpr, weights: dict[Any, Array]) -> dict[int, Any]:
    """Finds the equations that are products, or calls that contain some."""
    found: dict[int, Any] = {}
    for place, eqn in enumerate(closed.jaxpr.eqns):
        if eqn.primitive.name in ("jit", "pjit"):  # such as that of einsum
            inner = eqn.params["jaxpr"]
            pairs = zip(inner.jaxpr.invars, eqn.invars, strict=True)
            known = {
                a: weights[b]
                for a, b in pairs
                if not isinstance(b, Literal) and b in weights
            }
            if products := _products(inner, known):
                found[place] = products
        elif eqn.primitive.name == "dot_general":
            rows, weight = eqn.invars
            transposed = CONTRACTIONS.get(eqn.params["dimension_numbers"])
            avals = rows.aval, weight.aval, eqn.outvars[0].aval
            if (
                transposed is not None
                and not isinstance(weight, Literal)
                and weight in weights
                and all(aval.ndim == 2 and aval.size for aval in avals)
                and all(aval.dtype == np.float32 for aval in avals)
                and rows.aval.shape[0] > 1  # one row reads each weight only once
            ):
                found[place] = Product(weights[weight], transposed)
    return found


def _evaluate(closed: ClosedJaxpr, products: dict[int, Any], args: list) -> list:
    """Evaluates a jaxpr, with some of its equations replaced by products."""
    jaxpr = closed.jaxpr
    names = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(names, [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for place, eqn in enumerate(jaxpr.eqns):
        found = products.get(place)
        if isinstance(found, Product):
            rows = eqn.invars[0]
            out, values[rows] = found(read(rows))
            made = [out]
        elif found is not None:
            made = _evaluate(eqn.params["jaxpr"], found, list(map(read, eqn.invars)))
        else:
            given = (atom for atom in eqn.invars if not isinstance(atom, Literal))
            names = list(dict.fromkeys(given))
            alone = jaxpr.replace(
                constvars=[], invars=names, outvars=eqn.outvars, eqns=[eqn]
            )
            made = jaxpr_as_fun(ClosedJaxpr(alone, []))(*map(read, names))
        values.update(zip(eqn.outvars, made, strict=True))
    return list(map(read, jaxpr.outvars))


class Product:
    """Multiplies rows by a weight, which it puts in order when it is made."""

    def __init__(self, weight: Array, transposed: bool):
        self.weight, self.transposed = weight, transposed
        inner, columns = weight.shape[::-1] if transposed else weight.shape
        # Whole vectors of any instruction set; the longest ones have 16 floats.
        size = inner * -(-columns // 16) * 16
        (self.packed,) = library.call(
            "jlstm_pack",
            [jax.ShapeDtypeStruct((size,), np.float32)],
            jax.lax.stop_gradient(weight),
            transposed=transposed,
        )

    def __call__(self, rows: Array) -> tuple[Array, Array]:
        """Returns the product and the rows.

        Since the rows are a result too, they are computed once. XLA would otherwise
        compute them again for each use.
        """
        return _multiply(self.transposed, rows, self.weight, self.packed)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _multiply(
    transposed: bool, rows: Array, weight: Array, packed: Array
) -> tuple[Array, Array]:
    return _CALLS[transposed](rows, weight, packed)


@_multiply.defjvp
def _multiply_jvp(transposed: bool, primals: tuple, tangents: tuple) -> tuple:
    rows, weight, _ = primals
    drows, dweight, _ = tangents
    dout = _plain(transposed, drows, weight) + _plain(transposed, rows, dweight)
    return _multiply(transposed, *primals), (dout, drows)


def _plain(transposed: bool, rows: Array, weight: Array) -> Array:
    return rows @ (weight.mT if transposed else weight)


def _call(transposed: bool) -> Callable:
    @jax.custom_batching.custom_vmap
    def call(rows: Array, weight: Array, packed: Array) -> tuple[Array, Array]:
        columns = weight.shape[0 if transposed else 1]
        out, rows = library.call(
            "jlstm_product",
            [
                jax.ShapeDtypeStruct((rows.shape[0], columns), np.float32),
                jax.ShapeDtypeStruct(rows.shape, np.float32),
            ],
            rows,
            weight,
            packed,
            aliases={0: 1},
            transposed=transposed,
        )
        return out, rows

    @call.def_vmap
    def batched(
        size: int, mapped: list[bool], rows: Array, weight: Array, packed: Array
    ) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        if any(mapped[1:]):
            return (_plain(transposed, rows, weight), rows), (True, mapped[0])
        flat, _ = call(rows.reshape(-1, rows.shape[-1]), weight, packed)
        return (flat.reshape(size, -1, flat.shape[-1]), rows), (True, True)

    return call


_CALLS = {transposed: _call(transposed) for transposed in (False, True)}
