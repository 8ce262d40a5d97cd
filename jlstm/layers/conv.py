"""Convolution over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import door
from jlstm import init as initialisers
from jlstm.cells.gates import affine
from jlstm.layers.recurrent import wrong_carry
from jlstm.types import (
    Array,
    Initializer,
    check_activations,
    check_positive,
    common_dtype,
    config,
    float_dtype,
    zero_rows,
)

Padding = Literal["SAME", "VALID", "CAUSAL"]


@struct.dataclass
class ConvParams:
    """Weights of a convolution.

    Attributes:
      w: the kernel, ``[width, D, H]``, for ``H = size``.
      b: biases, ``[H]``, or ``None``.
    """

    w: Array
    b: Array | None


class ConvCarry(NamedTuple):
    """The inputs that a causal convolution needs again.

    Attributes:
      xs: the last inputs of each row, ``[B, (width - 1) * dilation, D]``.
    """

    xs: Array


@config
class Conv:
    r"""Convolves over time.

    .. math::
        y_t = \phi\Big(b + \sum_{j=0}^{k-1} W_j \, x_{st + dj - p}\Big)

    where :math:`\phi` is the activation, k the width, s the stride and d the dilation.
    The padding p is 0 for ``"VALID"``, ``d(k - 1) // 2`` for ``"SAME"`` and
    ``d(k - 1)`` for ``"CAUSAL"``. It never depends on T, so that padding is inert under
    a stride too.

    A causal convolution can be streamed: its carry holds the last valid inputs, a
    masked step is skipped as if it were not there, and a reset cuts the window. The
    others read masked steps as zeros.

    Attributes:
      size: features of the output.
      width: k, the number of steps that an output sees.
      stride: s, the number of steps from one output to the next; 1 if ``"CAUSAL"``.
        With a larger one the output has about T / s steps.
      dilation: d, the number of steps from one tap to the next; an output reaches over
        ``d(k - 1) + 1`` steps.
      padding: ``"SAME"``, the default, sees both sides and keeps T (if the stride is
        1); ``"CAUSAL"`` sees only the past and keeps T; ``"VALID"`` sees no padding
        and drops ``d(k - 1)`` steps.
      activation: a module-level function such as ``jax.nn.relu``, or ``None`` for none.
      bias: true adds ``b``.
      w_init: initialiser of ``w``, called once for ``[width * D, size]``; see
        :mod:`jlstm.init`.
      b_init: initialiser of ``b [size]``.

    Raises:
      ValueError: on construction, if a size is not positive, or the stride of a causal
        convolution is not 1.

    Example:
      >>> layer, xs = jlstm.Conv(4, width=3, padding="CAUSAL"), jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.xs.shape
      ((2, 5, 4), (2, 2, 3))
    """

    size: int
    width: int
    stride: int = 1
    dilation: int = 1
    padding: Padding = "SAME"
    activation: Callable[[Array], Array] | None = None
    bias: bool = True
    w_init: Initializer = initialisers.lecun_normal
    b_init: Initializer = initialisers.zeros

    def __post_init__(self) -> None:
        check_positive(self, "size", "width", "stride", "dilation")
        check_activations(self, "activation", optional=True)
        if self.padding not in get_args(Padding):
            names = ", ".join(repr(name) for name in get_args(Padding))
            raise ValueError(
                f"Conv.padding: must be one of {names}, got {self.padding!r}"
            )
        if self.causal and self.stride > 1:
            raise ValueError(
                "Conv.stride: must be 1 with padding='CAUSAL', which gives one output "
                f"for each step, got {self.stride}"
            )

    @property
    def causal(self) -> bool:
        """Whether outputs depend on no later inputs."""
        return self.padding == "CAUSAL"

    @property
    def _reach(self) -> int:
        return self.dilation * (self.width - 1)

    @property
    def _pads(self) -> tuple[int, int]:
        """Zeros before and after the sequence; a causal one has its carry before."""
        if self.padding != "SAME":
            return 0, 0
        return self._reach // 2, self._reach - self._reach // 2

    def init(self, key: Array, xs: Array) -> ConvParams:
        """Makes params for inputs like ``xs [B, T, D]``."""
        keys = jax.random.split(key)
        dtype, features = float_dtype(xs), xs.shape[-1]
        w = self.w_init(keys[0], (self.width * features, self.size), dtype)
        return ConvParams(
            w.reshape(self.width, features, self.size),
            self.b_init(keys[1], (self.size,), dtype) if self.bias else None,
        )

    def init_carry(
        self, params: ConvParams, batch_shape: tuple[int, ...]
    ) -> ConvCarry | tuple[()]:
        """Makes the fresh carry: zeros before the sequence, or none."""
        if not self.causal:
            return ()
        shape = (*batch_shape, self._reach, params.w.shape[1])
        return ConvCarry(jnp.zeros(shape, params.w.dtype))

    def retime(
        self, lengths: Array | None, mask: Array | None, resets: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Tells which outputs are valid, from which inputs are.

        Raises:
          NotImplementedError: resets, where outputs are not one a step.
        """
        if self.padding == "CAUSAL" or (self.padding == "SAME" and self.stride == 1):
            return lengths, mask, resets
        if resets is not None:
            raise NotImplementedError(
                f"{self!r}: cannot honour resets, because it does not give one output "
                "for each step; use padding 'SAME' or 'CAUSAL' with stride 1"
            )
        lengths, mask = door.as_arrays(lengths, mask)
        if lengths is not None:
            reach = self._reach if self.padding == "VALID" else 0
            lengths = jnp.maximum((lengths - reach + self.stride - 1) // self.stride, 0)
        if mask is not None:
            taps = (
                self._taps(mask)
                if self.padding == "VALID"
                else [mask[:, :: self.stride]]
            )
            mask = jnp.stack(taps).all(0)
        return lengths, mask, None

    def apply(
        self,
        params: ConvParams,
        xs: Array,
        carry: ConvCarry | None = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, ConvCarry | tuple[()]]:
        """Convolves ``xs [B, T, D]``; outputs are zero at masked steps."""
        del key
        if xs.ndim != 3 or xs.shape[-1] != params.w.shape[1]:
            raise door.error(
                "Conv",
                f"xs must be [B, T, D={params.w.shape[1]}], got {list(xs.shape)}",
            )
        lengths, mask, resets = door.as_arrays(lengths, mask, resets)
        given: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        valid = door.valid_steps(xs, **given, where="Conv")
        resets = door.shard_like(resets, xs)
        dtype = common_dtype(xs.dtype, params.w.dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        xs = zero_rows(valid, xs.astype(dtype))
        if not self.causal:
            if jax.tree.leaves(carry):
                raise wrong_carry("Conv", "() or None", carry)
            lengths, mask, _ = self.retime(**given)
            ys = self._convolve(params, xs, resets)
            out = door.valid_steps(ys, lengths=lengths, mask=mask, where="Conv")
            return zero_rows(out, ys), ()
        incoming: Any = (
            self.init_carry(params, xs.shape[:1]) if carry is None else carry
        )
        shape = [xs.shape[0], self._reach, xs.shape[-1]]
        if not isinstance(incoming, ConvCarry) or list(incoming.xs.shape) != shape:
            raise wrong_carry("Conv", f"a ConvCarry with xs {shape}", incoming)
        before = incoming.xs.astype(dtype)
        return self._stream(params, xs, before, valid, resets, holes=mask is not None)

    def _stream(
        self,
        params: ConvParams,
        xs: Array,
        before: Array,
        valid: Array | None,
        resets: Array | None,
        holes: bool,
    ) -> tuple[Array, ConvCarry]:
        # Segments are numbered by the resets so far; the carry belongs to segment 0.
        segments = (
            None if resets is None else jnp.cumsum(resets, axis=1, dtype=jnp.int32)
        )
        last = None if segments is None else resets.sum(1, dtype=jnp.int32)  # type: ignore
        order = None
        if holes and valid is not None:
            # Valid steps first, in order: a masked step is as if it were not there.
            order = jnp.argsort(~valid, axis=1, stable=True)
            xs = take_steps(xs, order)
            segments = None if segments is None else take_steps(segments, order)
        xs = jnp.concatenate([door.shard_like(before, xs), xs], axis=1)
        if segments is not None:
            segments = jnp.pad(segments, ((0, 0), (self._reach, 0)))
        ys = self._affine(params, xs, segments)
        if order is not None:
            ys = take_steps(ys, jnp.argsort(order, axis=1))
        count = jnp.full(xs.shape[:1], ys.shape[1], jnp.int32)
        if valid is not None:
            ys, count = zero_rows(valid, ys), valid.sum(1, dtype=jnp.int32)
        kept = count[:, None] + jnp.arange(self._reach, dtype=jnp.int32)[None, :]
        carry = take_steps(xs, kept)
        if segments is not None and last is not None:
            carry = zero_rows(take_steps(segments, kept) == last[:, None], carry)
        return ys, ConvCarry(carry)

    def _convolve(self, params: ConvParams, xs: Array, resets: Array | None) -> Array:
        segments = None
        if resets is not None:
            segments = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
            segments = jnp.pad(segments, ((0, 0), self._pads), constant_values=-1)
        xs = jnp.pad(xs, ((0, 0), self._pads, (0, 0)))
        return self._affine(params, xs, segments)

    def _affine(self, params: ConvParams, xs: Array, segments: Array | None) -> Array:
        """Convolves what is already padded; taps of another segment count as zeros."""
        taps = self._taps(xs)
        if segments is not None:
            labels = self._taps(segments)
            first = self._reach if self.causal else self._pads[0]
            anchor = segments[:, first : first + labels[0].shape[1]]
            taps = [
                zero_rows(label == anchor, tap)
                for label, tap in zip(labels, taps, strict=True)
            ]
        w = params.w.reshape(-1, self.size)
        ys = affine(jnp.concatenate(taps, axis=-1), w, params.b)
        return ys if self.activation is None else self.activation(ys)

    def _taps(self, padded: Array) -> list[Array]:
        """What each tap sees, at each output: ``width`` arrays ``[B, T', ...]``."""
        span = max(padded.shape[1] - self._reach, 0)
        starts = (j * self.dilation for j in range(self.width))
        return [padded[:, start : start + span : self.stride] for start in starts]


def take_steps(xs: Array, steps: Array) -> Array:
    """Takes ``xs[b, steps[b, i]]`` for ``xs [B, T, ...]`` and ``steps [B, I]``."""
    steps = door.shard_like(steps, xs, axes=1)
    return jax.vmap(lambda row, index: row[index])(xs, steps)
