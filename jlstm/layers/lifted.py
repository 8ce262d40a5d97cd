"""Flax modules as layers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlstm import door
from jlstm.layers.pointwise import Pointwise
from jlstm.types import Array, PyTree, config


@config
class Lifted(Pointwise):
    """A Flax module as a layer; :func:`jlstm.lift` makes it.

    Attributes:
      source: the module, or what makes it.
      per_step: true runs it on each step by itself, false on the whole sequence.
    """

    source: Linen | NNX
    per_step: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.source, Linen | NNX):
            raise TypeError(
                f"Lifted.source: must be made by lift(module), got {self.source!r}"
            )

    def __repr__(self) -> str:
        option = "" if self.per_step else ", per_step=False"
        return f"lift({self.source!r}{option})"

    @property
    def pointwise(self) -> bool:
        """Whether each output depends on the input at that step alone."""
        return self.per_step

    @property
    def causal(self) -> bool:
        """Whether outputs are known to depend on no later inputs."""
        return self.per_step

    def init(self, key: Array, xs: PyTree) -> PyTree:
        """Makes the module's params for inputs like ``xs [B, T, ...]``."""
        door.batch_and_time(xs, "lift")
        drop = 2 if self.per_step else 0
        x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[drop:], leaf.dtype), xs)
        return _init(self.source, key, x)

    def apply(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, tuple[()]]:
        """Runs the module; outputs are zero at masked steps.

        Raises:
          NotImplementedError: resets, where the module sees the whole sequence.
        """
        if resets is not None and not self.per_step:
            raise NotImplementedError(
                f"{self!r}: cannot honour resets, because the module reads the whole "
                "sequence at once; cut the sequences at the resets"
            )
        masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return super().apply(params, xs, carry, key=key, **masking)

    def _map(self, params: PyTree, xs: PyTree, key: Array | None) -> PyTree:
        del key
        ys = _apply(self.source, self.per_step, params, xs)
        shape = door.batch_and_time(xs, "lift")
        if any(np.shape(leaf)[:2] != shape for leaf in jax.tree.leaves(ys)):
            raise door.error(
                "lift",
                f"{self!r} must return [B, T, ...], like its input "
                f"{door.shapes(xs)}, got {door.shapes(ys)}",
            )
        return ys


@partial(jax.jit, static_argnums=0)
def _init(source: Linen | NNX, key: Array, x: PyTree) -> PyTree:
    return source.init(key, x)


@partial(jax.jit, static_argnums=(0, 1))
def _apply(source: Linen | NNX, per_step: bool, params: PyTree, xs: PyTree) -> PyTree:
    run = partial(source.apply, params)
    # Over rows and steps, so that no module can mix them.
    return jax.vmap(jax.vmap(run))(xs) if per_step else run(xs)


# The two kinds of modules. They are not dataclasses, so that code which reads the
# fields of configs does not go on into those of Flax.


class Linen:
    """A module of ``flax.linen`` that has only params."""

    def __init__(self, module: Any) -> None:
        self.module = module
        try:
            hash(module)
        except TypeError:
            raise ValueError(
                f"lift: {self!r} must be hashable; use tuples instead of lists"
            ) from None

    def init(self, key: Array, x: PyTree) -> PyTree:
        """Makes params.

        Raises:
          ValueError: the module has more than params.
        """
        from flax import errors
        from flax.core import meta

        variables = meta.unbox(self.module.init(key, x))
        others = sorted(set(variables) - {"params"})
        if others:
            raise _more_than_params(self, f"the collections {', '.join(others)}")
        try:
            jax.eval_shape(self.module.apply, variables, x)
        except errors.InvalidRngError as error:
            name = str(error).partition('"')[2].partition('"')[0]
            raise _more_than_params(self, f"random numbers for {name!r}") from None
        return variables.get("params", {})

    def apply(self, params: PyTree, x: PyTree) -> PyTree:
        """Runs the module."""
        return self.module.apply({"params": params}, x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linen) and self.module == other.module

    def __hash__(self) -> int:
        return hash(self.module)

    def __repr__(self) -> str:
        return _written(self.module)


