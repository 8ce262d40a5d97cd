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
    """One time step of a recurrence; leading dimensions of ``x`` are batch dimensions.

    ``x``, the carry and ``y`` may be pytrees. Every carry leaf begins with the batch
    dimensions. A cell is a frozen dataclass: printable, hashable, compared by value.

    Optional members:

    * ``x_ndim``: the number of dimensions of ``x`` after the batch, 1 if absent.
    * ``prepare(params, xs, *, key=None) -> (params, xs)``: called once a sequence,
      outside the loop. What is constant in time (a variational mask, normalised
      weights, a projected encoder memory) becomes a leaf of the params; what differs
      by step (zoneout masks) joins ``xs``, as ``[B, T, ...]``.
    * the gated form, ``project``, ``mix`` and ``update`` (see :func:`gated`).
    """

    def init(self, key: Array, x: PyTree, /) -> PyTree:
        """Makes params; of ``x`` (the input at one step) only shape and dtype count."""
        ...

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...], /) -> PyTree:
        """Makes the fresh carry: zeros, or learned."""
        ...

    def step(
        self, params: PyTree, carry: PyTree, x: PyTree, /
    ) -> tuple[PyTree, PyTree]:
        """Advances one step and returns ``(carry, y)``, the order of ``lax.scan``."""
        ...


@runtime_checkable
class Layer(Protocol):
    """A whole sequence, ``[B, T, ...] -> [B, T, ...]``.

    Optional members:

    * ``causal``: false if an output depends on later inputs; true if absent.
    * ``pointwise``: true if each step depends on that step alone; false if absent.
    * ``retime(lengths, mask, resets)``: what they become, for a layer that changes T.
    * ``last(params, xs, carry, ...)``: see :func:`jlstm.pool`.
    """

    def init(self, key: Array, xs: PyTree, /) -> PyTree:
        """Makes params; of ``xs`` (a batch of sequences) only shape and dtype count."""
        ...

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...], /) -> PyTree:
        """Makes the fresh carry."""
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
        """Runs the layer and returns ``(ys, carry)``."""
        ...


PARTS = ("project", "mix", "update")


def gated(cell: Cell) -> bool:
    """Tells whether a cell is written in gated form.

    The gated form splits one step into parts::

        zx = cell.project(params, x)               # what depends on x alone
        zh = cell.mix(params, carry, zx)           # the recurrent product
        carry, y = cell.update(params, carry, zx, zh)

    with the law ``step(p, c, x) == update(p, c, zx, zh)``. A wrapper that defines the
    parts for the sake of its inner cell answers for it with an attribute
    ``gated = property(lambda self: jlstm.gated(self.cell))``.

    Raises:
      TypeError: some parts are defined and others are not.

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
            "step alone"
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
    """Selects by row, or step: flags ``[B]`` or ``[B, T]``, leaves that begin so."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(
            flags.reshape(flags.shape + (1,) * (a.ndim - flags.ndim)), a, b
        )

    return jax.tree.map(select, on_true, on_false)


def zero_rows(flags: Array | None, tree: PyTree) -> PyTree:
    """Replaces what is not flagged by zeros; ``None`` flags everything."""
    if flags is None:
        return tree
    return where_rows(flags, tree, jax.tree.map(jnp.zeros_like, tree))


def float_dtype(x: Any) -> Any:
    """The dtype of params that meet ``x``: its own if floating, else the default."""
    return jnp.result_type(x) if is_inexact(x) else jnp.result_type(float)


@dataclass_transform(frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Makes a class a config: a frozen dataclass that prints as it was written.

    Fields need a literal form, so that a config can be printed, hashed and compared by
    value: numbers, strings, tuples, other configs, module-level functions.

    Raises:
      ValueError: on construction, if a field holds a lambda or a local function.

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

    Each construction makes another one, so that no two configs would be equal, and
    each would compile anew.

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
    """Dtypes of a recurrent layer; ``None`` keeps what the arrays have.

    Attributes:
      param: in which params are made and stored.
      compute: in which inputs and weights are multiplied, and outputs leave; without
        it, outputs leave as the gates give them.
      carry: in which the carry is kept between steps.
      accumulate: in which pre-activations reach the gates; ``carry`` if ``None``, else
        ``compute``.

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
                f"{type(config).__name__}.{name}: must be a function"
                f"{' or None' * optional}, got {given!r}; give "
                f"jax.nn.{given if known else 'relu, say'}"
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
