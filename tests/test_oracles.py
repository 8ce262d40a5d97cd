"""Every cell equals its formula, in values and gradients, and obeys the laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jlstm
from jlstm.kernels import fused, product
from jlstm.testing import check_cell
from tests.cases import TOLERANCE
from tests.oracles import errors, extended, gated, linear, simple, wrappers

CASES = [
    *gated.CASES,
    *linear.CASES,
    *extended.CASES,
    *simple.CASES,
    *wrappers.CASES,
]
# Of each shape that a gated form may take; the others meet the laws with the slow.
SHAPES = (
    jlstm.PeepholeLSTM,
    jlstm.ConvLSTM,
    jlstm.GRUD,
    jlstm.SLSTM,
    jlstm.Zoneout,
)
# Of a slope against central differences of the oracle.
SLOPE = {"float64": 1e-8, "float32": 1e-4}

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def case_of(param):
    """Takes a case out of ``pytest.param``."""
    return param.values[0] if hasattr(param, "values") else param


def example(case):
    """An input at one step."""
    return jax.tree.map(lambda s: jnp.zeros((3, *s.shape), s.dtype), case.x)


@each_case
@pytest.mark.parametrize(
    "implementation", [pytest.param("scan", marks=pytest.mark.slow), "fused"]
)
def test_cell_equals_its_formula(case, implementation):
    found = errors(case, implementation)
    assert found["value"] <= TOLERANCE["float64"]
    assert found["gradient"] <= SLOPE["float64"]


@each_case
def test_cell_equals_its_formula_in_float32(case, monkeypatch):
    """On a CPU, the steps in C++ are for float32 alone, and for one device."""
    for module in (product, fused):
        monkeypatch.setattr(module, "may_be_sharded", lambda: False)
    found = errors(case, "fused", "float32")
    assert found["value"] <= TOLERANCE["float32"]
    assert found["gradient"] <= SLOPE["float32"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(case_of(case).cell, SHAPES)], ids=str
)
def test_cell_obeys_the_laws_of_sequences(case):
    check_cell(case.cell, example(case), implementations=("fused",), smooth=False)


@pytest.mark.slow
@each_case
def test_cell_obeys_all_laws(case):
    check_cell(case.cell, example(case), smooth=case.smooth)
