r"""The vocabulary of the library: two protocols, a dtype policy, and shared checks.

The dimension key, used in every docstring:

====== =======================================================================
``B``  batch (rows)
``T``  time steps
``D``  size of the input at one step
``H``  hidden size
``G``  gates times ``H`` (``4H`` for an LSTM, ``3H`` for a GRU)
``V``  vocabulary size
====== =======================================================================

A **cell** advances one step; a **layer** maps a whole sequence. Neither is a base
class: any object with these methods is a cell or a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
T = TypeVar("T")
Initializer = Callable[[Array, tuple[int, ...], Any], Array]
Activation = Callable[[Array], Array]


@runtime_checkable
class Cell(Protocol):
    """One time step of a recurrence: any object with these three methods.

    There is no base class to inherit from. A cell must be hashable and equal by value,
    as a frozen dataclass is, because equal cells share what JAX compiles. ``x``, the
    carry and the output ``y`` may be pytrees. The leading dimensions of every leaf are
    batch dimensions.

    A cell may also define these members:

    * ``x_ndim``: the number of dimensions of ``x`` after the batch; 1 if absent.
    * ``prepare(params, xs, *, key=None) -> (params, xs)``: called once a sequence,
      before the loop. What is constant in time (a dropout mask, normalised weights, the
      projected memory of an encoder) becomes a leaf of the params. What differs from
      step to step (a zoneout mask) joins ``xs`` as a leaf ``[B, T, ...]``.
    * ``project``, ``mix`` and ``update``, the gated form, which fast loops need; see
      :func:`gated`.
    """

    def init(self, key: Array, x: PyTree, /) -> PyTree:
        """Makes the params.

        Args:
          key: a typed key, ``jax.random.key(seed)``, from which the weights are drawn.
          x: an example of the input at one step, ``[..., D]``; only its shape and dtype
            are read.

        Returns:
          The params, a pytree of arrays.
        """
        ...

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...], /) -> PyTree:
        """Makes the fresh carry, with which a sequence begins: zeros, or learned.

        Args:
          params: what ``init`` made; a learned carry is read from them.
          batch_shape: the batch dimensions, such as ``(B,)``.

        Returns:
          The carry, a pytree whose leaves begin with ``batch_shape``.
        """
        ...

    def step(
        self, params: PyTree, carry: PyTree, x: PyTree, /
    ) -> tuple[PyTree, PyTree]:
        """Advances one time step.

        Args:
          params: what ``init`` made.
          carry: the carry of the step before.
          x: the input at this step, ``[..., D]``.

        Returns:
          ``(carry, y)``: the new carry, of the same shapes and dtypes, and the output.
          This is the order that ``jax.lax.scan`` wants.
        """
        ...


@runtime_checkable
class Layer(Protocol):
    """A map from sequences to sequences, ``[B, T, ...] -> [B, T, ...]``.

    As with cells, any object with these methods is a layer. A model is a layer whose
    first result is its answer, which need not be a sequence.

    A layer may also define these members:

    * ``causal``: false if an output depends on later inputs; true if absent.
    * ``pointwise``: true if the output at each step depends on the input at that step
      alone; false if absent.
    * ``retime(lengths, mask, resets)``: for a layer that changes T, returns what the
      three become for its outputs.
    * ``last(params, xs, carry, ...)``: how the layer is pooled over time, if the output
      at the last valid step is not the right one; see :func:`jlstm.pool`.
    """

    def init(self, key: Array, xs: PyTree, /) -> PyTree:
        """Makes the params.

        Args:
          key: a typed key, ``jax.random.key(seed)``, from which the weights are drawn.
          xs: an example of the input, ``[B, T, ...]``; only its shape and dtype are
            read.

        Returns:
          The params, a pytree of arrays.
        """
        ...

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...], /) -> PyTree:
        """Makes the fresh carry, with which a sequence begins.

        Args:
          params: what ``init`` made.
          batch_shape: the batch dimensions, ``(B,)``.

        Returns:
          The carry, a pytree whose leaves begin with ``batch_shape``.
        """
        ...

    def apply(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        /,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs the layer over a batch of sequences.

        Args:
          params: what ``init`` made.
          xs: the inputs, ``[B, T, ...]``.
          carry: the incoming carry, such as the one returned for the chunk before;
            ``None`` means the fresh one.
          lengths: the number of valid steps in each row, ``[B]`` integers; the steps
            after them are padding. ``None`` means that all steps are valid.
          mask: instead of ``lengths``, ``[B, T]`` booleans, true at valid steps.
          resets: ``[B, T]`` booleans, true at steps before which the carry is made
            fresh again; ``None`` means nowhere.
          key: a typed key for noise, such as dropout; ``None`` means no noise.

        Returns:
          ``(ys, carry)``: the outputs, zero at masked steps, and the carry after each
          row's last valid step.
        """
        ...


