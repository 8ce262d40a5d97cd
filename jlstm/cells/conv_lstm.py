"""LSTM on images and other grids, with convolutions in the place of products."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.convolution import convolve
from jlstm.cells.gates import add_vector, fresh
from jlstm.cells.lstm import LSTMCarry, lstm_update
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class ConvLSTMParams:
    """Weights of a convolutional LSTM; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: the kernel of the inputs, ``[*K, D, 4H]``.
      w_hh: the kernel of ``h``, ``[*K, H, 4H]``.
      b: biases, ``[4H]``.
      h0: the learned fresh ``h``, ``[H]``, the same at all places of the grid; ``None``
        without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; likewise.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    h0: Array | None = None
    c0: Array | None = None


def conv_lstm_project(params: ConvLSTMParams, x: Array, **options: Any) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return add_vector(convolve(x, params.w_ih, **options), params.b)


def conv_lstm_mix(params: ConvLSTMParams, carry: LSTMCarry, zx: Array) -> Array:
    """Convolves ``h`` with ``w_hh``, to ``[..., *S, 4H]``."""
    del zx
    return convolve(carry.h, params.w_hh)


def conv_lstm_step(
    params: ConvLSTMParams, carry: LSTMCarry, x: Array, **options: Any
) -> tuple[LSTMCarry, Array]:
    r"""Advances a convolutional LSTM by one time step.

    .. math::
        a_i, a_f, a_g, a_o &= x * W_{ih} + h * W_{hh} + b \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    where :math:`*` convolves over the spatial axes. The other letters mean what they
    mean in :func:`jlstm.lstm_step`, at each place of the grid. The paper's peepholes
    are left out, as Keras and Flax do.

    Args:
      params: the weights ``w_ih [*K, D, 4H]``, ``w_hh [*K, H, 4H]`` and ``b [4H]``,
        with ``*K`` the size of the kernel along each spatial axis.
      carry: ``h`` and ``c`` after the step before, ``[..., *S, H]`` each, with ``*S``
        the shape of the grid.
      x: input at this step, its last axes the spatial ones and the channels ``D``;
        leading dimensions are batch dimensions.
      **options: ``strides``, ``padding`` and ``dilation`` of the convolution of ``x``;
        see :func:`jlstm.cells.convolve`.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., *S, H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.ConvLSTM(4, 3, (8, 8)), jnp.ones((2, 8, 8, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8, 8, 4)

    References:
      Shi, Chen, Wang, Yeung, Wong & Woo, Convolutional LSTM network: a machine learning
      approach for precipitation nowcasting, 2015.
    """
    zx = conv_lstm_project(params, x, **options)
    return lstm_update(params, carry, zx, conv_lstm_mix(params, carry, zx))


