"""What the tests are parametrised over."""

import jax

import jlstm

# The largest error that a dtype may make against float64, relative to the magnitude.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}

# Every built-in cell, small, and every option that changes its formula.
CELLS = [
    jlstm.LSTM(3),
    jlstm.LSTM(2, double_bias=True, learned_carry=True),
    jlstm.GRU(3),
    jlstm.GRU(2, double_bias=True, learned_carry=True),
    jlstm.GRU(3, reset_after=False),
    jlstm.GRU(2, reset_after=False, double_bias=True, learned_carry=True),
    jlstm.Elman(3),
    jlstm.Elman(2, activation=jax.nn.softplus, double_bias=True, learned_carry=True),
]
