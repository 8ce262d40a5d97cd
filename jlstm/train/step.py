"""Compiled steps of training and evaluation, made from a loss function."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlstm.train.losses import Mean, average
from jlstm.train.state import (
    LossScale,
    NonFiniteError,
    TrainState,
    check_alive,
    type_name,
)
from jlstm.types import Array, PyTree

Metrics = dict[str, Any]  # a Mean or a scalar each
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
EvalStep = Callable[..., tuple[Metrics, PyTree]]


# XLA would combine the sums of all gradients over the devices of a CPU into one, and
# hold every gradient twice meanwhile.
_SUMS_APART = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}


class Aux(NamedTuple):
    """The second result of a loss function: its metrics and its carry.

    Attributes:
      metrics: what to report beside the loss, by name. Each is a scalar or, to be
        averaged by weight, a :class:`Mean`.
      carry: in truncated backpropagation through time, the carry for the next batch;
        otherwise None.
    """

    metrics: Mapping[str, Any]
    carry: PyTree = None


class LossFn(Protocol):
    """The signature ``loss_fn(params, batch, *, key, carry) -> (loss, Aux)``.

    You write such a function for your model and data. ``batch`` is what the iterable of
    batches yields. ``key`` is a PRNG key for dropout, or None when there is to be none
    (always in evaluation). ``carry`` is the carry from the batch before, or None. The
    loss is a scalar or, if batches differ in the number of valid steps, a
    :class:`Mean`, as the losses of :mod:`jlstm.train` return it.
    """

    def __call__(
        self, params: PyTree, batch: Any, *, key: Array | None, carry: PyTree
    ) -> tuple[Mean | Array, Aux]:
        """Returns the loss, as a :class:`Mean` or a scalar, and an :class:`Aux`."""
        ...


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    donate: bool = True,
    debug_nans: bool = False,
) -> TrainStep:
    r"""Makes the function ``step(state, batch) -> (state, metrics)`` that trains.

    It is compiled once for each shape of the batch. The step after :math:`n` steps
    calls ``loss_fn(params, batch, key=fold_in(state.key, n), carry=state.carry)``, with
    ``key=None`` if the state has no key. It differentiates the loss with respect to the
    params and applies ``tx``. The carry that the loss returns becomes the carry of the
    new state; no gradient passes through it. The metrics are those of the loss, with
    ``loss``, ``grad_norm`` (the norm of the gradient before any clipping), ``skipped``
    and, if the state has one, ``loss_scale``.

    A step is skipped if its loss or the norm of its gradient is not finite, or if its
    new carry contains NaN. Only the count of steps changes then, and ``skipped`` is 1
    instead of 0. :func:`fit` counts these steps, and raises after too many in a row.

    With ``accumulate=k`` the batch is cut into ``k`` parts with equally many rows,
    which are processed one after another in the memory of one. With :math:`(S_i, N_i)`
    the total and the count of the :class:`Mean` of part :math:`i`, the gradient is that
    of :math:`\sum_i S_i / \sum_i N_i`. This is the gradient of the whole batch, even if
    some parts have more padding than others. A loss that is a plain scalar has no
    count; its average over the parts is taken. Part :math:`i` gets the key
    ``fold_in(key, i)``.

    With ``ema_decay`` the average of the params is updated after each step,

    .. math::
        \bar\theta \leftarrow d \bar\theta + (1 - d) \theta, \qquad
        d = \min\left(\text{ema\_decay}, \frac{1 + n}{10 + n}\right)

    so that it soon forgets the initial params.

    If the state has a key and the loss does not depend on it, the first step warns that
    dropout is off. Most likely the key was not passed on to ``apply``.

    Args:
      loss_fn: the loss; see :class:`LossFn`.
      tx: the optax transformation that ``create_state`` was given.
      accumulate: the number of parts into which each batch is cut. Raise it when a
        batch does not fit in memory; the batch size must be a multiple of it.
      ema_decay: the decay :math:`d` of the averaged params, from 0 to below 1, such as
        0.999: the average covers about ``1 / (1 - ema_decay)`` steps. It needs
        ``create_state(ema=True)``; None if there is no average.
      donate: whether the new state reuses the memory of the old one, which then cannot
        be read any more. False keeps the old state, for twice the memory.
      debug_nans: whether to search for the operation that first gives NaN or infinity.
        A step that is not finite is repeated operation by operation. The option is
        slow: the program waits for every step, and no state is donated.

    Returns:
      The step. It raises ``ValueError`` if the loss is not a scalar, an :class:`Aux` is
      missing, the carry differs from the state's in structure, shape or dtype, or the
      state was donated to an earlier step. With ``debug_nans`` it also raises
      :class:`NonFiniteError`.

    Raises:
      ValueError: ``tx`` is no optax transformation, or an option is out of range.

    Example:
      >>> train = jlstm.train
      >>> def loss_fn(params, batch, *, key, carry):
      ...     return train.squared_error(params * batch, batch), train.Aux({})
      >>> tx = train.sgd(0.1)
      >>> step = train.make_train_step(loss_fn, tx)
      >>> state, metrics = step(train.create_state(jnp.zeros(()), tx), jnp.ones(()))
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"make_train_step: tx must be an optax transformation, got {tx!r}; such "
            "as adamw(1e-3)"
        )
    if accumulate < 1:
        raise ValueError(
            f"make_train_step: accumulate must be at least 1, got {accumulate}"
        )
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(
            f"make_train_step: ema_decay must lie in [0, 1), got {ema_decay}"
        )

    def gradients(state: TrainState, batch: PyTree) -> tuple[PyTree, Metrics, PyTree]:
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        scale = 1 if state.loss_scale is None else state.loss_scale.scale
        parts = _Parts(loss_fn, state.params, scale, accumulate)
        return parts(batch, key, jax.lax.stop_gradient(state.carry))

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        grads, metrics, new_carry = gradients(state, batch)
        _check_carry(new_carry, state.carry)
        loss = metrics["loss"]
        loss = loss.value if isinstance(loss, Mean) else loss

        def take(grads: PyTree, old: dict[str, PyTree]) -> dict[str, PyTree]:
            params = old["params"]
            updates, opt_state = tx.update(grads, old["opt_state"], params)
            params = optax.apply_updates(params, updates)
            ema = _average(old["ema"], params, state.step, ema_decay)
            return {
                "params": params, "opt_state": opt_state, "carry": new_carry, "ema": ema
            }  # fmt: skip

        # Strict promotion, where a user wants it, is for their code: optax's Adam
        # raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            grad_norm = optax.tree.norm(jax.tree.map(_wide, grads))
            finite = jnp.isfinite(loss + grad_norm + _zero(new_carry))
            old = {
                name: getattr(state, name)
                for name in ("params", "opt_state", "carry", "ema")
            }
            # A select in its place would cost a twentieth of the step.
            new = jax.lax.cond(finite, take, lambda grads, old: old, grads, old)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            loss_scale=_rescale(state.loss_scale, finite),
            **new,
        )
        skipped = 1 - finite.astype(jnp.int32)
        more = {"grad_norm": grad_norm, "skipped": skipped}
        if state.loss_scale is not None:
            more["loss_scale"] = state.loss_scale.scale
        return new, {**metrics, **more}

    donated = donate and not debug_nans
    compile = partial(jax.jit, train_step, donate_argnums=(0,) if donated else ())
    compiled = inner = compile()
    if getattr(jax.config, "jax_num_cpu_devices", 1) > 1:
        compiled = compile(compiler_options=_SUMS_APART)
    checked = False

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        nonlocal checked
        check_alive("train_step", state.step)
        if not checked:
            _check_options(state, ema_decay)
            if state.key is not None:
                _warn_if_key_is_unused(inner.trace(state, batch).jaxpr, state, batch)
        checked = True
        if compiled is not inner:
            # A jit inside another, where all that is made is traced, takes no options;
            # nor does one whose arguments are.
            leaves = jax.tree.leaves((state, batch, jnp.zeros(())))
            if any(isinstance(leaf, Tracer) for leaf in leaves):
                return inner(state, batch)
        new, metrics = compiled(state, batch)
        if debug_nans and metrics["skipped"]:
            _find_nans(gradients, state, batch)
        return new, metrics

    return step


