"""The laws that a cell or a layer is checked against, in their order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jlstm.door import able, inputs_of, unroll
from jlstm.kernels import Request
from jlstm.layers.compose import is_causal, stack
from jlstm.testing import laws, mistakes
from jlstm.types import Array, Cell, Layer, PyTree, gated


def check_cell(
    cell: Cell,
    x: PyTree = None,
    *,
    params: PyTree = None,
    implementations: tuple[str, ...] | None = None,
    take_rows: Callable[[PyTree, Array], PyTree] | None = None,
    smooth: bool = True,
) -> None:
    """Checks a cell against the laws.

    They are: the gated form equals the step; unrolling equals a Python loop; padding is
    inert, garbage and NaN alike, in values and gradients; a row of length 0 returns its
    incoming carry; chunks equal the whole; reverse equals flipping; rows are
    independent; resets equal separate sequences, in both directions, with a learned
    fresh carry; ``vmap`` equals a loop; ``jit`` equals eager, and equal configs share
    one trace; gradients, and gradients of gradients, equal finite differences;
    implementations agree.

    Args:
      cell: the cell.
      x: an example of its input at one step, ``[3, ...]``; floats are replaced by
        random ones, integers are kept. ``None`` means floats ``[3, 5]``.
      params: the params to check with, in float64. ``None`` means those of ``init``,
        moved a little so that nothing is zero.
      implementations: the names of those to check; ``None`` means all that can run the
        cell.
      take_rows: a function ``(params, rows) -> params`` that picks rows, for a cell
        some of whose params have a leaf for each row, such as an encoder's memory.
      smooth: false leaves out finite differences, for a cell with kinks, such as a
        relu.

    Raises:
      AssertionError: a law is broken; the message names it.
      TypeError: it is not a cell, or its gated form is defined in part.
      ValueError: there is a plain mistake, such as a carry of a fixed batch size, or a
        cell that is not finite at ``x = 0``.

    Example:
      >>> jlstm.testing.check_cell(jlstm.Elman(2), implementations=("scan",))
    """
    mistakes.check_is_cell(cell)
    gated(cell)  # refuses a half-defined form
    with jax.enable_x64(True):
        case = laws.cell_case(cell, x, params)
        request = Request(dtypes=frozenset({"float64"}), inputs=inputs_of(case.xs))
        rows_in_params = take_rows is not None
        mistakes.check_cell_results(cell, case, rows_in_params=rows_in_params)
        laws.check_config(cell)
        laws.check_parts(cell, case)
        if implementations is None:
            implementations = tuple(able(cell, request))

        def counted(traces: laws.Traces) -> Any:
            return laws.CountedCell(laws.copy_of(cell), traces)

        fresh = laws.fresh_carry(cell, case.params)
        results = []
        for name in implementations:
            run = laws.Runner(partial(unroll, cell, implementation=name), name)
            results.append(run(case, mask=laws.holes()))
            laws.check_python_loop(cell, case, run)
            laws.check_padding(cell, case, run)
            laws.check_padding(cell, case, run, reverse=True)
            laws.check_chunks(cell, case, run)
            laws.check_reverse(cell, case, run)
            laws.check_rows(cell, case, run, take_rows)
            laws.check_resets(cell, case, run)
            laws.check_resets(cell, case, run, reverse=True)
            laws.check_vmap(cell, case, run)
            # A loop for one class of cells does not recognise it inside a CountedCell.
            if name in able(counted(laws.Traces()), request):
                laws.check_traces(
                    cell,
                    counted,
                    lambda each, name=name: partial(unroll, each, implementation=name),
                    (case.params, case.xs),
                    run(case.but(carry=fresh))["ys"],
                )
            if smooth:
                laws.check_derivatives(cell, case, run)
        with laws.law("implementations agree", cell):
            for result in results[1:]:
                laws.assert_close(result, results[0])


def check_layer(
    layer: Layer,
    xs: PyTree = None,
    *,
    params: PyTree = None,
    causal: bool | None = None,
    resets: bool = True,
    smooth: bool = True,
) -> None:
    """Checks a layer against the laws.

    They are: padding is inert, garbage and NaN alike, in values and gradients; a row of
    length 0 returns its incoming carry; lengths equal the mask that they stand for;
    rows are independent; resets equal separate sequences; chunks equal the whole, if
    the layer is causal, and do not, if it is not; ``vmap`` equals a loop; ``jit``
    equals eager; gradients, and gradients of gradients, equal finite differences;
    ``retime`` tells which outputs are valid.

    Args:
      layer: the layer.
      xs: an example of its input, ``[3, 6, ...]``; floats are replaced by random ones,
        integers are kept. ``None`` means floats ``[3, 6, 5]``.
      params: the params to check with, in float64. ``None`` means those of ``init``,
        moved a little so that nothing is zero.
      causal: whether the layer should be causal; ``None`` takes what it says itself.
      resets: false leaves out resets, for a layer that refuses them.
      smooth: false leaves out finite differences, for a layer with kinks, such as a
        relu.

    Raises:
      AssertionError: a law is broken; the message names it.
      TypeError: it is not a layer.
      ValueError: there is a plain mistake, such as a carry without a batch.

    Example:
      >>> jlstm.testing.check_layer(jlstm.Dense(2))
    """
    mistakes.check_is_layer(layer)
    with jax.enable_x64(True):
        case = laws.layer_case(layer, xs, params)
        mistakes.check_layer_results(layer, case)
        laws.check_config(layer)
        run = laws.Runner(layer.apply, takes_resets=resets)
        laws.check_lengths(layer, case, run)
        laws.check_padding(layer, case, run)
        laws.check_rows(layer, case, run)
        causal = is_causal(layer) if causal is None else causal
        laws.check_causal(layer, case, run, causal)
        if resets:
            laws.check_layer_resets(layer, case, run)
        laws.check_vmap(layer, case, run)
        # A stack is what compiles itself.
        laws.check_traces(
            stack(layer),
            lambda traces: stack(laws.CountedLayer(laws.copy_of(layer), traces)),
            lambda s: s.apply,
            ((case.params,), case.xs, (case.carry,)),
            run(case)["ys"],
        )
        if smooth:
            laws.check_derivatives(layer, case, run)
