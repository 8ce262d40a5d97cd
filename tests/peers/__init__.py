"""Recurrent modules of other libraries, beside the layers that are converted to them.

A module's weights are drawn at random; it runs from initial states that are not zero,
and is compared in outputs, final states, and the gradients of a random projection of
both by weights, inputs and initial states. A gradient by weights of the one side
becomes one of the other through the converter, which is affine: along each weight it
moves the other side's by a constant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import convert

B, T, D = 3, 4, 3
LENGTHS = (2, 4, 1)
PACKAGES = {
    "torch": "torch",
    "keras": "keras",
    "linen": "flax",
    "nnx": "flax",
    "haiku": "haiku",
    "equinox": "equinox",
    "jax_rnn": "jax",
}
TOLERANCE = 1e-10  # in float64

# (weights, xs, carry, lengths) -> (ys, carry), of which weights are a pytree, and the
# rest are lists of arrays, in the order of the leaves of ours.
Run = Callable[[Any, Any, list[Any], Any], tuple[list[Any], list[Any]]]


class Live(NamedTuple):
    """A module that was made.

    Attributes:
      weights: as the library has them, of which structure and shapes count.
      run: the module, to be differentiated by JAX; or
      evaluate: what :func:`evaluate` does, for a library that differentiates itself.
    """

    weights: Any
    run: Run | None = None
    evaluate: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Module:
    """A recurrent module of another library.

    Attributes:
      peer: the library.
      name: of the module.
      layer: what its weights are converted to.
      make: makes it; the library is imported there. Call :meth:`live`.
      told: whether the weights tell the layer, so that none needs to be given.
      lengths: whether the library takes them.
      folds: whether two biases there become one here.
      zero: leaves of our params that have no place there.
      bare: whether the peer has a cell without a layer.
      options: of the converter to the peer.
      x: shape of an input at one step.
      seed: of every draw.
    """

    peer: str
    name: str
    layer: Any
    make: Callable[[], Live]
    told: bool = True
    lengths: bool = False
    folds: bool = False
    zero: tuple[str, ...] = ()
    bare: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    x: tuple[int, ...] = (D,)
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.peer}-{self.name}"

    @property
    def installed(self) -> bool:
        """Tells whether the library is there, without importing it."""
        return importlib.util.find_spec(PACKAGES[self.peer]) is not None

    def live(self) -> Live:
        """Makes the module."""
        with lenient():
            return self.make()

    def read(self, weights: Any, *, given: bool) -> tuple[Any, Any]:
        """Converts from the peer; with the layer given, or told by the weights."""
        layer = self.layer if given or not self.told else None
        return getattr(convert, f"from_{self.peer}")(weights, layer)

    def write(self, params: Any) -> Any:
        """Converts to the peer."""
        layer = self.layer.cell if self.bare else self.layer
        to = getattr(convert, f"to_{self.peer}")
        return to(layer, params, **dict(self.options))


def load(name: str) -> Any:
    """Imports a library, which types are checked without."""
    return importlib.import_module(name)


def draw(module: Module, weights: Any) -> dict[str, Any]:
    """Draws weights, inputs, initial states, and the projection of results."""
    rng = np.random.default_rng(module.seed)
    xs = rng.standard_normal((B, T, *module.x))
    example = jax.eval_shape(module.layer.init, jax.random.key(0), jnp.asarray(xs))
    fresh = jax.eval_shape(lambda p: module.layer.init_carry(p, (B,)), example)
    ys = jax.eval_shape(module.layer.apply, example, jnp.asarray(xs))[0]

    def like(tree: Any) -> list[np.ndarray]:
        return [rng.standard_normal(leaf.shape) for leaf in jax.tree.leaves(tree)]

    return {
        "weights": jax.tree.map(lambda a: rng.uniform(-0.8, 0.8, np.shape(a)), weights),
        "xs": xs,
        "carry": like(fresh),
        "lengths": np.array(LENGTHS, np.int32) if module.lengths else None,
        "to": {"ys": like(ys), "carry": like(fresh)},
    }


def draw_params(module: Module, xs: Any) -> Any:
    """Draws params of the layer, but for leaves that have no place in the peer."""
    rng = np.random.default_rng(module.seed + 1000)
    example = jax.eval_shape(module.layer.init, jax.random.key(0), jnp.asarray(xs))

    def fill(path: Any, leaf: Any) -> np.ndarray:
        lost = getattr(path[-1], "name", "") in module.zero
        return rng.uniform(-0.8, 0.8, leaf.shape) * (not lost)

    return jax.tree_util.tree_map_with_path(fill, example)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Allows libraries the promotions that our tests ask of ours to write out."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def evaluate_peer(live: Live, drawn: dict[str, Any]) -> tuple[Any, Any]:
    """Computes what :func:`evaluate` does, of a module of a peer."""
    if live.evaluate is not None:
        return live.evaluate(drawn["weights"], drawn)
    assert live.run is not None
    with lenient():
        return evaluate(live.run, drawn["weights"], drawn)


def evaluate(run: Run, weights: Any, drawn: dict[str, Any]) -> tuple[Any, Any]:
    """Computes outputs and final states, and the gradients of their projection.

    Outputs at padding, which libraries treat in their own ways, are taken as zeros.
    """
    lengths, to = drawn["lengths"], drawn["to"]

    def project(inputs: Any) -> Any:
        ys, carry = run(inputs["weights"], inputs["xs"], inputs["carry"], lengths)
        ys = jax.tree.map(lambda leaf: clean(leaf, lengths), ys)
        values = {"ys": ys, "carry": carry}
        parts = jax.tree.map(lambda a, b: (a * b).sum(), values, to)
        return sum(jax.tree.leaves(parts)), values

    inputs = {"weights": weights, "xs": drawn["xs"], "carry": drawn["carry"]}
    gradients, values = jax.jit(jax.grad(project, has_aux=True))(inputs)
    return jax.device_get((values, gradients))


def clean(ys: Any, lengths: Any) -> Any:
    """Replaces outputs at padding by zeros."""
    if lengths is None:
        return ys
    valid = jnp.arange(ys.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return jnp.where(valid.reshape(valid.shape + (1,) * (ys.ndim - 2)), ys, 0.0)


def run_layer(layer: Any) -> Run:
    """Runs a layer of ours with the interface of the peers."""
    plain = jlstm.with_implementation(layer, "scan")

    def run(params: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        fresh = jax.eval_shape(lambda p: layer.init_carry(p, (B,)), params)
        incoming = jax.tree.structure(fresh).unflatten(carry)
        ys, out = plain.apply(params, xs, incoming, lengths=lengths)
        return jax.tree.leaves(ys), jax.tree.leaves(out)

    return run


def pull(convert: Callable[[Any], Any], at: Any, cotangent: Any) -> Any:
    """Takes a gradient by what an affine map makes, to one by what it takes.

    Args:
      convert: from one side's weights to the other's.
      at: weights where the map is defined.
      cotangent: a gradient by what it makes.
    """

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    base, slope = flat(convert(at)), flat(cotangent)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, at))
    gradients = [np.zeros_like(leaf) for leaf in leaves]
    for i, leaf in enumerate(leaves):
        for index in np.ndindex(leaf.shape):
            moved = leaf.copy()
            moved[index] += 1.0
            tree = structure.unflatten([*leaves[:i], moved, *leaves[i + 1 :]])
            gradients[i][index] = slope @ (flat(convert(tree)) - base)
    return structure.unflatten(gradients)


class Errors(NamedTuple):
    """The largest errors, relative to the magnitude of each array."""

    ys: float
    carry: float
    gradients: float


def errors(got: tuple[Any, Any], expected: tuple[Any, Any]) -> Errors:
    """Compares two results of :func:`evaluate`, of which none may vanish."""
    for leaf in jax.tree.leaves(expected):
        assert np.abs(leaf).max() > 1e-3, "an output or a gradient vanishes"
    values, gradients = zip(got, expected, strict=True)
    ys, carry = (error(*(v[name] for v in values)) for name in ("ys", "carry"))
    return Errors(ys, carry, error(*gradients))


def error(got: Any, expected: Any) -> float:
    """The largest error of the arrays of a tree, each relative to its magnitude."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(_array_error(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _array_error(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - expected).max() / (np.abs(expected).max() or 1.0))


