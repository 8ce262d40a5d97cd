r"""A loop in C++ over steps whose rows do not depend on each other.

The step may be any JAX function that computes element by element, except for products
of rows with weights. It is traced once and becomes a program: vector instructions in
phases, with products between the phases. A thread runs all steps on its rows and waits
for no other thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.kernels import library
from jlstm.kernels.blocks import time_major
from jlstm.kernels.graph import (
    Graph,
    Link,
    Row,
    Sum,
    Unsuited,
    common_width,
    outer,
    read,
)
from jlstm.kernels.loops import Scan, Span, Steps
from jlstm.kernels.product import Product
from jlstm.types import Array, PyTree

# In the same order as in csrc/program.h.
OPERATIONS = (
    *("load", "splat", "store", "add", "sub", "mul", "div", "max", "min"),
    *("muladd", "mulsub", "submul"),  # a b + c, a b - c, c - a b
    *("neg", "abs", "sign", "sqrt", "exp", "tanh", "logistic"),
    *("log", "log1p", "expm1", "erf", "gt", "ge", "eq", "ne"),
    "where",  # a where c, else b
)
KINDS = ("input", "kept", "state", "rows", "same", "out", "written", "scratch")
REGISTERS, INSTRUCTIONS = 64, 1024


def bind(step: Callable, fixed: PyTree, steps: Steps) -> Program:
    """Makes the loop of a step; see :class:`jlstm.kernels.loops.Loop`.

    Args:
      step: a function ``(fixed, *steps) -> (state, sums, outs, written, stored)``.
      fixed: what is the same for all steps: params, and arrays ``[B, ...]``.
      steps: the arguments of one step; only their shapes and dtypes count.

    Raises:
      Unsuited: naming what the step does that a program cannot.
    """
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(fixed, *steps)
    given = [jax.tree.leaves(tree) for tree in steps]
    jaxpr = closed.jaxpr
    fixed_leaves = jax.tree.leaves(fixed)
    if not given[0] or not given[0][0].size:
        raise Unsuited("the step has no carry")
    moving = set(jaxpr.invars[len(fixed_leaves) :])
    graph = Graph(given[0][0].shape[0], common_width(jaxpr, moving) or 1)
    args: list[Any] = [*map(outer, fixed_leaves)]
    handed_on: list[int] = []
    kinds = ("state", "state", "input", "kept", "kept")
    for name, kind, leaves in zip(Steps._fields, kinds, given, strict=True):
        summed = name == "sums"
        lead = (graph.batch,) if summed else ()
        for leaf in leaves:
            place = graph.place(kind, lead + leaf.shape, leaf.dtype)
            row = graph.load(place)
            args.append(Sum(row, leaf.shape) if summed else row)
            if kind == "state":
                handed_on.append(place)
    results = read(graph, jaxpr, closed.consts, args)

    outs = jax.tree.leaves(shapes[2])
    targets = [graph.place("out", leaf.shape, leaf.dtype) for leaf in outs]
    for leaf in jax.tree.leaves(shapes[3:]):
        if leaf.dtype != np.float32:
            raise Unsuited("the step returns an array that is not float32")
        targets.append(graph.place("written", leaf.shape, leaf.dtype))
    stores = []
    for place, result in zip([*handed_on, *targets], results, strict=True):
        row = result.row if isinstance(result, Sum) else result
        stores.append((place, graph.row(row, graph.places[place].width)))
    return Program(step, fixed, shapes, _Code(graph, stores))


# From a graph to instructions.


class _Instruction(NamedTuple):
    operation: str
    result: int | None  # a node
    where: tuple[int, ...]  # a place and a column
    args: tuple[int, ...]  # nodes


class _Store(NamedTuple):
    place: int
    column: int
    node: int


class _Code:
    """The instructions in phases, and the products after each phase."""

    def __init__(self, graph: Graph, stores: list[tuple[int, Row]]):
        self.graph = graph
        self.links: list[tuple[int, int, Link]] = []  # phase, place of the rows
        # Nodes come after their arguments, and loads of a product after its rows.
        by_place = {link.place: link for link in graph.links}
        self._levels: list[int] = []  # the phase in which a node can be computed
        for op, *args in list(graph.nodes):
            level = 0
            if op in ("load", "splat", "whole") and args[0] in by_place:
                level = 1 + self._phase_of(by_place[args[0]].row)
            elif op not in ("load", "splat", "whole", "const"):
                level = max(self._levels[arg] for arg in args)
            self._levels.append(level)
        needed = {node for _, row in stores for node in row.columns}
        stores = list(stores)
        for node in reversed(range(len(self._levels))):
            op, *args = graph.nodes[node]
            if node not in needed:
                continue
            if op not in ("load", "splat", "whole", "const"):
                needed.update(args)
            elif op != "const" and (link := by_place.pop(args[0], None)):
                needed.update(link.row.columns)
                place = self._memory(link.row)
                if place is None:
                    shape = (graph.batch, link.row.width)
                    place = graph.place("scratch", shape, np.float32)
                    stores.append((place, link.row))
                self.links.append((self._phase_of(link.row), place, link))
        last = max((self._levels[node] for node in needed), default=0)
        phases: list[list[_Store]] = [[] for _ in range(last + 2)]
        for place, row in stores:
            self._place_stores(place, row, phases)
        self._order(phases if phases[-1] else phases[:-1])

    def _phase_of(self, row: Row) -> int:
        return max(self._levels[node] for node in row.columns)

    def _memory(self, row: Row) -> int | None:
        """Returns the place that holds a row as it is, or ``None``."""
        op, place, *_ = self.graph.nodes[row.columns[0]]
        moved = op in ("load", "splat", "whole")
        if not moved or self.graph.places[place].kind == "same":
            return None
        return place if self.graph.load(place) == row else None

    def _place_stores(self, place: int, row: Row, phases: list[list[_Store]]) -> None:
        nodes, kind = self.graph.nodes, self.graph.places[place].kind
        for i in range(self.graph.count(self.graph.places[place].width)):
            node = row.column(i)
            op, *args = nodes[node]
            if op in ("load", "splat") and args == [place, i]:
                continue  # a state that does not change
            # Other phases may still read a state. A copy can wait for the phase that
            # reads its source anyway.
            moved = op in ("load", "splat") and kind != "scratch"
            late = moved or kind == "state"
            number = len(phases) - 2 if late else self._levels[node]
            # All vectors of such a row read its single element, so no phase that uses
            # it may write it.
            if kind == "state" and self.graph.places[place].width < self.graph.unit:
                number = len(phases) - 1
            phases[number].append(_Store(place, i, node))

    def _order(self, phases: list[list[_Store]]) -> None:
        """Orders the instructions of each phase, and assigns registers to results."""
        self._spilled: dict[int, int] = {}  # nodes that later phases read, by place
        self._constants: dict[int, int] = {}  # their registers
        orders: list[list[_Instruction]] = [[] for _ in phases]
        for number in reversed(range(len(phases))):
            seen: set[int] = set()
            states: list[_Instruction] = []
            for place, column, node in phases[number]:
                self._visit(node, number, phases, orders[number], seen)
                store = _Instruction("store", None, (place, column), (node,))
                last = self.graph.places[place].kind == "state"
                (states if last else orders[number]).append(store)
            orders[number] += states  # after all reads of the old ones
        self.constants = [self.graph.nodes[node][1] for node in self._constants]
        self.registers = len(self.constants)
        self.instructions: list[tuple[int, ...]] = []
        self.ends: list[int] = []
        for order in orders:
            self._emit(_fuse(order))
            self.ends.append(len(self.instructions))
        if self.registers > REGISTERS:
            raise Unsuited(
                f"the step needs {self.registers} vectors at once, more than "
                f"{REGISTERS}"
            )
        if len(self.instructions) > INSTRUCTIONS:
            raise Unsuited(
                f"the step takes {len(self.instructions)} instructions, more than "
                f"{INSTRUCTIONS}"
            )

    def _visit(
        self,
        node: int,
        number: int,
        phases: list[list[_Store]],
        order: list[_Instruction],
        seen: set[int],
    ) -> None:
        """Adds the instructions for a node to a phase, arguments first."""
        stack = [(node, False)]
        while stack:
            node, ready = stack.pop()
            op, *args = self.graph.nodes[node]
            if ready:
                order.append(_Instruction(op, node, (), tuple(args)))
            if ready or node in seen:
                continue
            seen.add(node)
            if op == "const":
                self._constants.setdefault(node, len(self._constants))
            elif op in ("load", "splat"):
                order.append(_Instruction(op, node, tuple(args), ()))
            elif (level := self._levels[node]) < number:
                if node not in self._spilled:
                    shape = (self.graph.batch, self.graph.unit)
                    place = self.graph.place("scratch", shape, np.float32)
                    phases[level].append(_Store(place, 0, node))
                    self._spilled[node] = place
                where = (self._spilled[node], 0)
                order.append(_Instruction("load", node, where, ()))
            else:
                stack.append((node, True))
                stack += [(arg, False) for arg in reversed(args)]

    def _emit(self, order: list[_Instruction]) -> None:
        last = {arg: i for i, item in enumerate(order) for arg in item.args}
        registers, free = dict(self._constants), []
        count = len(self._constants)
        for i, (op, result, where, args) in enumerate(order):
            given = [registers[arg] for arg in args]
            for arg in dict.fromkeys(args):
                if last[arg] == i and arg not in self._constants:
                    free.append(registers[arg])
            if result is None:
                to, given = given[0], []
            else:
                if not free:
                    free, count = [count], count + 1
                to = registers[result] = free.pop()
            code = OPERATIONS.index(op)
            self.instructions.append((code, to, *[*where, *given, 0, 0, 0][:3]))
        self.registers = max(self.registers, count)


def _fuse(order: list[_Instruction]) -> list[_Instruction]:
    """Fuses a product that is read once with the sum or difference that reads it."""
    made = {item.result: item for item in order}
    uses: dict[int, int] = {}
    for item in order:
        for arg in item.args:
            uses[arg] = uses.get(arg, 0) + 1
    joined: set[int | None] = set()
    fused = []
    for item in order:
        names = {"add": ("muladd", "muladd"), "sub": ("mulsub", "submul")}
        for name, arg, other in zip(
            names.get(item.operation, ()), item.args, item.args[::-1], strict=False
        ):
            source = made.get(arg)
            if source and source.operation == "mul" and uses[arg] == 1:
                item = item._replace(operation=name, args=(*source.args, other))
                joined.add(arg)
                break
        fused.append(item)
    return [item for item in fused if item.result not in joined]


# The loop.


class Program:
    """The loop in C++; its weights are put in order when it is made."""

    axis = 1

    def __init__(self, step: Callable, fixed: PyTree, shapes: tuple, code: _Code):
        self.code, self.shapes, self.fixed = code, shapes, fixed
        # The values of places of the kinds rows and same, in order.
        places = code.graph.places
        same = [place.value for place in places if place.kind in ("rows", "same")]
        products = [
            Product(jax.lax.stop_gradient(link.weight), link.transposed)
            for _, _, link in code.links
        ]
        self.bound = (same, [(product.weight, product.packed) for product in products])

        @functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
        def run(
            time: int,
            reverse: bool,
            fixed: PyTree,
            bound: tuple,
            starts: Array,
            *rest: Any,
        ) -> tuple:
            del fixed
            return self._call(time, reverse, bound, starts, *rest)

        @run.defjvp
        def _(time: int, reverse: bool, primals: tuple, tangents: tuple) -> tuple:
            fixed, _, starts, *rest = primals
            again = functools.partial(_plain, step, Span(time, reverse, *starts))
            return jax.jvp(again, (fixed, *rest), (tangents[0], *tangents[3:]))

        self._run: Any = run

    def __call__(self, steps: Steps, to: tuple, span: Span) -> tuple:
        """Runs the steps; see :class:`jlstm.kernels.loops.Loop`."""
        starts = jnp.array([span.read, span.write], jnp.int32)
        time, reverse = span[:2]
        return self._run(time, reverse, self.fixed, self.bound, starts, steps, to)

    def _call(
        self,
        time: int,
        reverse: bool,
        bound: tuple,
        starts: Array,
        steps: Steps,
        to: tuple,
    ) -> tuple:
        same, weights = bound
        code, graph = self.code, self.code.graph
        given = {kind: list[Any]() for kind in KINDS}
        states, sums, given["input"] = map(jax.tree.leaves, steps[:3])
        zeros = [jnp.zeros((graph.batch, *leaf.shape), np.float32) for leaf in sums]
        given["state"], given["kept"] = [*states, *zeros], jax.tree.leaves(steps[3:])
        given["written"] = jax.tree.leaves(to)
        # In the order of places, where the kinds rows and same are mixed.
        taken = {kind: iter(leaves) for kind, leaves in given.items()}
        taken["rows"] = taken["same"] = iter(same)
        operands: list[Any] = [starts]
        results: list[jax.ShapeDtypeStruct] = []
        aliases: dict[int, int] = {}
        made_at = {kind: list[int]() for kind in KINDS}
        table: list[tuple[int, ...]] = []
        for place in graph.places:
            kind, buffer, length = place.kind, 0, time
            if kind not in ("out", "scratch"):
                operands.append(jnp.asarray(next(taken[kind]), np.float32))
                buffer = len(operands) - 1
            if kind in ("kept", "written"):
                length = operands[buffer].shape[1]
            if kind in ("state", "out", "written"):
                shape = (graph.batch, time, place.width)
                if kind != "out":
                    aliases[buffer] = len(results)
                    shape = operands[buffer].shape
                made_at[kind].append(len(results))
                results.append(jax.ShapeDtypeStruct(shape, np.float32))
                buffer = -len(results)
            table.append((KINDS.index(kind), place.width, buffer, length))
        links = []
        for (phase, left, link), pair in zip(code.links, weights, strict=True):
            links.append((phase, left, link.place, len(operands), link.transposed))
            operands += pair
        made = library.call(
            "jlstm_program",
            results,
            *operands,
            aliases=aliases,
            table=_integers(table),
            links=_integers(links),
            code=_integers(code.instructions),
            ends=_integers(code.ends),
            constants=np.array(code.constants, np.float32),
            sizes=_integers([time, graph.batch, graph.unit, code.registers]),
            reverse=reverse,
        )
        ends = [made[i] for i in made_at["state"]]
        for i, state in enumerate(states):
            ends[i] = ends[i].astype(state.dtype)
        added = [
            a + wide.sum(0) for a, wide in zip(sums, ends[len(states) :], strict=True)
        ]
        pairs = zip(made_at["out"], jax.tree.leaves(self.shapes[2]), strict=True)
        lead = (graph.batch, time)
        outs = [
            made[i].reshape(*lead, *like.shape[1:]).astype(like.dtype)
            for i, like in pairs
        ]
        written = [made[i] for i in made_at["written"]]
        parts = ends[: len(states)], added, outs, written
        trees = map(jax.tree.structure, (steps.state, steps.sums, self.shapes[2], to))
        state, sums, outs, written = (
            tree.unflatten(part) for tree, part in zip(trees, parts, strict=True)
        )
        return state, sums, outs, *written


def _plain(step: Callable, span: Span, fixed: PyTree, steps: Steps, to: tuple) -> tuple:
    """Runs the same loop by XLA, for its derivatives."""
    loop = Scan(functools.partial(step, fixed))
    inputs, stored = time_major((steps.inputs, steps.stored))
    steps = steps._replace(inputs=inputs, stored=stored)
    *ends, outs, written, stored = loop(steps, (to[0], time_major(to[1])), span)
    return *ends, time_major(outs), written, time_major(stored)


def _integers(values: Any) -> np.ndarray:
    return np.array(values, np.int64).reshape(-1)
