"""How gradients flow back through time: their norms at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlstm import door
from jlstm.cells.wrappers import Beside, Prepared, Wrapper, prepare
from jlstm.diagnostics.observe import (
    check_inputs,
    in_sight,
    name_of,
    observed,
    out_of_sight,
    run,
)
from jlstm.layers.recurrent import is_layer
from jlstm.types import Array, Cell, Layer, PyTree, config, gated, is_inexact


@config
class Probe(Wrapper):
    """Adds to the carry and the output of every step what comes beside its input.

    The inputs are ``Beside(xs, (carry, y))``. If the output is a part of the carry,
    what is added to that part is in the output too.
    """

    cell: Any

    def prepare(
        self, params: PyTree, xs: Any, *, key: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        """Gives the whole key to the inner cell, so that its noise does not change."""
        params, inner = prepare(self.cell, params, xs.cell, key)
        return Prepared(params, None), Beside(inner, xs.extra)

    def after(
        self, extra: PyTree, old: PyTree, new: PyTree, y: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Adds the perturbations."""
        del old
        leaves, tree = jax.tree.flatten(new)
        moved = [_add(leaf, d) for leaf, d in zip(leaves, extra[0], strict=True)]
        outputs, shape = jax.tree.flatten(y)
        made = []
        for leaf, d in zip(outputs, extra[1], strict=True):
            same = [m for m, old in zip(moved, leaves, strict=True) if old is leaf]
            made.append(_add(same[0] if same else leaf, d))
        return tree.unflatten(moved), shape.unflatten(made)


def _add(leaf: Array, d: Array | None) -> Array:
    return leaf if d is None else leaf + d