PARTS = ("project", "mix", "update")


def gated(cell: Cell) -> bool:
    """Tells whether a cell is written in gated form, which fast loops need.

    The gated form splits one step into three methods::

        zx = cell.project(params, x)               # what depends on x alone
        zh = cell.mix(params, carry, zx)           # the recurrent product
        carry, y = cell.update(params, carry, zx, zh)  # the gates

    with the law ``step(p, c, x) == update(p, c, zx, zh)``. A loop can then compute
    ``project`` for all steps at once, as one large product.

    A wrapper defines the three methods whatever its inner cell has, so it answers with
    an attribute ``gated = property(lambda self: jlstm.gated(self.cell))``.

    Args:
      cell: any cell.

    Returns:
      True if the cell has all three methods, or what its attribute ``gated`` says.

    Raises:
      TypeError: the cell has one or two of the three methods.

    Example:
      >>> jlstm.gated(jlstm.LSTM(8))
      True
    """
    answer = getattr(cell, "gated", None)
    if answer is not None:
        return bool(answer)
    found = [part for part in PARTS if callable(getattr(cell, part, None))]
    if found and len(found) < len(PARTS):
        missing = [part for part in PARTS if part not in found]
        raise TypeError(
            f"{type(cell).__name__}: the gated form needs {', '.join(PARTS)}; got "
            f"{', '.join(found)} without {', '.join(missing)}; define all three, or "
            "only step"
        )
    return bool(found)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts the floating leaves of a tree; ``None`` changes nothing."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if is_inexact(leaf) else leaf, tree
    )


def is_inexact(leaf: Any) -> bool:
    """Tells whether a leaf is floating or complex, that is, differentiable."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def smooth_leaves(tree: PyTree) -> PyTree:
    """Keeps the differentiable leaves; puts ``None``, an empty subtree, for others."""
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)


def join(tree: PyTree, others: PyTree) -> PyTree:
    """Puts leaves of another tree where the first has ``None``."""

    def pick(a: Any, b: Any) -> Any:
        return b if a is None else a

    return jax.tree.map(pick, tree, others, is_leaf=lambda leaf: leaf is None)


def common_dtype(*dtypes: Any) -> Any:
    """The dtype that dtypes promote to, also where implicit promotion is refused."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def where_rows(flags: Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """Selects between two trees, row by row or step by step.

    Args:
      flags: booleans, ``[B]`` to select rows or ``[B, T]`` to select steps.
      on_true: a pytree of arrays whose shapes begin with that of ``flags``; it is taken
        where ``flags`` is true.
      on_false: a pytree of the same structure and shapes, taken elsewhere.

    Returns:
      A pytree of the same structure.

    Example:
      >>> flags = jnp.array([True, False])
      >>> jlstm.where_rows(flags, jnp.ones(2), jnp.zeros(2)).tolist()
      [1.0, 0.0]
    """

    def select(a: Array, b: Array) -> Array:
        return jnp.where(
            flags.reshape(flags.shape + (1,) * (a.ndim - flags.ndim)), a, b
        )

    return jax.tree.map(select, on_true, on_false)


def zero_rows(flags: Array | None, tree: PyTree) -> PyTree:
    """Replaces rows or steps that are not flagged by zeros.

    A layer of your own calls it twice, with the mask of :func:`jlstm.valid_steps`: on
    its inputs, so that padding cannot do harm, and on its outputs.

    Args:
      flags: booleans, ``[B]`` or ``[B, T]``; ``None`` keeps everything.
      tree: a pytree of arrays whose shapes begin with that of ``flags``.

    Returns:
      A pytree of the same structure. A value that is replaced has no gradient, even if
      it was NaN.

    Example:
      >>> jlstm.zero_rows(jnp.array([True, False]), jnp.ones((2, 2))).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """
    if flags is None:
        return tree
    return where_rows(flags, tree, jax.tree.map(jnp.zeros_like, tree))


def float_dtype(x: Any) -> Any:
    """The dtype of params for inputs ``x``: its own if floating, else the default."""
    return jnp.result_type(x) if is_inexact(x) else jnp.result_type(float)


@dataclass_transform(frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Makes a class a config: a frozen dataclass that prints as it was written.

    A config says what a cell or a layer is, and holds no arrays. Its fields must have a
    literal form (numbers, strings, tuples, other configs, module-level functions), so
    that it can be printed, hashed and compared by value. Use it as a decorator on a
    cell or layer of your own, in the place of ``dataclass(frozen=True)``, which works
    too.

    Args:
      cls: a class with annotated fields, as for ``dataclasses.dataclass``.

    Returns:
      The class, as a frozen dataclass.

    Raises:
      ValueError: on construction, if a field holds a lambda or a local function. Each
        one is another object, so no two such configs would be equal, and each would be
        compiled again.

    Example:
      >>> jlstm.LSTM(256, forget_bias=2.0)
      LSTM(256, forget_bias=2.0)
    """
    check = getattr(cls, "__post_init__", None)

    def post_init(self: Any) -> None:
        check_literal(self)
        if check is not None:
            check(self)

    def written(self: Any) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(_literal(value))
            elif value != field.default:
                parts.append(f"{field.name}={_literal(value)}")
        return f"{cls.__name__}({', '.join(parts)})"

    cls.__post_init__ = post_init  # type: ignore[attr-defined]
    if "__repr__" not in cls.__dict__:
        cls.__repr__ = written
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