@config
class ConvLSTM:
    """Convolutional LSTM; :func:`jlstm.cells.conv_lstm_step` has the formula.

    A layer of it maps ``[B, T, *spatial_shape, D]`` to ``[B, T, *S, H]``, where ``S``
    is ``spatial_shape`` unless strides or padding make it smaller. A size is an int,
    for all spatial axes, or a tuple with one int for each.

    Attributes:
      hidden_size: ``H``, the number of channels of the output.
      kernel_size: the size of the kernels of both convolutions, in places of the grid.
        An odd one is centred.
      spatial_shape: the shape of the input's grid, a tuple of one to three ints, such
        as ``(height, width)``.
      strides: places between two outputs of the convolution of the inputs. The
        convolution of ``h`` always has strides 1, padding ``"SAME"`` and no dilation.
      padding: of the convolution of the inputs: ``"SAME"`` pads with zeros and keeps
        the shape, ``"VALID"`` does not pad.
      dilation: places between two taps of the convolution of the inputs; 1 means
        neighbours.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, the same at all places, which
        starts at zero; otherwise each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Raises:
      ValueError: on construction, if a size is not positive, or a kernel does not fit
        into the grid.

    Example:
      >>> layer = jlstm.RNN(jlstm.ConvLSTM(4, kernel_size=3, spatial_shape=(8, 6)))
      >>> xs = jnp.ones((2, 5, 8, 6, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.h.shape
      ((2, 5, 8, 6, 4), (2, 8, 6, 4))
    """

    hidden_size: int
    kernel_size: int | tuple[int, ...]
    spatial_shape: tuple[int, ...]
    strides: int | tuple[int, ...] = 1
    padding: Literal["SAME", "VALID"] = "SAME"
    dilation: int | tuple[int, ...] = 1
    forget_bias: float = 1.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    mix = staticmethod(conv_lstm_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")
        shape = self.spatial_shape
        if not isinstance(shape, tuple) or not 1 <= len(shape) <= 3:
            raise ValueError(
                "ConvLSTM.spatial_shape: must be a tuple of one to three ints, such as "
                f"(height, width), got {shape!r}"
            )
        if self.padding not in ("SAME", "VALID"):
            raise ValueError(
                f"ConvLSTM.padding: must be 'SAME' or 'VALID', got {self.padding!r}"
            )
        if min(self.carry_shape) < 1:
            raise ValueError(
                f"ConvLSTM.kernel_size: must fit into spatial_shape {shape} with "
                f"padding='VALID', got {self.kernel_size!r}"
            )

    def _sizes(self, name: str) -> tuple[int, ...]:
        """A field's sizes, one for each spatial axis."""
        value, axes = getattr(self, name), len(self.spatial_shape)
        sizes = value if isinstance(value, tuple) else (value,) * axes
        # A bool is an int too.
        if len(sizes) != axes or any(type(n) is not int or n < 1 for n in sizes):
            raise ValueError(
                f"ConvLSTM.{name}: must be a positive int, or a tuple of {axes}, one "
                f"for each spatial axis, got {value!r}"
            )
        return sizes

    @property
    def x_ndim(self) -> int:
        """How many axes an input has: the spatial ones and the channels."""
        return len(self.spatial_shape) + 1

    @property
    def carry_shape(self) -> tuple[int, ...]:
        """The spatial shape of carry and output, ``S``."""
        names = ("spatial_shape", "kernel_size", "strides", "dilation")
        lost = int(self.padding == "VALID")
        axes = zip(*map(self._sizes, names), strict=True)
        return tuple((n - lost * d * (k - 1) + s - 1) // s for n, k, s, d in axes)

    def _options(self, x: Array) -> dict[str, Any]:
        """Options of the convolution of inputs, whose shape is checked."""
        if x.shape[-self.x_ndim : -1] != self.spatial_shape:
            expected = ", ".join(map(str, self.spatial_shape))
            raise ValueError(
                f"ConvLSTM: x must be [..., {expected}, D], as spatial_shape says, got "
                f"{list(x.shape)}"
            )
        sizes = {name: self._sizes(name) for name in ("strides", "dilation")}
        return {"padding": self.padding, **sizes}

    def project(self, params: ConvLSTMParams, x: Array) -> Array:
        """Convolves ``x`` with ``w_ih``, to ``[..., *S, 4H]``."""
        return conv_lstm_project(params, x, **self._options(x))

    def step(
        self, params: ConvLSTMParams, carry: LSTMCarry, x: Array
    ) -> tuple[LSTMCarry, Array]:
        """Advances one step."""
        return conv_lstm_step(params, carry, x, **self._options(x))

    def update(
        self, params: ConvLSTMParams, carry: LSTMCarry, zx: Array, zh: Array
    ) -> tuple[LSTMCarry, Array]:
        """Applies the gates, as those of an LSTM at each place."""
        return lstm_update(params, carry, zx, zh)

    def init(self, key: Array, x: Array) -> ConvLSTMParams:
        """Makes params for inputs like ``x [..., *spatial_shape, D]``."""
        self._options(x)  # checks the shape
        keys, kernel = jax.random.split(key, 3), self._sizes("kernel_size")
        size, dtype = self.hidden_size, float_dtype(x)
        w_ih, w_hh = (*kernel, x.shape[-1], size), (*kernel, size, size)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return ConvLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, w_ih, dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, w_hh, dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(
        self, params: ConvLSTMParams, batch_shape: tuple[int, ...]
    ) -> LSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, *S, H]`` each."""
        lead = (*batch_shape, *self.carry_shape)
        h, c = (
            fresh(leaf, self.hidden_size, lead, params.b)
            for leaf in (params.h0, params.c0)
        )
        return LSTMCarry(h, c)
