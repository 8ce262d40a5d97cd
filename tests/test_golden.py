"""Guarantees that jlstm computes what torch computes: results and all gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch_oracle
from golden import make_golden

pytestmark = pytest.mark.core

each_case = pytest.mark.parametrize(
    "case", make_golden.CASES, ids=[case.name for case in make_golden.CASES]
)
each_implementation = pytest.mark.parametrize(
    "implementation", torch_oracle.IMPLEMENTATIONS
)


def assert_equal_to_torch(case, arrays, dtype, implementation):
    value, gradient = torch_oracle.errors(case, arrays, dtype, implementation)
    value_tolerance, gradient_tolerance = torch_oracle.TOLERANCE[dtype]
    assert value <= value_tolerance
    assert gradient <= gradient_tolerance


@each_case
@each_implementation
@pytest.mark.parametrize("dtype", torch_oracle.TOLERANCE)
def test_layer_equals_torch(case, implementation, dtype):
    assert_equal_to_torch(case, make_golden.load(case), dtype, implementation)


@each_case
def test_golden_inputs_are_drawn_from_their_seed(case):
    arrays = make_golden.load(case)
    for name, drawn in make_golden.draw(case).items():
        np.testing.assert_array_equal(arrays[name], drawn)


@each_case
def test_golden_gradients_cover_every_input_and_none_vanishes(case):
    arrays = make_golden.load(case)
    inputs = {name for name in make_golden.draw(case) if not name.startswith("to_")}
    gradients = {name.removeprefix("d_") for name in arrays if name.startswith("d_")}
    assert gradients == inputs
    assert all(np.abs(arrays[f"d_{name}"]).max() > 1e-3 for name in inputs)


@each_case
def test_golden_results_are_what_the_installed_torch_computes(case):
    pytest.importorskip("torch", reason="torch is not installed")
    arrays = make_golden.load(case)
    results = make_golden.run_torch(case, arrays)
    assert {*results} == {*arrays} - {*make_golden.draw(case)}
    assert torch_oracle.error(results, {n: arrays[n] for n in results}) <= 1e-12


@each_case
@each_implementation
def test_layer_equals_the_installed_torch_on_other_draws(case, implementation):
    pytest.importorskip("torch", reason="torch is not installed")
    for seed in range(100, 105):
        other = dataclasses.replace(case, seed=seed)
        if case.lengths is not None:
            rng = np.random.default_rng(seed)
            lengths = rng.integers(1, case.time + 1, case.batch).tolist()
            other = dataclasses.replace(other, lengths=tuple(lengths))
        arrays = make_golden.draw(other)
        arrays |= make_golden.run_torch(other, arrays)
        assert_equal_to_torch(other, arrays, "float64", implementation)