def check_literal(config: Any) -> None:
    """Refuses lambdas and local functions in the fields of a dataclass.

    Each construction makes another such function, so no two configs would be equal, and
    each would be compiled again.

    Raises:
      ValueError: naming the config and the field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        name = getattr(value, "__qualname__", "")
        if "<lambda>" in name or "<locals>" in name:
            raise ValueError(
                f"{type(config).__name__}.{field.name}: must be a module-level "
                f"function or a frozen dataclass, got {name}; define it at the top of "
                "a module"
            )
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_literal(value)


def _literal(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if name is None:
        return repr(value)
    # By the name that a user writes, not the private one where it is defined.
    for public in (jax.nn, jnp):
        if getattr(public, name, None) is value:
            return f"{public.__name__}.{name}"
    return f"{value.__module__}.{name}"


@config
class Policy:
    """The dtypes in which a recurrent layer keeps its params, computes and carries.

    Give one to a layer: ``RNN(cell, policy=Policy(...))``. A field that is ``None``
    changes nothing, so ``Policy()`` is the same as no policy. For half precision,
    ``Policy(compute=jnp.bfloat16, carry=jnp.float32)`` is a good first choice: products
    are fast, and small additions to the memory are not rounded away.

    Attributes:
      param: the dtype in which ``init`` makes the params.
      compute: the dtype in which inputs and weights are multiplied, and that of the
        outputs. If it is ``None``, outputs have the dtype that the gates give them.
      carry: the dtype of the carry, between steps and as it is returned.
      accumulate: the dtype in which pre-activations reach the gates. If it is ``None``,
        it is that of ``carry``, or else that of ``compute``.

    Raises:
      ValueError: on construction, if a field is not a floating dtype.

    Example:
      >>> policy = jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
      >>> layer = jlstm.RNN(jlstm.LSTM(8), policy=policy)
    """

    param: Any = None
    compute: Any = None
    carry: Any = None
    accumulate: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            try:
                dtype = jnp.dtype(value)
            except TypeError:
                dtype = value
            if not (isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.inexact)):
                raise ValueError(
                    f"Policy.{field.name}: must be a floating dtype, such as "
                    f"jnp.bfloat16, got {dtype}"
                )
            # By name: NumPy's dtype of float64 equals None.
            object.__setattr__(self, field.name, dtype.name)


def check_positive(config: Any, *names: str) -> None:
    """Refuses sizes that are not positive integers.

    Raises:
      ValueError: naming the config, the field and the value.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{type(config).__name__}.{name}: must be a positive int, got {value!r}"
            )


def check_activations(config: Any, *names: str, optional: bool = False) -> None:
    """Refuses activations that cannot be called, such as their names.

    Raises:
      TypeError: naming the config and the field, and saying what to write.
    """
    for name in names:
        given = getattr(config, name)
        if not callable(given) and not (optional and given is None):
            known = isinstance(given, str) and hasattr(jax.nn, given)
            raise TypeError(
                f"{type(config).__name__}.{name}: must be a "
                f"function{' or None' * optional}, got {given!r}; give "
                f"{f'jax.nn.{given}' if known else 'a function, such as jax.nn.relu'}"
            )


def check_divides(config: Any, part: str, whole: str) -> None:
    """Refuses a number of parts that does not divide a size.

    Raises:
      ValueError: naming the config, the field and the value.
    """
    size, count = getattr(config, whole), getattr(config, part)
    if size % count:
        raise ValueError(
            f"{type(config).__name__}.{part}: must divide {whole}={size}, got {count}"
        )