@dataclasses.dataclass(frozen=True, repr=False)
class Flow:
    """Norms of the gradients that reach one recurrence, for each row and step.

    Attributes:
      carries: for each part of the carry, the norm of the derivative of the loss with
        respect to that part after each step, ``[B, T]``; zero at masked steps. If the
        output is a part of the carry, as the h of an LSTM is, this includes the
        gradient that comes from the layers above.
      outputs: the norm of the derivative with respect to each step's output,
        ``[B, T]``: the gradient that comes from the layers above only.
      valid: true at valid steps, ``[B, T]``.
      reverse: whether the steps were taken from the last to the first.
    """

    carries: dict[str, np.ndarray]
    outputs: np.ndarray
    valid: np.ndarray
    reverse: bool

    @property
    def norm(self) -> np.ndarray:
        """The norm of the derivative with respect to the whole carry, ``[B, T]``."""
        squares = [value.astype(np.float64) ** 2 for value in self.carries.values()]
        return np.sqrt(np.sum(squares, axis=0))

    def __repr__(self) -> str:
        parts = {"carry": self.norm, **self.carries, "output": self.outputs}
        steps = np.flatnonzero(self.valid.any(0))
        steps = steps[::-1] if self.reverse else steps
        if not steps.size:
            return "no valid steps"
        first, last = steps[0], steps[-1]
        middle = steps[steps.size // 2]
        return "; ".join(
            f"{name}: {_mean(value, self.valid, first):.2g} at the first step, "
            f"{_mean(value, self.valid, middle):.2g} in the middle, "
            f"{_mean(value, self.valid, last):.2g} at the last"
            for name, value in parts.items()
        )


def _mean(value: np.ndarray, valid: np.ndarray, step: int) -> float:
    return float(value[valid[:, step], step].mean())


@dataclasses.dataclass(frozen=True, repr=False)
class GradientFlow(Mapping[str, Flow]):
    """The gradient norms of all recurrences in a layer, by their paths.

    It is a mapping from paths such as ``"stack[0]"`` to :class:`Flow`, in the order in
    which the recurrences ran.

    Attributes:
      flows: the same as a dict.
      loss: the value of the loss.
    """

    flows: dict[str, Flow]
    loss: float

    def __getitem__(self, path: str) -> Flow:
        if path not in self.flows:
            raise KeyError(f"{path!r}; there are {', '.join(map(repr, self))}")
        return self.flows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def __repr__(self) -> str:
        lines = [f"{path}: {flow!r}" for path, flow in self.flows.items()]
        return "\n".join([f"loss {self.loss:.4g}", *lines])


def gradient_flow(
    layer: Layer | Cell,
    params: PyTree,
    xs: PyTree,
    loss: Callable[[PyTree], Array],
    carry: PyTree = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    key: Array | None = None,
    reverse: bool = False,
) -> GradientFlow:
    r"""Computes the norm of the gradient at every step of every recurrence.

    The norms are those of :math:`\partial L / \partial c_t` for each part :math:`c` of
    the carry, and of :math:`\partial L / \partial y_t` for the outputs. One backward
    pass gives all of them: zeros are added to each carry and output, and the loss is
    differentiated with respect to these zeros.

    Args:
      layer: a cell, a layer or a model.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      loss: a function of the outputs (or of a model's answer) that returns one number.
        It is compiled once for each function object, so define it once.
      carry: the incoming carry; None means the fresh one.
      lengths: valid steps of each row, ``[B]`` integers; None if all are valid.
      mask: true at valid steps, ``[B, T]``, for padding that is not at the end; give
        ``lengths`` or ``mask``, not both.
      resets: true where a row begins anew, ``[B, T]``; None for nowhere.
      key: the PRNG key of dropout and other noise; None runs without noise.
      reverse: for a cell only: whether to take the steps from the last to the first.

    Returns:
      A mapping from paths to :class:`Flow`. The path of a lone cell or ``RNN`` is
      ``"RNN"``.

    Raises:
      TypeError: ``layer`` is neither a cell nor a layer.
      ValueError: the loss is not one number, no recurrence can be observed, or the
        layer refuses the inputs.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(4)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> flow = jlstm.diagnostics.gradient_flow(
      ...     layer, params, xs, lambda ys: ys[:, -1].sum())
      >>> flow["RNN"].carries["c"].shape, bool(flow["RNN"].outputs[0, 3] == 0)
      ((2, 5), True)
    """
    masking = {"lengths": lengths, "mask": mask, "resets": resets}
    masking = check_inputs("gradient_flow", layer, xs, masking)
    if is_layer(layer) and reverse:
        raise door.error(
            "gradient_flow", "reverse is only for cells; a layer has its own direction"
        )
    masking["key"] = key
    ys = jax.eval_shape(partial(run, layer, reverse), params, xs, carry, **masking)[0]
    shape = getattr(jax.eval_shape(loss, ys), "shape", None)
    if shape != ():
        raise door.error(
            "gradient_flow", f"loss must return one number, got {shape}; take its mean"
        )
    with in_sight("gradient_flow", layer):
        value, found = _flow(layer, reverse, loss, params, xs, carry, masking)
    flows = {}
    for each in found:
        norms = [np.asarray(norm) for norm in each.norms]
        carries = dict(zip(each.names, norms[:-1], strict=True))
        flows[each.path] = Flow(
            carries, norms[-1], np.asarray(each.valid), each.reverse
        )
    return GradientFlow(flows, float(value))


@struct.dataclass
class _Found:
    path: str = struct.field(pytree_node=False)
    names: tuple[str, ...] = struct.field(pytree_node=False)
    reverse: bool = struct.field(pytree_node=False)
    norms: tuple[Array, ...] = ()  # of the carry's parts, and of the outputs
    valid: Any = None


@partial(jax.jit, static_argnums=(0, 1, 2))
def _flow(
    layer: Any,
    reverse: bool,
    loss: Callable[[PyTree], Array],
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
    masking: dict,
) -> tuple[Array, tuple[_Found, ...]]:
    zeros: dict[str, tuple[list, list]] = {}
    found: dict[str, _Found] = {}

    def call() -> tuple:
        return run(layer, reverse, params, xs, carry, **masking)

    def look(path: str, unrolled: door.Unrolled) -> tuple[PyTree, ...]:
        outs = unrolled.changed(return_carries=True, implementation="scan").run()
        ys, _, carries = outs
        zeros[path] = _shapes(carries), _shapes(ys)
        names = tuple(name_of(p) for p, _ in jax.tree.leaves_with_path(carries))
        found[path] = _Found(path, names, unrolled.call.reverse)
        return outs if unrolled.call.return_carries else outs[:2]

    # The first pass only finds the shapes of what is observed.
    jax.eval_shape(lambda: observed(look, call)[0])
    if not found:
        raise out_of_sight("gradient_flow", layer)

    def differentiated(perturbations: Any) -> tuple[Array, dict[str, Array]]:
        valid: dict[str, Array] = {}

        def probe(path: str, unrolled: door.Unrolled) -> tuple[PyTree, ...]:
            cell = Probe(unrolled.call.cell)
            name = "fused" if gated(cell) else "scan"
            probed = unrolled.changed(cell=cell, implementation=name)
            probed = dataclasses.replace(
                probed, xs=Beside(unrolled.xs, perturbations[path])
            )
            shape = jax.tree.leaves(unrolled.xs)[0].shape[:2]
            mask = unrolled.mask
            valid[path] = jnp.ones(shape, bool) if mask is None else mask
            return probed.run()

        return loss(observed(probe, call)[0]), valid

    made = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), zeros)
    (value, valid), gradients = jax.value_and_grad(differentiated, has_aux=True)(made)
    for path, (carries, outputs) in gradients.items():
        norms = [_norm([leaf]) for leaf in carries]
        norms = (*norms, _norm(outputs))
        found[path] = found[path].replace(norms=norms, valid=valid[path])  # type: ignore[attr-defined]
    return value, tuple(found.values())


def _shapes(tree: PyTree) -> list[jax.ShapeDtypeStruct | None]:
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_inexact(leaf) else None
        for leaf in jax.tree.leaves(tree)
    ]


def _norm(gradients: list[Array | None]) -> Array:
    squares = [
        jnp.sum(jnp.abs(leaf) ** 2, axis=tuple(range(2, leaf.ndim)))
        for leaf in gradients
        if leaf is not None
    ]
    return jnp.sqrt(sum(squares))
