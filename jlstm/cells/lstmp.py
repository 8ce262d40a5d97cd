"""LSTM whose output is projected to a smaller size before it is carried on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, tanh
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class LSTMPParams:
    """Weights of an LSTM with projection to size ``P``; gates in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``.
      w_hh: recurrent weights, ``[P, 4H]``.
      w_hr: the projection, ``[H, P]``.
      b: biases, ``[4H]``.
      b_hh: second biases, ``[4H]``; ``None`` without ``double_bias``.
      h0: the learned fresh ``h``, ``[P]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    w_hr: Array
    b: Array
    b_hh: Array | None = None
    h0: Array | None = None
    c0: Array | None = None


class LSTMPCarry(NamedTuple):
    """Carry of an LSTM with projection.

    Attributes:
      h: the projected output of the step, ``[..., P]``.
      c: the memory, ``[..., H]``.
    """

    h: Array
    c: Array


def lstmp_project(params: LSTMPParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    b = params.b if params.b_hh is None else params.b + params.b_hh
    return affine(x, params.w_ih, b)


def lstmp_mix(params: LSTMPParams, carry: LSTMPCarry, zx: Array) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 4H]``."""
    del zx
    return carry.h @ params.w_hh


def lstmp_update(
    params: LSTMPParams,
    carry: LSTMPCarry,
    zx: Array,
    zh: Array,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[LSTMPCarry, Array]:
    """Makes the gates from ``zx + zh``, ``[..., 4H]``, applies them, and projects."""
    i, f, g, o = gates(zx + zh, "ssts", "ifgo")
    c = _clip(f * carry.c + i * g, cell_clip)
    # Here and not in mix, since the output is the projection.
    h = _clip((o * tanh(c)) @ params.w_hr, proj_clip)
    return LSTMPCarry(h, c), h


def _clip(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.clip(x, -limit, limit)


def lstmp_step(
    params: LSTMPParams,
    carry: LSTMPCarry,
    x: Array,
    *,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
) -> tuple[LSTMPCarry, Array]:
    r"""Advances an LSTM with recurrent projection by one time step.

    .. math::
        a_i, a_f, a_g, a_o &= x W_{ih} + h W_{hh} + b \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= (o \odot \tanh(c')) W_{hr}

    The letters mean what they mean in :func:`jlstm.lstm_step`.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [P, 4H]``, ``w_hr [H, P]`` and
        ``b [4H]``; see :class:`jlstm.cells.LSTMPParams`.
      carry: ``h [..., P]`` and ``c [..., H]`` after the step before.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      cell_clip: a limit ``l``: :math:`c'` is clipped to ``[-l, l]``; ``None`` does not
        clip.
      proj_clip: the same for :math:`h'`.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., P]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.LSTMP(8, proj_size=4), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape, carry.c.shape
      ((2, 4), (2, 8))

    References:
      Sak, Senior & Beaufays, Long short-term memory recurrent neural network
      architectures for large scale acoustic modeling, 2014.
    """
    zx = lstmp_project(params, x)
    zh = lstmp_mix(params, carry, zx)
    clips = {"cell_clip": cell_clip, "proj_clip": proj_clip}
    return lstmp_update(params, carry, zx, zh, **clips)


@config
class LSTMP:
    """LSTM with projection; :func:`jlstm.cells.lstmp_step` has the formula.

    It pairs a large memory with a small recurrent product, ``P x 4H`` in the place of
    ``H x 4H``.

    Attributes:
      hidden_size: ``H``, the number of units of the memory ``c``.
      proj_size: ``P``, the size of ``h`` and of the output, usually less than ``H``.
        PyTorch's ``proj_size`` is the same.
      cell_clip: a limit ``l``, positive: the memory is clipped to ``[-l, l]`` at each
        step. ``None``, the default, does not clip.
      proj_clip: the same for the output, which is what the next step sees.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      double_bias: adds a second bias, as PyTorch has it.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      w_hr_init: initialiser of the projection ``w_hr``.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.LSTMP(8, proj_size=4))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 4)
    """

    hidden_size: int
    proj_size: int
    cell_clip: float | None = None
    proj_clip: float | None = None
    forget_bias: float = 1.0
    double_bias: bool = False
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    w_hr_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(lstmp_project)
    mix = staticmethod(lstmp_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "proj_size")
        for name in ("cell_clip", "proj_clip"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value > 0):
                raise ValueError(
                    f"LSTMP.{name}: must be a positive number or None, got {value!r}"
                )

    def update(
        self, params: LSTMPParams, carry: LSTMPCarry, zx: Array, zh: Array
    ) -> tuple[LSTMPCarry, Array]:
        """Applies the gates, and projects."""
        clips = {"cell_clip": self.cell_clip, "proj_clip": self.proj_clip}
        return lstmp_update(params, carry, zx, zh, **clips)

    def step(
        self, params: LSTMPParams, carry: LSTMPCarry, x: Array
    ) -> tuple[LSTMPCarry, Array]:
        """Advances one step."""
        clips = {"cell_clip": self.cell_clip, "proj_clip": self.proj_clip}
        return lstmp_step(params, carry, x, **clips)

    def init(self, key: Array, x: Array) -> LSTMPParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 5)
        size, proj, dtype = self.hidden_size, self.proj_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        b_hh = None
        if self.double_bias:
            b_hh = per_gate(self.b_init, keys[3], 4, (size,), dtype)
        return LSTMPParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, (proj, size), dtype),
            w_hr=self.w_hr_init(keys[4], (size, proj), dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            b_hh=b_hh,
            h0=jnp.zeros((proj,), dtype) if self.learned_carry else None,
            c0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: LSTMPParams, batch_shape: tuple[int, ...]
    ) -> LSTMPCarry:
        """Makes the fresh carry, ``[*batch_shape, P]`` and ``[*batch_shape, H]``."""
        return LSTMPCarry(
            fresh(params.h0, self.proj_size, batch_shape, params.w_hh),
            fresh(params.c0, self.hidden_size, batch_shape, params.w_hh),
        )
