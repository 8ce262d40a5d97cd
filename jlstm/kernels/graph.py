r"""The computation of a step, as a graph of operations on columns.

A value ``[B, N]`` that differs by row consists of ``N / unit`` columns, and each column
is a node of the graph. Cutting and joining columns therefore costs nothing. A value
that is the same in all steps is computed by XLA before the loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jlstm.kernels.product import CONTRACTIONS
from jlstm.types import Array


class Unsuited(Exception):
    """Raised for a step that cannot be such a graph; the message says why."""


class Row(NamedTuple):
    """A value that differs by row: ``[B, width]``; or ``[B]`` or ``[B, 1]``."""

    columns: tuple[int, ...]
    width: int

    def column(self, i: int) -> int:
        """Returns the node of a column; a single column stands for all."""
        return self.columns[i if len(self.columns) > 1 else 0]


class Sum(NamedTuple):
    """A sum over the rows."""

    row: Row
    shape: tuple[int, ...]


class Outer(NamedTuple):
    """A value that is the same in all steps.

    ``value`` may lack the axes that a broadcast to ``shape`` adds: rows, or all.
    """

    value: Any
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Memory of ``width`` floats for each row.

    Its kind is one of these: ``input`` and ``out`` have the steps of the block,
    ``kept`` and ``written`` those of the sequence. ``state`` is handed from step to
    step. ``rows`` is the same in all steps, ``same`` in all rows too. ``scratch``
    belongs to a thread.
    """

    kind: str
    width: int
    value: Any = None  # for the kinds rows and same


class Link(NamedTuple):
    """A product of rows with a weight, which is written to a place."""

    row: Row
    place: int
    weight: Array
    transposed: bool


