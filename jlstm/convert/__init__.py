"""Weights of other libraries in and out: converted exactly, or refused by name.

All pairs of functions are called alike::

    layer, params = from_torch(weights)         # the layer is made from the weights
    layer, params = from_torch(weights, layer)  # the weights must fit a layer of yours
    weights = to_torch(layer, params)

================= =============================== ==================================
functions         weights                         of
================= =============================== ==================================
``from_torch``    a ``state_dict``                ``nn.LSTM`` with or without
                                                  projection, ``GRU``, ``RNN``
``from_keras``    ``get_weights()``, or by path   ``LSTM``, ``GRU``, ``SimpleRNN``,
                                                  ``ConvLSTM2D``, ``Bidirectional``,
                                                  stacked cells
``from_linen``    variables                       ``nn.RNN``, ``nn.Bidirectional``
``from_nnx``      ``nnx.state(module)``           ``nnx.RNN``, ``nnx.Bidirectional``
``from_haiku``    params of ``hk.transform``      ``hk.LSTM``, ``GRU``, ``VanillaRNN``,
                                                  ``Conv2DLSTM``, ``DeepRNN``
``from_equinox``  a cell, or a dict of its arrays ``LSTMCell``, ``GRUCell``
``from_jax_rnn``  a vector                        ``jax.experimental.rnn.lstm``
================= =============================== ==================================

The other library need not be installed: weights are dicts and lists of arrays, in and
out, and keep their dtypes. ``prefix=`` picks the recurrent part out of a larger model.

Weights do not tell everything, such as an activation. It is then that of ``layer``, or
the other library's default if no layer is given. Where one side has one bias and the
other two, the two are added, or the second is zero. No other library has a learned
fresh carry, so one that is not zero is refused.
"""

from jlstm.convert.equinox import from_equinox, to_equinox
from jlstm.convert.haiku import from_haiku, to_haiku
from jlstm.convert.jax_rnn import from_jax_rnn, to_jax_rnn
from jlstm.convert.keras import from_keras, to_keras
from jlstm.convert.linen import from_linen, to_linen
from jlstm.convert.nnx import from_nnx, to_nnx
from jlstm.convert.torch import from_torch, to_torch

__all__ = [
    "from_equinox",
    "from_haiku",
    "from_jax_rnn",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_torch",
    "to_equinox",
    "to_haiku",
    "to_jax_rnn",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_torch",
]