class NNX:
    """A module of ``flax.nnx`` that has only ``nnx.Param``, by what makes it."""

    def __init__(self, make: Callable, args: tuple, options: dict[str, Any]) -> None:
        self.make = make
        self.args = args
        self.options = tuple(sorted(options.items()))
        try:
            hash(self)
        except TypeError:
            raise ValueError(
                f"lift: the arguments in {self!r} must be hashable; use tuples "
                "instead of lists"
            ) from None

    def _make(self, key: Array | int) -> Any:
        from flax import nnx

        return self.make(*self.args, **dict(self.options), rngs=nnx.Rngs(key))

    def init(self, key: Array, x: PyTree) -> PyTree:
        """Makes params.

        Raises:
          ValueError: the module has more than params.
        """
        from flax import nnx

        del x
        _, params, others = nnx.split(self._make(key), nnx.Param, ...)
        if found := nnx.to_flat_state(others):
            named = (f"{'/'.join(map(str, p))} ({type(v).__name__})" for p, v in found)
            raise _more_than_params(self, ", ".join(named))
        return nnx.to_pure_dict(params)

    def apply(self, params: PyTree, x: PyTree) -> PyTree:
        """Runs the module."""
        from flax import nnx

        graph, state = nnx.split(nnx.eval_shape(lambda: self._make(0)))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    def _key(self) -> tuple:
        return self.make, self.args, self.options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NNX) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        options = [f"{name}={_written(value)}" for name, value in self.options]
        return ", ".join([self.make.__qualname__, *map(_written, self.args), *options])


def _more_than_params(source: Linen | NNX, what: str) -> ValueError:
    return door.error(
        "lift",
        f"a module must have only params, got {what} in {source!r}; use "
        "jlstm.LayerNorm and jlstm.Dropout instead of such parts",
    )


def _written(value: Any) -> str:
    """Writes what a module is made of in one line, without defaults."""
    from flax import linen

    if isinstance(value, linen.Module):
        parts = [
            f"{field.name}={_written(getattr(value, field.name))}"
            for field in dataclasses.fields(value)
            if field.name not in ("parent", "name")
            and getattr(value, field.name) is not field.default
        ]
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    return getattr(value, "__qualname__", None) or repr(value)


def lift(module: Any, *args: Any, per_step: bool = True, **options: Any) -> Lifted:
    """Makes a layer of a Flax module that has no state but its params.

    The module runs on each step of each row by itself, as under ``jax.vmap``: it is
    called with one ``x``, without batch and time. At masked steps it gets zeros, and
    its output is replaced by zeros.

    Args:
      module: a module of ``flax.linen``; or a class of ``flax.nnx``; or a module-level
        function that returns a module of ``flax.nnx``. A class or function is called
        with ``args``, ``options`` and ``rngs``.
      *args: arguments of the class or function; they must be hashable.
      per_step: false runs the module once on the whole ``[B, T, ...]``, as a
        convolution needs it. The module must then keep B and T, and must not mix rows.
        It cannot tell masked steps from zeros, and the layer refuses resets and is not
        causal.
      **options: keyword arguments of the class or function; they must be hashable.

    Returns:
      A layer, whose params are a dict.

    Raises:
      TypeError: ``module`` is something else, such as an instance of a ``flax.nnx``
        class.
      ValueError: the module or an argument has no hash; or, in ``init``, the module has
        more than params, such as the statistics of a BatchNorm or the random numbers of
        a Dropout.

    Example:
      >>> from flax import linen, nnx
      >>> first, last = jlstm.lift(linen.Dense(4)), jlstm.lift(nnx.Linear, 8, 2)
      >>> layer = jlstm.stack(first, jlstm.RNN(jlstm.LSTM(8)), last)
      >>> xs = jnp.ones((2, 5, 3))
      >>> layer.apply(layer.init(jax.random.key(0), xs), xs)[0].shape
      (2, 5, 2)
    """
    from flax import linen

    if isinstance(module, linen.Module):
        if args or options:
            raise TypeError(
                f"lift: {type(module).__name__} is an instance already and takes no "
                "further arguments; give them to its class"
            )
        return Lifted(Linen(module), per_step)
    kind = _kind(module)
    if kind == "linen class":
        raise TypeError(
            f"lift: must be a module, got the class {module.__name__}; make one: "
            f"{module.__name__}(...)"
        )
    if kind == "nnx module":
        name = type(module).__name__
        raise TypeError(
            f"lift: must be a class of nnx, got an instance of {name}; give the class "
            f"and its arguments, lift({name}, ...), because a config cannot hold the "
            "arrays of an instance"
        )
    name = getattr(module, "__qualname__", None)
    if not callable(module) or name is None:
        raise TypeError(
            "lift: must be a module of flax.linen, a class of flax.nnx, or a function "
            f"that makes a module, got {module!r}"
        )
    if "<" in name:
        raise ValueError(
            f"lift: must be a class or a module-level function, got {name}; define it "
            "at the top of a module"
        )
    return Lifted(NNX(module, args, options), per_step)


def _kind(module: Any) -> Literal["linen class", "nnx module", ""]:
    from flax import linen

    if isinstance(module, type) and issubclass(module, linen.Module):
        return "linen class"
    nnx = sys.modules.get("flax.nnx")  # a module of it is there only if it is loaded
    return "nnx module" if nnx and isinstance(module, nnx.Module) else ""