class Graph:
    """A graph of nodes: operations, and the indices of the nodes they apply to.

    The arguments of ``load``, and of ``splat`` (which copies one element to a whole
    column), are a place and a column; the argument of ``const`` is a number. ``whole``
    stands for all of a place that cannot be divided into columns, and is only
    multiplied by weights.
    """

    def __init__(self, batch: int, unit: int):
        self.batch, self.unit = batch, unit
        self.nodes: list[tuple] = []
        self.places: list[Place] = []
        self.links: list[Link] = []
        self._numbers: dict[tuple, int] = {}
        self._outer: dict[int, int] = {}  # places of values that are the same

    def count(self, width: int) -> int:
        """Returns the number of columns of a width."""
        return max(1, width // self.unit)

    def place(
        self, kind: str, shape: Sequence[int], dtype: Any, value: Any = None
    ) -> int:
        """Adds memory for ``[B, ...]``, or ``[...]`` if it is the same in all rows."""
        if dtype not in (np.float32, np.bool_):
            raise Unsuited(
                f"the step computes in {np.dtype(dtype).name}, and C++ only in float32"
            )
        if kind != "same" and (not shape or shape[0] != self.batch):
            raise Unsuited(
                f"the step has an array {list(shape)}, which does not begin with B"
            )
        if len(shape) > 2:
            raise Unsuited(
                f"the step has an array {list(shape)}, with more than two axes"
            )
        width = math.prod(shape if kind == "same" else shape[1:])
        self.places.append(Place(kind, width, value))
        return len(self.places) - 1

    def load(self, place: int) -> Row:
        """Reads all of a place."""
        width = self.places[place].width
        if width == 1:
            return Row((self.node("splat", place, 0),), 1)
        if width % self.unit:
            return Row((self.node("whole", place, 0),), width)
        columns = (self.node("load", place, i) for i in range(self.count(width)))
        return Row(tuple(columns), width)

    def check_columns(self, row: Row) -> None:
        """Refuses a row that is not divided into columns."""
        if self.nodes[row.columns[0]][0] == "whole":
            raise Unsuited(
                f"the step has an array of width {row.width}, which is not a multiple "
                f"of {self.unit}"
            )

    def constant(self, value: Any) -> int:
        """Adds a number as a node, or finds the node that it is already."""
        value = float(np.float32(value))
        # By its bytes, so that zeros of both signs differ and NaN equals itself.
        return self._number(("const", value), ("const", np.float32(value).tobytes()))

    def _number(self, node: tuple, key: tuple) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[key]

    def value(self, node: int) -> float | None:
        """Returns the number that a node is, or ``None``."""
        return self.nodes[node][1] if self.nodes[node][0] == "const" else None

    def node(self, op: str, *args: int) -> int:
        """Adds a node, or finds an equal one or a simpler one of equal value."""
        if op in _FOLDED:
            known = [self.value(arg) for arg in args]
            if None not in known:
                with np.errstate(all="ignore"):
                    return self.constant(_FOLDED[op](*map(np.float32, known)))
        pairs = (args, args[::-1]) if len(args) == 2 else ()
        for a, b in pairs if op == "add" else ():
            if self.value(a) == 0:
                return b
            if self.nodes[a][0] == "neg":
                return self.node("sub", b, self.nodes[a][1])
        for a, b in pairs if op == "mul" else ():
            if self.value(a) == 1:
                return b
            if self.value(a) == -1:
                return self.node("neg", b)
        if op == "sub" and self.nodes[args[1]][0] == "neg":
            return self.node("add", args[0], self.nodes[args[1]][1])
        if op == "neg" and self.nodes[args[0]][0] == "neg":
            return self.nodes[args[0]][1]
        if op == "where" and args[0] == args[1]:
            return args[0]
        key = (op, *(sorted(args) if op in ("add", "mul") else args))
        return self._number(key, key)

    def row(self, value: Any, width: int) -> Row:
        """Turns any value into a row of some width."""
        if isinstance(value, Sum):
            raise Unsuited("the step uses a sum over the rows of the batch")
        if isinstance(value, Row):
            self.check_columns(value)
            return value
        if width > 1 and width % self.unit:
            raise Unsuited(
                f"the step has an array of width {width}, which is not a multiple "
                f"of {self.unit}"
            )
        shape = jnp.shape(value.value)
        rows = shape == value.shape and shape[:1] == (self.batch,) and self.batch > 1
        flat = shape if len(shape) < 2 or rows else shape[1:]
        if not rows and len(shape) > 1 and shape[0] != 1:
            raise Unsuited(
                f"the step has an array {list(shape)}, which does not begin with B"
            )
        numbers = None
        if not isinstance(value.value, Tracer):
            numbers = np.asarray(value.value).reshape(-1)
        if numbers is not None and not rows:
            parts = numbers[:, None] if width == 1 or numbers.size == 1 else None
            parts = numbers.reshape(-1, self.unit) if parts is None else parts
            if (parts == parts[:, :1]).all():
                columns = [self.constant(part[0]) for part in parts]
                return Row(tuple(columns), width)
        key = id(value.value)
        if key not in self._outer:
            kind = "rows" if rows else "same"
            shape = shape if rows else flat or (1,)
            self._outer[key] = self.place(kind, shape, value.dtype, value.value)
        return self.load(self._outer[key])


def read(graph: Graph, jaxpr: Any, consts: list, args: list) -> list:
    """Evaluates a jaxpr on values of the graph.

    Raises:
      Unsuited: naming what cannot be an operation on columns.
    """
    names = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(names, [*map(outer, consts), *args], strict=True))

    def find(atom: Any) -> Any:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return Outer(atom.val, aval.shape, aval.dtype)
        return values[atom]

    for eqn in live(jaxpr):
        given = [find(atom) for atom in eqn.invars]
        name, inner = eqn.primitive.name, called(eqn)
        if all(isinstance(value, Outer) for value in given):
            made = _same(jaxpr, eqn, given)
        elif inner is not None:
            made = read(graph, *inner, given)
        elif name == "dot_general":
            made = [_product(graph, eqn, *given)]
        elif any(isinstance(value, Sum) for value in given):
            made = [_linear(graph, eqn, given)]
        elif name in _COLUMNS:
            for value in given:
                if isinstance(value, Row):
                    graph.check_columns(value)
            made = _COLUMNS[name](graph, eqn, given)
        else:
            made = [_elements(graph, eqn, given)]
        values.update(zip(eqn.outvars, made, strict=True))
    return [find(atom) for atom in jaxpr.outvars]


