"""A layer as the cells in it, in the order in which libraries store them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jlstm.convert.cells import KINDS, Weights, emits, inner, make_params, take_weights
from jlstm.convert.tensors import Leaves, Tensors
from jlstm.layers import (
    RNN,
    Bidirectional,
    BidirectionalParams,
    Dropout,
    Stack,
    bidirectional,
    stack,
)
from jlstm.types import PyTree


class Place(NamedTuple):
    """Where a cell stands in a layer.

    Attributes:
      level: among the recurrent layers of a stack.
      number: among all layers of the stack.
      direction: 1 is backward.
      directions: how many the recurrent layer has.
      stacked: whether there is a stack.
      bare: whether there is a cell alone, without a layer.
    """

    level: int = 0
    number: int = 0
    direction: int = 0
    directions: int = 1
    stacked: bool = False
    bare: bool = False


class Part(NamedTuple):
    """A cell of a layer, with its params."""

    place: Place
    path: str  # after "layer" and "params", as [0].forward
    cell: Any
    params: Any
    layer: Any  # the RNN or Bidirectional that it is in, or the cell itself


Name = Callable[[Place, str], str]


@dataclasses.dataclass(frozen=True)
class Peer:
    """What one library has, and how its cells are read and written.

    Attributes:
      name: of the library.
      cells: says why the library has no place for a cell, or ``None``.
      read: takes ``(leaves, cell)`` to the cell, told by its weights where it is
        ``None``, and its weights.
      write: takes ``(part, weights)`` to arrays by leaf; raises what is lossy.
      merges: of two directions; none if it has no bidirectional layer.
      reverse: whether it has a layer that runs backward alone.
    """

    name: str
    cells: Callable[[Any], str | None]
    read: Callable[[Leaves, Any], tuple[Any, Weights]]
    write: Callable[[Part, Weights], dict[str, np.ndarray]]
    merges: tuple[str, ...] = ("concat", "sum", "mean", "product", "none")
    reverse: bool = True

    def check(self, where: str, part: Part) -> None:
        """Refuses what the library does not have.

        Raises:
          ValueError: naming it.
        """
        if not self.merges and isinstance(part.layer, Bidirectional):
            why = "it has no bidirectional layer; convert each direction as an RNN"
        elif isinstance(part.layer, Bidirectional) and (
            part.layer.merge not in self.merges
        ):
            why = f"it merges two directions only by {' or '.join(self.merges)}"
        elif isinstance(part.layer, RNN) and part.layer.reverse and not self.reverse:
            why = "it has no layer that runs only backward; convert RNN(cell)"
        elif type(part.cell) not in KINDS:
            why = "it has no such cell"
        else:
            why = self.cells(part.cell)
        if why is not None:
            raise ValueError(
                f"{where}: {self.name} has no place for {part.layer!r}: {why}"
            )


def parts_of(where: str, layer: Any, params: PyTree = None) -> list[Part]:
    """Lists the cells of a layer: by depth, forward first.

    Raises:
      ValueError: the layer has other parts than recurrent ones and dropout, or params
        of another structure.
    """
    parts, level = [], 0
    stacked = isinstance(layer, Stack)
    for number, (path, part, own) in enumerate(_flat(where, layer, params, "")):
        if isinstance(part, Bidirectional):
            pairs = [(part.forward, ".forward"), (part.backward, ".backward")]
        else:
            pairs = [(part, "")] if not isinstance(part, Dropout) else []
        for direction, (run, name) in enumerate(pairs):
            place = Place(
                level, number, direction, len(pairs), stacked, not isinstance(run, RNN)
            )
            cell = inner(run.cell if isinstance(run, RNN) else run)
            mine = getattr(own, name[1:]) if name and own is not None else own
            parts.append(Part(place, path + name, cell, mine, part))
        level += bool(pairs)
    if not parts:
        raise ValueError(f"{where}: {layer!r} has no recurrent layer")
    return parts


def _flat(where: str, layer: Any, params: Any, path: str) -> Iterator[tuple]:
    """Yields the layers of nested stacks, each with its params."""
    if isinstance(layer, Stack):
        number = len(layer.layers)
        if params is None:
            params = (None,) * number
        if not isinstance(params, tuple) or len(params) != number:
            raise ValueError(
                f"{where}: params{path} must be a tuple of {number}, got "
                f"{_kind(params)}"
            )
        for i, (part, own) in enumerate(zip(layer.layers, params, strict=True)):
            yield from _flat(where, part, own, f"{path}[{i}]")
        return
    recurrent = isinstance(layer, RNN | Bidirectional | Dropout)
    if not recurrent and type(inner(layer)) not in KINDS:
        raise ValueError(
            f"{where}: layer{path} must be an RNN, bidirectional, a stack of them, or "
            f"a cell that is known here, got {layer!r}; convert only the recurrent "
            "layers"
        )
    if isinstance(layer, Bidirectional) and not isinstance(
        params, BidirectionalParams | None
    ):
        raise ValueError(
            f"{where}: params{path} must be BidirectionalParams, got {_kind(params)}"
        )
    yield path, layer, params


def _kind(params: Any) -> str:
    name = type(params).__name__
    return f"a tuple of {len(params)}" if isinstance(params, tuple) else f"a {name}"


def read_layer(
    peer: Peer, tensors: Tensors, layer: Any, found: Sequence[Place], name: Name
) -> tuple[Any, PyTree]:
    """Reads all cells of a layer.

    Args:
      peer: whose tensors they are.
      tensors: what there is.
      layer: which the tensors must fit; or ``None``, and it is made from them.
      found: the places of cells that the names of tensors tell.
      name: makes the name of a tensor.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or the peer has no
        such layer.
    """
    if layer is None:
        parts = [Part(place, "", None, None, None) for place in found]
    else:
        parts = _named_as(found, parts_of(tensors.where, layer))
        for part in parts:
            peer.check(tensors.where, part)
    cells, params = [], []
    inputs, out = None, 0
    for place, _, cell, _, run in parts:
        if place.direction == 0:
            inputs, out = (out if place.level else None), 0
        leaves = Leaves(tensors, partial(name, place), inputs, cell)
        cell, weights = peer.read(leaves, cell)
        cells.append(cell)
        params.append(make_params(cell, weights))
        joined = getattr(run, "merge", "concat") == "concat"
        out = out + emits(cell) if joined else emits(cell)
    if layer is None:
        layer = _build([part.place for part in parts], cells)
    tensors.finish(layer)
    return layer, _fill(layer, iter(params))


def _named_as(found: Sequence[Place], parts: list[Part]) -> list[Part]:
    """Gives the cells of a layer the names that were found.

    A cell by itself, or one layer of a stack, has other names than a layer, and the
    same weights; dropout may be counted among the layers of a stack or not.
    """
    numbers = list(dict.fromkeys(place.number for place in found))
    stacked = found[0].stacked or parts[-1].place.level > 0
    named = []
    for part in parts:
        level, number = part.place.level, part.place.number
        number = numbers[level] if level < len(numbers) else number
        bare = found[0].bare and not stacked and part.place.directions == 1
        place = part.place._replace(number=number, stacked=stacked, bare=bare)
        named.append(part._replace(place=place))
    return named


def in_order(
    where: str, layer: Any, begins: Sequence[str], places: Sequence[Place] | None = None
) -> tuple[Sequence[Place], Name]:
    """Matches cells that were stored one after another to those of a layer.

    Args:
      where: the function that a user called.
      layer: the layer to fill, or ``None``.
      begins: of the names of each cell's tensors.
      places: of the cells, if they are known without a layer.

    Returns:
      Their places, and what makes their names.

    Raises:
      ValueError: the layer has not so many cells, or there is none and it is needed.
    """
    if layer is not None:
        places = [part.place for part in parts_of(where, layer)]
        if len(places) != len(begins):
            cells = f"{len(places)} cell{'s' if len(places) > 1 else ''}"
            names = ", ".join(begins[:4])
            raise ValueError(
                f"{where}: expected {cells} for {layer!r}, got {len(begins)}: {names}"
            )
    elif places is None:
        places = [Place()]
        if len(begins) != 1:
            raise ValueError(
                f"{where}: the weights do not tell how {len(begins)} cells "
                f"({', '.join(begins[:4])}) are put together; give layer=, such as a "
                "stack, or prefix= of one of them"
            )
    table = {
        (place.level, place.direction): begin
        for place, begin in zip(places, begins, strict=True)
    }

    def name(place: Place, leaf: str) -> str:
        return table[place.level, place.direction] + leaf

    return places, name


def _build(places: Sequence[Place], cells: Sequence[Any]) -> Any:
    levels: list[list[Any]] = []
    for place, cell in zip(places, cells, strict=True):
        if place.direction == 0:
            levels.append([])
        levels[-1].append(cell)
    layers = [RNN(*row) if len(row) == 1 else _both(*row) for row in levels]
    return stack(*layers) if places[0].stacked else layers[0]


def _both(forward: Any, backward: Any) -> Bidirectional:
    return bidirectional(forward, None if backward == forward else backward)


def _fill(layer: Any, params: Iterator[PyTree]) -> PyTree:
    """Lays the params of cells out as a layer has them."""
    if isinstance(layer, Stack):
        return tuple(_fill(part, params) for part in layer.layers)
    if isinstance(layer, Dropout):
        return ()
    if isinstance(layer, Bidirectional):
        return BidirectionalParams(next(params), next(params))
    return next(params)


def write_layer(
    peer: Peer, where: str, layer: Any, params: PyTree, name: Name
) -> dict[str, np.ndarray]:
    """Writes all cells of a layer, as arrays by name.

    Raises:
      ValueError: the peer has no place for something.
    """
    arrays: dict[str, np.ndarray] = {}
    for part in parts_of(where, layer, params):
        peer.check(where, part)
        path = f"params{part.path}"
        weights = take_weights(where, path, part.cell, part.params)
        for leaf, array in peer.write(part, weights).items():
            arrays[name(part.place, leaf)] = np.array(array, order="C")
    return arrays


def drop_bias(where: str, part: Part, weights: Weights) -> None:
    """Refuses to leave biases out that are not zero.

    Raises:
      ValueError: naming the cell.
    """
    for name, array in (("b", weights.b), ("b_hh", weights.b_hh)):
        if array is not None and array.any():
            raise ValueError(
                f"{where}: bias=False would lose params{part.path}.{name}, which is "
                "not zero"
            )
