"""From a loss function to compiled steps of training and evaluation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlstm.train.losses import Mean, average
from jlstm.train.state import TrainState, check_alive, type_name
from jlstm.types import Array, PyTree

Metrics = dict[str, Any]  # a Mean or a scalar each
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
EvalStep = Callable[..., tuple[Metrics, PyTree]]


# Gradients that the devices of a CPU sum all at once are all held twice.
_SUMS_APART = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}


class Aux(NamedTuple):
    """What a loss function returns beside the loss.

    Attributes:
      metrics: scalars or :class:`Mean`, by name.
      carry: the carry for the next batch, in truncated backpropagation through time.
    """

    metrics: Mapping[str, Any]
    carry: PyTree = None


class LossFn(Protocol):
    """``loss_fn(params, batch, *, key, carry) -> (loss, Aux)``."""

    def __call__(
        self, params: PyTree, batch: Any, *, key: Array | None, carry: PyTree
    ) -> tuple[Mean | Array, Aux]:
        """Returns the loss, a :class:`Mean` or a scalar, and the rest."""
        ...


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, donate: bool = True
) -> TrainStep:
    """Makes ``step(state, batch) -> (state, metrics)``, compiled once a shape.

    Step ``n`` calls ``loss_fn(params, batch, key=fold_in(state.key, n),
    carry=state.carry)``, and ``key=None`` where the state has none. The carry that it
    returns becomes that of the new state; no gradient passes through a carry, in or
    out. The metrics gain ``loss`` and ``grad_norm``, the latter before any clipping.

    A state with a key whose loss does not depend on it earns one warning: dropout is
    off, most likely because the key was not passed on to ``apply``.

    Args:
      loss_fn: the loss, see :class:`LossFn`.
      tx: the transformation that ``create_state`` got.
      donate: whether the new state takes the memory of the old one, which is then gone.

    Returns:
      The step. It raises ``ValueError`` for a loss that is not a scalar, a missing
      :class:`Aux`, a carry of another structure, shape or dtype than the state's, and
      a state that an earlier step has taken.

    Example:
      >>> train = jlstm.train
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> tx = train.sgd(0.1)
      >>> step = train.make_train_step(loss_fn, tx)
      >>> state, metrics = step(train.create_state(jnp.zeros(()), tx), jnp.ones(()))
    """

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        carry = jax.lax.stop_gradient(state.carry)

        def objective(params: PyTree) -> tuple[Array, tuple[Metrics, PyTree]]:
            loss, metrics, new_carry = _call(loss_fn, params, batch, key, carry)
            return loss, (metrics, jax.lax.stop_gradient(new_carry))

        grad_fn = jax.value_and_grad(objective, has_aux=True)
        (_, (metrics, new_carry)), grads = grad_fn(state.params)
        _check_carry(new_carry, carry)
        # Strict promotion, where a user wants it, is for their code: optax's Adam
        # raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            grad_norm = optax.tree.norm(grads)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            carry=new_carry,
        )
        return new_state, {**metrics, "grad_norm": grad_norm}

    compile = partial(jax.jit, train_step, donate_argnums=(0,) if donate else ())
    compiled = inner = compile()
    if getattr(jax.config, "jax_num_cpu_devices", 1) > 1:
        compiled = compile(compiler_options=_SUMS_APART)
    checked = False

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        nonlocal checked
        check_alive("train_step", state.step)
        if not checked and state.key is not None:
            _warn_if_key_is_unused(inner.trace(state, batch).jaxpr, state, batch)
        checked = True
        if compiled is not inner:
            # A jit inside another, where all that is made is traced, takes no options;
            # nor does one whose arguments are.
            leaves = jax.tree.leaves((state, batch, jnp.zeros(())))
            if any(isinstance(leaf, Tracer) for leaf in leaves):
                return inner(state, batch)
        return compiled(state, batch)

    return step


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """Makes ``eval_step(params, batch, carry=None) -> (metrics, carry)``, compiled.

    The loss is called with ``key=None``: no dropout.

    Args:
      loss_fn: the loss, see :class:`LossFn`.

    Returns:
      The step; its metrics include ``loss``.

    Example:
      >>> train = jlstm.train
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> eval_step = train.make_eval_step(loss_fn)
      >>> train.evaluate(eval_step, jnp.zeros(()), [jnp.ones(3), jnp.ones(1)])
      {'loss': 1.0}
    """

    @jax.jit
    def eval_step(
        params: PyTree, batch: PyTree, carry: PyTree = None
    ) -> tuple[Metrics, PyTree]:
        _, metrics, carry = _call(loss_fn, params, batch, None, carry)
        return metrics, carry

    return eval_step


def evaluate(
    eval_step: EvalStep, params: PyTree, batches: Iterable[Any], carry: PyTree = None
) -> dict[str, float]:
    """Averages the metrics of a data set, with one fetch from the device at the end.

    The carry that a batch returns goes to the next; a loss over independent batches
    returns none.

    Args:
      eval_step: from :func:`make_eval_step`.
      params: the parameters.
      batches: any iterable.
      carry: the first carry.

    Returns:
      One float a metric: exact for a :class:`Mean`, however the items are batched; a
      plain scalar counts the same in each batch.

    Raises:
      ValueError: there are no batches, or a train step has taken the params.

    Example:
      See :func:`make_eval_step`.
    """
    check_alive("evaluate", params)
    collected = []
    for batch in batches:
        metrics, carry = eval_step(params, batch, carry)
        collected.append(metrics)
    if not collected:
        raise ValueError(
            "evaluate: batches is empty; an iterator can be read once only"
        )
    return average(collected)


def _call(
    loss_fn: LossFn, params: PyTree, batch: PyTree, key: Array | None, carry: PyTree
) -> tuple[Array, Metrics, PyTree]:
    """Calls the loss and checks what it returns: ``(loss, metrics, carry)``."""
    result = loss_fn(params, batch, key=key, carry=carry)
    if not (isinstance(result, tuple) and len(result) == 2) or not isinstance(
        result[1], Aux
    ):
        raise ValueError(
            "loss_fn: must return (loss, Aux(metrics)), got "
            f"{type(result).__name__} of {jax.tree.map(type_name, result)}"
        )
    loss, aux = result
    metrics = {"loss": loss, **aux.metrics}
    for name, metric in metrics.items():
        for leaf in jax.tree.leaves(metric):
            if jnp.shape(leaf) != ():
                raise ValueError(
                    f"loss_fn: {name!r} must be a scalar or a Mean of scalars, got "
                    f"{type_name(leaf)}; average it first"
                )
    return (loss.value if isinstance(loss, Mean) else loss), metrics, aux.carry


def _check_carry(new: PyTree, old: PyTree) -> None:
    got, expected = (jax.tree.map(type_name, carry) for carry in (new, old))
    if got != expected:
        raise ValueError(
            f"loss_fn: returned the carry {got}, but state.carry is {expected}; give "
            "create_state(carry=model.init_carry(...)), and return Aux(metrics, carry)"
        )


def _warn_if_key_is_unused(jaxpr: Any, state: TrainState, batch: PyTree) -> None:
    keyless = dataclasses.replace(state, key=None)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path((state, batch))]
    without = [
        path for path, _ in jax.tree_util.tree_leaves_with_path((keyless, batch))
    ]
    sources = [path not in without for path in paths]
    reached = reach(jaxpr, sources)
    # The state's own key comes out as it went in; that is not a use of it.
    if sum(reached) <= 1:
        warnings.warn(
            "make_train_step: the loss does not depend on its key, so dropout is off; "
            "pass key= on to apply, or give create_state no key",
            stacklevel=3,
        )


def reach(jaxpr: Any, sources: list[bool]) -> list[bool]:
    """Tells which results of a jaxpr depend on the inputs marked in ``sources``.

    It looks into inner jaxprs, so that an argument which an inner ``jit``, ``scan``,
    ``cond`` or ``custom_vjp`` ignores does not count. Where it cannot look inside, it
    takes every result to depend on every argument.

    Args:
      jaxpr: from ``jax.make_jaxpr`` or ``jit(...).trace``.
      sources: one flag an input.

    Returns:
      One flag a result.

    Example:
      >>> from jlstm.train.step import reach
      >>> jaxpr = jax.make_jaxpr(lambda x, y: (x + 1, x * y))(1.0, 2.0)
      >>> reach(jaxpr, [False, True])
      [False, True]
    """
    jaxpr = _open(jaxpr)
    marked = {var for var, mark in zip(jaxpr.invars, sources, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in marked

    for eqn in jaxpr.eqns:
        marks = [is_marked(atom) for atom in eqn.invars]
        if any(marks):
            results = _reach_through(eqn, marks)
            marked |= {
                var for var, mark in zip(eqn.outvars, results, strict=True) if mark
            }
    return [is_marked(atom) for atom in jaxpr.outvars]


def _reach_through(eqn: Any, marks: list[bool]) -> list[bool]:
    """Tells which results of one equation depend on its marked arguments."""
    name, params = eqn.primitive.name, eqn.params
    everything = [True] * len(eqn.outvars)
    if name == "cond":
        branches = [reach(branch, marks[1:]) for branch in params["branches"]]
        return (
            everything
            if marks[0]
            else [any(marks) for marks in zip(*branches, strict=True)]
        )
    if name == "while":
        conds, bodies = params["cond_nconsts"], params["body_nconsts"]
        marks = _mark_all_keys(eqn.invars, marks)
        of_carry = marks[conds + bodies :]
        if any(reach(params["cond_jaxpr"], marks[:conds] + of_carry)):
            return everything
        return _loop(eqn, reach(params["body_jaxpr"], marks[conds:]))
    inner = _inner(eqn)
    if inner is None:
        return everything
    if name == "scan":
        return _loop(eqn, reach(inner, _mark_all_keys(eqn.invars, marks)))
    return reach(inner, marks)


def _loop(eqn: Any, results: list[bool]) -> list[bool]:
    """Closes one pass of a loop's body: what is marked may return by the carry.

    A key that only travels along in the carry, even split at each pass, marks nothing
    but keys; as soon as anything else is marked, all is.
    """
    numbers = [
        mark and not _is_key(var)
        for var, mark in zip(eqn.outvars, results, strict=True)
    ]
    if any(numbers):
        return [True] * len(results)
    return [_is_key(var) for var in eqn.outvars]


def _mark_all_keys(atoms: Any, marks: list[bool]) -> list[bool]:
    return [mark or _is_key(atom) for atom, mark in zip(atoms, marks, strict=True)]


def _is_key(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jax.dtypes.prng_key)


def _inner(eqn: Any) -> Any:
    """The one inner jaxpr whose inputs and results are the equation's, or None."""
    found = [_open(value) for value in eqn.params.values() if hasattr(value, "eqns")]
    fitting = [
        jaxpr
        for jaxpr in found
        if len(jaxpr.invars) == len(eqn.invars)
        and len(jaxpr.outvars) == len(eqn.outvars)
    ]
    return fitting[0] if len(found) == len(fitting) == 1 else None


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
