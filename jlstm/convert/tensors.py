"""A peer's tensors by name: each is checked and taken once, and none is left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def flatten(where: str, tree: Mapping[Any, Any], separator: str) -> dict[str, Any]:
    """Names the leaves of nested mappings by their paths; ``None`` is no leaf.

    Raises:
      ValueError: it is no mapping.

    Example:
      >>> jlstm.convert.tensors.flatten("", {"cell": {"h": 1, "i": None}}, "/")
      {'cell/h': 1}
    """
    if not isinstance(tree, Mapping):
        kind = type(tree).__name__
        raise ValueError(f"{where}: expected tensors by name, got a {kind}")
    return dict(_flatten(tree, separator, ""))


def _flatten(tree: Any, separator: str, path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, separator, f"{path}{key}{separator}")
        elif value is not None:
            yield f"{path}{key}", value


def nest(arrays: Mapping[str, Any], separator: str) -> dict[Any, Any]:
    """Undoes :func:`flatten`; keys of digits become integers.

    Example:
      >>> jlstm.convert.tensors.nest({"layers/0/h": 1, "layers/1/h": 2}, "/")
      {'layers': {0: {'h': 1}, 1: {'h': 2}}}
    """
    tree: dict[Any, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(separator)
        node = tree
        for key in path:
            node = node.setdefault(int(key) if key.isdigit() else key, {})
        node[last] = array
    return tree


class Tensors:
    """Tensors by name, of which a converter takes what it expects.

    Args:
      where: the function that a user called, for errors.
      found: a tensor of any library by name; names that do not begin with ``prefix``
        belong to other parts of a model.
      prefix: what comes before the names that the converter knows.
      separator: of the parts of a name.
    """

    def __init__(
        self,
        where: str,
        found: Mapping[str, Any],
        prefix: str = "",
        separator: str = ".",
    ) -> None:
        self.where, self.prefix, self.separator = where, prefix, separator
        self._found = found
        begun = [name for name in found if name.startswith(prefix)]
        self._left = {name.removeprefix(prefix): found[name] for name in begun}
        self._dtype: Any = None
        if not begun:
            wanted = f" whose names begin with {prefix!r}" if prefix else ""
            raise ValueError(f"{where}: expected tensors{wanted}, got {_some(found)}")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def error(self, name: str, expected: str, got: str, hint: str = "") -> ValueError:
        """Makes the error of one tensor."""
        full = f"{self.where}: {self.prefix}{name}"
        return ValueError(f"{full}: expected {expected}, got {got}{hint}")

    def missing(self, name: str, expected: str) -> ValueError:
        """Makes the error of a tensor that is not there."""
        ends = (self.separator + name, name)
        for found in self._found:
            # The name after a prefix, which was not given.
            if found.endswith(ends[0]) and not self.prefix:
                prefix = found.removesuffix(name)
                hint = f"; there is {found}: give prefix={prefix!r}"
                return self.error(name, expected, "no such tensor", hint)
        hint = f"; there are {_some(self._found)}"
        return self.error(name, expected, "no such tensor", hint)

    def shape(self, name: str, expected: str) -> tuple[int, ...]:
        """The shape of a tensor, which is to be ``expected``."""
        if name not in self._left:
            raise self.missing(name, expected)
        return tuple(self._left[name].shape)

    def take(self, name: str, *shape: int | str, whose: str = "") -> np.ndarray:
        """Takes a tensor of a shape; a letter stands for any size.

        Args:
          name: of the tensor.
          *shape: what it must be.
          whose: a tensor it is, for errors.

        Raises:
          ValueError: there is none, or one of another shape or kind; names it.
        """
        expected = text(shape) + whose
        if name not in self._left:
            raise self.missing(name, expected)
        array = as_array(self._left.pop(name))
        fits = len(array.shape) == len(shape) and all(
            isinstance(size, str) or size == found
            for size, found in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise self.error(name, expected, text(array.shape))
        self._check_dtype(name, array.dtype)
        return array

    def _check_dtype(self, name: str, dtype: Any) -> None:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise self.error(name, "floating numbers", str(dtype))
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            hint = ", which JAX has only with jax_enable_x64; enable it, or cast first"
            raise self.error(name, "float32 or shorter", f"{dtype}{hint}")
        if self._dtype is None:
            self._dtype = dtype
        if dtype != self._dtype:
            raise self.error(name, f"{self._dtype}, as the others", str(dtype))

    def finish(self, layer: Any) -> None:
        """Refuses what is left over.

        Raises:
          ValueError: naming the first tensor that ``layer`` has no place for.
        """
        for name, value in self._left.items():
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            got = f"{text(np.shape(value))}{more}"
            raise self.error(name, f"no such tensor for {layer!r}", got)


class Leaves:
    """The tensors of one cell, by the names that its kind has for them.

    Args:
      tensors: of the whole.
      name: makes a tensor's name of a leaf's.
      inputs: ``D``, the number of inputs, if it is known.
      cell: which the tensors must fit, or ``None``.
    """

    def __init__(
        self,
        tensors: Tensors,
        name: Callable[[str], str],
        inputs: int | None,
        cell: Any,
    ) -> None:
        self.tensors, self.name = tensors, name
        self.whose = "" if cell is None else f" for {cell!r}"
        self.inputs: int | str = "D" if inputs is None else inputs

    def __contains__(self, leaf: str) -> bool:
        return self.name(leaf) in self.tensors

    def shape(self, leaf: str, expected: str) -> tuple[int, ...]:
        """The shape of a leaf, which is to be ``expected``."""
        return self.tensors.shape(self.name(leaf), expected)

    def take(self, leaf: str, *shape: int | str) -> np.ndarray:
        """Takes a leaf; see :meth:`Tensors.take`."""
        return self.tensors.take(self.name(leaf), *shape, whose=self.whose)

    def missing(self, leaf: str, expected: str) -> ValueError:
        """Makes the error of a leaf that is not there."""
        return self.tensors.missing(self.name(leaf), expected)

    def error(self, leaf: str, expected: str, got: str, hint: str = "") -> ValueError:
        """Makes the error of a leaf."""
        return self.tensors.error(self.name(leaf), expected, got, hint)


def as_array(tensor: Any) -> np.ndarray:
    """Copies a tensor of any library to NumPy; bfloat16 of PyTorch too."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # which NumPy does not know
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def text(shape: tuple[int | str, ...]) -> str:
    """Writes a shape, as ``[32, D]``."""
    return f"[{', '.join(map(str, shape))}]"


def _some(names: Mapping[str, Any]) -> str:
    if not names:
        return "none"
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