def outer(value: Any) -> Outer:
    """Wraps a value that is the same in all steps."""
    return Outer(value, jnp.shape(value), jnp.result_type(value))


def common_width(jaxpr: Any, moving: set) -> int:
    """Finds the greatest width that divides those of all values that differ by row."""
    found = 0

    def meet(atoms: Sequence[Any], least: int = 2) -> None:
        nonlocal found
        for atom in atoms:
            if len(atom.aval.shape) == 2 and atom.aval.shape[1] >= least:
                found = math.gcd(found, atom.aval.shape[1])

    # A value that is only multiplied by weights needs no columns.
    read = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for eqn in live(jaxpr):
        if eqn.primitive.name != "dot_general" and called(eqn) is None:
            read.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    meet([atom for atom in jaxpr.invars if atom in moving and atom in read])
    for eqn in live(jaxpr):
        flags = [not isinstance(a, Literal) and a in moving for a in eqn.invars]
        if not any(flags):
            continue
        moving.update(eqn.outvars)
        name, inner = eqn.primitive.name, called(eqn)
        # The parts of a cut or a join may have a width of one.
        meet(eqn.outvars, 1 if name in ("slice", "split") else 2)
        if name in ("concatenate", "pad"):
            meet(eqn.invars, 1)
        if name == "slice":
            found = math.gcd(found, *eqn.params["start_indices"][1:])
        if name == "pad":
            config = eqn.params["padding_config"][1:]
            found = math.gcd(found, *(abs(n) for axis in config for n in axis[:2]))
        if inner is not None:
            pairs = zip(inner[0].invars, flags, strict=True)
            part = common_width(inner[0], {atom for atom, flag in pairs if flag})
            found = math.gcd(found, part)
    return int(found)


def live(jaxpr: Any) -> list:
    """Lists the equations on which the results depend."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
            kept.append(eqn)
    return kept[::-1]


def called(eqn: Any) -> tuple[Any, list] | None:
    """Returns the function that an equation calls, as ``(jaxpr, consts)``."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := eqn.params.get(name)) is not None:
            closed = isinstance(inner, ClosedJaxpr)
            return (inner.jaxpr, inner.consts) if closed else (inner, [])
    return None


def _same(jaxpr: Any, eqn: Any, given: list[Outer]) -> list[Outer]:
    """Computes what is the same in all steps; leaves broadcasts for later."""
    aval = eqn.outvars[0].aval
    if eqn.primitive.name == "broadcast_in_dim":
        shape, axes = jnp.shape(given[0].value), eqn.params["broadcast_dimensions"]
        size = math.prod(shape)
        as_last = axes[-1:] == (len(aval.shape) - 1,) and shape[-1] == aval.shape[-1]
        if size == 1 or (as_last and size == shape[-1]):
            return [Outer(given[0].value, aval.shape, aval.dtype)]
    names, arrays = [], []
    for atom, (value, shape, _) in zip(eqn.invars, given, strict=True):
        if not isinstance(atom, Literal) and atom not in names:
            names.append(atom)
            arrays.append(_broadcast(value, shape))
    alone = jaxpr.replace(constvars=[], invars=names, outvars=eqn.outvars, eqns=[eqn])
    return [*map(outer, jaxpr_as_fun(ClosedJaxpr(alone, []))(*arrays))]


def _broadcast(value: Any, shape: tuple[int, ...]) -> Any:
    return value if jnp.shape(value) == shape else jnp.broadcast_to(value, shape)


def _product(graph: Graph, eqn: Any, left: Any, right: Any) -> Row:
    transposed = CONTRACTIONS.get(eqn.params["dimension_numbers"])
    avals = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    if not isinstance(left, Row) or not isinstance(right, Outer):
        raise Unsuited("the step multiplies by a matrix that differs between rows")
    if transposed is None or any(aval.ndim != 2 for aval in avals):
        raise Unsuited("the step has a product other than of rows [B, N] with a matrix")
    if any(aval.dtype != np.float32 for aval in avals):
        raise Unsuited(
            f"the step has a product in {avals[2].dtype}, and C++ only in float32"
        )
    place = graph.place("scratch", avals[2].shape, avals[2].dtype)
    weight = _broadcast(right.value, right.shape)
    graph.links.append(Link(left, place, weight, transposed))
    return graph.load(place)