def compare(module: Module) -> dict[str, Errors]:
    """Compares a module that is installed, in both directions of conversion."""
    live = module.live()
    drawn = draw(module, live.weights)
    rows = {"from": compare_from(module, drawn, evaluate_peer(live, drawn))}
    params = draw_params(module, drawn["xs"])
    drawn["weights"] = module.write(params)
    rows["to"] = compare_to(module, params, drawn, evaluate_peer(live, drawn))
    return rows


def compare_from(module: Module, drawn: dict[str, Any], expected: Any) -> Errors:
    """Converts drawn weights to ours, and compares with what the peer computes.

    Args:
      module: of the peer.
      drawn: as by :func:`draw`.
      expected: of the peer, as by :func:`evaluate`.
    """
    weights = drawn["weights"]
    layer, params = module.read(weights, given=False)
    assert layer == module.layer, f"{layer} is not {module.layer}"
    values, gradients = evaluate(run_layer(layer), params, drawn)
    gradients["weights"] = pull(
        lambda w: module.read(w, given=True)[1], weights, gradients["weights"]
    )
    return errors((values, gradients), expected)


def compare_to(
    module: Module, params: Any, drawn: dict[str, Any], expected: Any
) -> Errors:
    """Compares params of ours with what the peer computes from their conversion.

    Args:
      module: of the peer.
      params: whose conversion are the weights in ``drawn``.
      drawn: inputs, and weights.
      expected: of the peer, as by :func:`evaluate`.
    """
    got = evaluate(run_layer(module.layer), params, drawn)
    values, gradients = expected

    def write(some: Any) -> Any:
        return module.write(some)

    kept = _drop(module, params)
    pulled = pull(lambda p: write(_keep(p, params)), kept, gradients["weights"])
    ours = got[1] | {"weights": _drop(module, got[1]["weights"])}
    return errors((got[0], ours), (values, gradients | {"weights": pulled}))


def _drop(module: Module, params: Any) -> Any:
    """Leaves out what has no place in the peer."""

    def drop(path: Any, leaf: Any) -> Any:
        return None if getattr(path[-1], "name", "") in module.zero else leaf

    return jax.tree_util.tree_map_with_path(drop, params)


def _keep(kept: Any, params: Any) -> Any:
    def pick(whole: Any, part: Any) -> Any:
        return whole if part is None else part

    return jax.tree.map(pick, params, kept, is_leaf=lambda leaf: leaf is None)