class _Parts:
    """Gradients, metrics and the new carry of a batch that is read in parts."""

    def __init__(
        self, loss_fn: LossFn, params: PyTree, scale: Array | int, parts: int
    ) -> None:
        self._loss_fn, self._params = loss_fn, params
        self._scale, self._parts = scale, parts

    def __call__(
        self, batch: PyTree, key: Array | None, carry: PyTree
    ) -> tuple[PyTree, Metrics, PyTree]:
        if self._parts == 1:
            grads, (metrics, carry) = self._gradients(self._value, batch, key, carry)
            return grads, metrics, carry
        cut = jax.tree.map(self._cut, (batch, carry))
        key_of = partial(jax.random.fold_in, key) if key is not None else lambda i: None

        def add(sums: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
            index, (batch, carry) = part
            made = self._gradients(self._total, batch, key_of(index), carry)
            grads, (metrics, carry) = made
            return jax.tree.map(jnp.add, sums, (grads, metrics)), carry

        first = jax.tree.map(lambda x: x[0], cut)
        shapes = jax.eval_shape(
            partial(self._gradients, self._total), first[0], key, first[1]
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = (zeros[0], zeros[1][0])
        parts = (jnp.arange(self._parts), cut)
        (grads, metrics), carry = jax.lax.scan(add, start, parts)
        carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry)
        metrics = {
            name: metric if isinstance(metric, Mean) else metric / self._parts
            for name, metric in metrics.items()
        }
        weight = _count(metrics) if isinstance(metrics["loss"], Mean) else self._parts
        weight = jnp.maximum(weight, 1)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        return grads, metrics, carry

    def _cut(self, leaf: Array) -> Array:
        if not jnp.ndim(leaf) or leaf.shape[0] % self._parts:
            raise ValueError(
                f"train_step: accumulate={self._parts} needs a number of rows that it "
                "divides, in each array of the batch and the carry, got "
                f"{type_name(leaf)}"
            )
        return jnp.reshape(leaf, (self._parts, -1, *leaf.shape[1:]))

    def _gradients(
        self, objective: Callable, batch: PyTree, key: Array | None, carry: PyTree
    ) -> tuple[PyTree, tuple[Metrics, PyTree]]:
        def scaled(params: PyTree) -> tuple[Array, tuple[Metrics, PyTree]]:
            loss, metrics, new_carry = _call(self._loss_fn, params, batch, key, carry)
            value = objective(loss, metrics["loss"])
            if not isinstance(self._scale, int):
                value = value.astype(jnp.float32) * self._scale
            return value, (metrics, jax.lax.stop_gradient(new_carry))

        grads, aux = jax.grad(scaled, has_aux=True)(self._params)
        if not isinstance(self._scale, int):
            wide = jax.tree.map(lambda g: g.astype(jnp.float32) / self._scale, grads)
            grads = jax.tree.map(lambda w, g: w.astype(g.dtype), wide, grads)
        return grads, aux

    @staticmethod
    def _value(loss: Array, metric: Any) -> Array:
        del metric
        return loss

    @staticmethod
    def _total(loss: Array, metric: Any) -> Array:
        return jnp.asarray(metric.total) if isinstance(metric, Mean) else loss


def _count(metrics: Metrics) -> Array:
    loss = metrics["loss"]
    return jnp.asarray(loss.count if isinstance(loss, Mean) else 1)


def _average(ema: PyTree, params: PyTree, step: Array, decay: float | None) -> PyTree:
    if decay is None or ema is None:
        return ema
    n = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(
        lambda old, new: (old + rate * (new - old)).astype(old.dtype), ema, params
    )


def _wide(leaf: Array) -> Array:
    """Widens a leaf to float32 at least, since squares of float16 would underflow."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _zero(tree: PyTree) -> Array:
    """Returns 0, or NaN if a leaf has one; a carry may contain infinity on purpose."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    marks = [jnp.where(jnp.isnan(x).any(), jnp.nan, 0.0) for x in floats]
    return sum(marks, jnp.float32(0))


# After so many steps in a row without an overflow, the loss scale is doubled.
_GROWTH_STEPS = 2000
_LARGEST_SCALE = 2.0**24


def _rescale(scale: LossScale | None, finite: Array) -> LossScale | None:
    if scale is None:
        return None
    good = jnp.where(finite, scale.good_steps + 1, 0)
    grown = good >= _GROWTH_STEPS
    after = jnp.where(grown, jnp.minimum(2 * scale.scale, _LARGEST_SCALE), scale.scale)
    after = jnp.where(finite, after, jnp.maximum(scale.scale / 2, 1))
    return LossScale(after, jnp.where(grown, 0, good))


def _check_options(state: TrainState, ema_decay: float | None) -> None:
    if (state.ema is None) != (ema_decay is None):
        raise ValueError(
            "train_step: an average of the params needs both create_state(ema=True) "
            "and make_train_step(ema_decay=...)"
        )


def _find_nans(gradients: Callable, state: TrainState, batch: PyTree) -> None:
    """Takes a step again, one operation at a time, up to one that is not finite."""
    where = f"train_step: step {int(state.step) + 1}"
    # Infinity may be meant, as in a mask of logits: it is looked for only then.
    for looking in (jax.debug_nans, jax.debug_infs):
        try:
            with jax.disable_jit(), looking(True):
                jax.block_until_ready(gradients(state, batch)[0])
        except FloatingPointError as error:
            raise NonFiniteError(f"{where} is not finite: {error}") from error
    raise NonFiniteError(
        f"{where} is not finite, although each operation of its loss and gradient is "
        "finite when it runs by itself: the update overflows, or the state or batch "
        "is not finite already"
    )


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """Makes the compiled function ``eval_step(params, batch, carry=None)``.

    It returns ``(metrics, carry)`` and is compiled once for each shape of the batch.
    The loss is called with ``key=None``, so there is no dropout.

    Args:
      loss_fn: the loss; see :class:`LossFn`. It may be the one that
        :func:`make_train_step` was given.

    Returns:
      The step, for :func:`evaluate` and :func:`evaluate_every`. Its metrics are those
      of the loss, and ``loss``.

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
    """Averages the metrics of a data set.

    The carry that the loss returns for one batch is passed on with the next. All
    metrics are fetched from the device at once, after the last batch.

    Args:
      eval_step: from :func:`make_eval_step`.
      params: the params to score, such as ``state.params`` or ``state.ema``.
      batches: any iterable of batches, which is read once.
      carry: the carry for the first batch, where batches continue each other;
        otherwise None.

    Returns:
      One float for each metric. Averages of a :class:`Mean` are exact, however the data
      are cut into batches; a plain scalar has the same weight in each batch.

    Raises:
      ValueError: there are no batches, ``eval_step`` is no such step, ``params`` is a
        whole state, or the params were donated to a training step.

    Example:
      See :func:`make_eval_step`.
    """
    if isinstance(params, TrainState):
        raise ValueError("evaluate: needs params, got a TrainState; give state.params")
    check_takes("evaluate", eval_step, params=params, batch=None, carry=carry)
    check_alive("evaluate", params)
    collected = []
    for batch in batches:
        metrics, carry = eval_step(params, batch, carry)
        collected.append(metrics)
    if not collected:
        raise ValueError(
            "evaluate: batches is empty; an iterator can be read only once"
        )
    return average(collected)


def check_takes(where: str, step: Any, **arguments: Any) -> None:
    """Refuses a function that is not a training or evaluation step.

    Raises:
      ValueError: the function does not take these arguments.
    """
    maker, other = "make_train_step", "params"
    if "params" in arguments:
        maker, other = "make_eval_step", "state"
    try:
        signature = inspect.signature(step)
        signature.bind(*arguments.values())
        fits = next(iter(signature.parameters)) != other
    except TypeError:
        fits = False
    except ValueError:  # a callable that does not tell its signature
        fits = True
    if not fits:
        raise ValueError(
            f"{where}: expected a step from {maker}, called with "
            f"({', '.join(arguments)}), got {getattr(step, '__qualname__', step)!r}"
        )


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
            "pass key= on to apply, or call create_state without a key",
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