def _linear(graph: Graph, eqn: Any, given: list) -> Sum:
    """An operation that is linear in its sums, on each of their rows."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    width, sums = math.prod(out.shape), [isinstance(value, Sum) for value in given]
    moved = math.prod(eqn.invars[0].aval.shape) == width
    if name in (*_MOVES, "reduce_sum") and moved:
        return Sum(given[0].row, out.shape)
    scales = (name == "mul" and sum(sums) == 1) or (name == "div" and not sums[1])
    if scales or (name in ("add", "add_any", "sub", "neg") and all(sums)):
        # An array of the same shape as the sum is the same in all rows.
        rows = [
            value.row
            if isinstance(value, Sum)
            else graph.row(
                Outer(
                    jnp.reshape(value.value, (1, -1)),
                    (graph.batch, width),
                    value.dtype,
                ),
                width,
            )
            for value in given
        ]
        return Sum(_each(graph, _operation(graph, eqn), rows, width), out.shape)
    raise Unsuited(
        f"the step or its gradient applies {name} to a sum over the rows of the "
        "batch; compute in prepare what depends only on the params"
    )


def _each(graph: Graph, op: Callable, rows: list[Row], width: int) -> Row:
    """Applies an operation to each column."""
    single = all(len(row.columns) == 1 for row in rows)
    count = 1 if single else graph.count(width)
    return Row(tuple(op(*(row.column(i) for row in rows)) for i in range(count)), width)


def _elements(graph: Graph, eqn: Any, given: list) -> Row:
    width, dtype = _width(graph, eqn), eqn.outvars[0].aval.dtype
    if dtype not in (np.float32, np.bool_):
        raise Unsuited(f"the step computes in {dtype}, and C++ only in float32")
    op = _operation(graph, eqn)
    return _each(graph, op, [graph.row(value, width) for value in given], width)


def _width(graph: Graph, eqn: Any) -> int:
    """Returns the width of a result that differs by row."""
    shape = eqn.outvars[0].aval.shape
    if shape[:1] != (graph.batch,) or len(shape) > 2:
        raise Unsuited(
            f"the step makes an array {list(shape)} by {eqn.primitive.name}; C++ "
            "needs [B] or [B, N]"
        )
    return math.prod(shape[1:])


def _operation(graph: Graph, eqn: Any) -> Callable:
    name, node, one = eqn.primitive.name, graph.node, graph.constant(1)
    if name in _OPERATIONS:
        return partial(node, _OPERATIONS[name])
    if name in ("lt", "le"):
        return lambda a, b: node({"lt": "gt", "le": "ge"}[name], b, a)
    if name == "not":
        return lambda a: node("sub", one, a)
    if name == "one_minus_square":  # in the derivative of tanh, since JAX 0.12
        return lambda a: node("sub", one, node("mul", a, a))
    if name == "square":
        return lambda a: node("mul", a, a)
    if name == "rsqrt":
        return lambda a: node("div", one, node("sqrt", a))
    if name == "clamp":
        return lambda low, x, high: node("min", node("max", x, low), high)
    if name == "select_n" and len(eqn.invars) == 3:
        return lambda flag, no, yes: node("where", yes, no, flag)
    if name == "convert_element_type" and eqn.params["new_dtype"] == np.bool_:
        return lambda a: node("ne", a, graph.constant(0))
    if name == "integer_pow" and 0 < abs(exponent := eqn.params["y"]) <= 16:

        def power(a: int) -> int:
            made = a
            for _ in range(abs(exponent) - 1):
                made = node("mul", made, a)
            return made if exponent > 0 else node("div", one, made)

        return power
    raise Unsuited(f"the step uses the operation {name}, which C++ does not have")


# Equations that only move columns.


def _move(graph: Graph, eqn: Any, given: list) -> list[Row]:
    width, row = _width(graph, eqn), given[0]
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    if name == "convert_element_type" and dtype == np.bool_:
        return [_elements(graph, eqn, given)]
    if dtype not in (np.float32, np.bool_):
        raise Unsuited(f"the step computes in {dtype}, and C++ only in float32")
    axes = eqn.params.get("broadcast_dimensions", (0,))
    spread = name == "broadcast_in_dim" and row.width == 1
    if axes[:1] != (0,) or not (spread or row.width == width):
        raise Unsuited(f"the step turns rows into columns by {name}")
    return [Row(row.columns, width)]


def _split(graph: Graph, eqn: Any, given: list) -> list[Row]:
    ends = [0, *np.cumsum(eqn.params["sizes"])]
    if eqn.params["axis"] != 1:
        raise Unsuited("the step splits the batch")
    return [_cut(graph, given[0], *ends[i : i + 2]) for i in range(len(ends) - 1)]


def _slice(graph: Graph, eqn: Any, given: list) -> list[Row]:
    params = eqn.params
    start, end = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,)
    if len(start) != 2 or (start[0], end[0]) != (0, graph.batch) or max(strides) > 1:
        raise Unsuited("the step slices the batch, or columns with strides")
    return [_cut(graph, given[0], start[1], end[1])]


def _cut(graph: Graph, row: Row, start: int, end: int) -> Row:
    columns = row.columns
    if len(columns) > 1:
        columns = columns[start // graph.unit : end // graph.unit]
    return Row(columns, int(end - start))


def _concatenate(graph: Graph, eqn: Any, given: list) -> list[Row]:
    if eqn.params["dimension"] != 1:
        raise Unsuited("the step concatenates along the batch")
    sizes = [atom.aval.shape[1] for atom in eqn.invars]
    return [_join(graph, _width(graph, eqn), list(zip(sizes, given, strict=True)))]


def _pad(graph: Graph, eqn: Any, given: list) -> list[Row]:
    rows, columns = (*eqn.params["padding_config"], (0, 0, 1))[:2]
    if tuple(rows) != (0, 0, 0) or min(columns) < 0 or columns[2]:
        raise Unsuited("the step pads the batch, or between columns")
    padding = graph.row(given[1], 1).columns
    size = eqn.invars[0].aval.shape[1]
    inner = _join(graph, size, [(size, given[0])])
    before, after = (padding * (n // graph.unit) for n in columns[:2])
    return [Row((*before, *inner.columns, *after), _width(graph, eqn))]


def _join(graph: Graph, width: int, parts: Sequence[tuple[int, Any]]) -> Row:
    columns: list[int] = []
    for size, value in parts:
        row = graph.row(value, size)
        columns += [row.column(i) for i in range(graph.count(size))]
    return Row(tuple(columns), width)


def _reduce_sum(graph: Graph, eqn: Any, given: list) -> list[Row | Sum]:
    axes, out, row = eqn.params["axes"], eqn.outvars[0].aval, given[0]
    if 1 in axes:  # as a product with ones
        width = eqn.invars[0].aval.shape[1]
        place = graph.place("scratch", (graph.batch, 1), out.dtype)
        ones = jnp.ones((width, 1), np.float32)
        graph.links.append(
            Link(_join(graph, width, [(width, row)]), place, ones, False)
        )
        row = graph.load(place)
    return [Sum(row, out.shape) if 0 in axes else row]


_MOVES = ("reshape", "squeeze", "copy", "copy_p", "convert_element_type")
_MOVES += ("stop_gradient",)
_COLUMNS: dict[str, Callable] = {
    **dict.fromkeys((*_MOVES, "broadcast_in_dim"), _move),
    "split": _split,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "reduce_sum": _reduce_sum,
}
_NAMED = (
    *("neg", "abs", "sign", "sqrt", "exp", "tanh", "logistic"),
    *("log", "log1p", "expm1", "erf", "gt", "ge", "eq", "ne"),
    *("add", "sub", "mul", "div", "max", "min"),
)
_OPERATIONS = {**{name: name for name in _NAMED}, "add_any": "add"}
_OPERATIONS |= {"and": "mul", "or": "max"}  # of booleans, which are 0 and 1
_FOLDED: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
}
