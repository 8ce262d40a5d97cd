"""The next symbol, at every step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jlstm.cells import affine
from jlstm.door import valid_steps
from jlstm.init import Normal
from jlstm.layers import Dense, Embed, EmbedParams, is_causal, run_layer
from jlstm.layers.compose import on_ids
from jlstm.layers.recurrent import check_layer_field
from jlstm.types import (
    Array,
    PyTree,
    check_positive,
    common_dtype,
    config,
    zero_rows,
)


@struct.dataclass
class LanguageModelParams:
    """Params of a language model.

    Attributes:
      embed: the table of the symbols' vectors, an :class:`jlstm.EmbedParams`.
      body: those of the body.
      w: weights of the logits, ``[H, V]``; ``None`` where the table is used for them.
      b: biases of the logits, ``[V]``.
    """

    embed: EmbedParams
    body: PyTree
    w: Array | None
    b: Array


@config
class LanguageModel:
    r"""Predicts the next symbol at every step.

    .. math::
        p(x_{t+1} \mid x_{\le t}) = \mathrm{softmax}(W y_t + b)

    where :math:`y_t` is the body's output at step t.

    Attributes:
      body: any causal layer on vectors, such as ``RNN(LSTM(256))``.
      vocab_size: ``V``, the number of symbols; ids are integers from 0 to V - 1.
      embed_size: the number of features of a symbol's vector, which the body takes.
      tied: true uses the table of the vectors for ``W`` too, which saves ``V * H``
        params (Press & Wolf, 2017). The body must then return ``embed_size`` features.

    Raises:
      ValueError: on construction, if the body is not causal: it would see the symbol
        that it is to predict.

    Example:
      >>> model = jlstm.LanguageModel(jlstm.RNN(jlstm.LSTM(8)), 10, embed_size=4)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> logits, _ = model.apply(model.init(jax.random.key(0), tokens), tokens)
      >>> logits.shape
      (1, 3, 10)
    """

    body: Any
    vocab_size: int
    embed_size: int
    tied: bool = False

    def __post_init__(self) -> None:
        check_layer_field("LanguageModel.body", self.body)
        check_positive(self, "vocab_size", "embed_size")
        if not is_causal(self.body):
            raise ValueError(
                f"LanguageModel.body: must be causal, got {self.body!r}, which sees "
                "the symbol that it is to predict"
            )

    @property
    def _embed(self) -> Embed:
        # Scaled so that tied logits begin near zero.
        init = Normal(self.embed_size**-0.5)
        return Embed(self.vocab_size, self.embed_size, table_init=init)

    def check(self, xs: Array) -> None:
        """Refuses ids outside the vocabulary, where their values are known."""
        self._embed.check(xs)

    def init(self, key: Array, xs: Array) -> LanguageModelParams:
        """Makes params for tokens like ``xs [B, T]``."""
        keys = jax.random.split(key, 3)
        embed = self._embed.init(keys[0], xs)
        vectors, _ = jax.eval_shape(self._embed.apply, embed, xs)
        body = self.body.init(keys[1], vectors)
        ys, _ = jax.eval_shape(self.body.apply, body, vectors)
        if self.tied and ys.shape[-1] != self.embed_size:
            raise ValueError(
                "LanguageModel.tied: the body must return embed_size="
                f"{self.embed_size} features, got {ys.shape[-1]}; put "
                f"Dense({self.embed_size}) after it"
            )
        w = None
        if not self.tied:
            w = Dense(self.vocab_size).init(keys[2], ys).w
        b = jnp.zeros((self.vocab_size,), embed.table.dtype)
        return LanguageModelParams(embed, body, w, b)

    def init_carry(
        self, params: LanguageModelParams, batch_shape: tuple[int, ...]
    ) -> Any:
        """Makes the body's fresh carry."""
        return self.body.init_carry(params.body, batch_shape)

    def apply(
        self,
        params: LanguageModelParams,
        xs: Array,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, PyTree]:
        """Computes the logits of the next symbol at every step.

        Args:
          params: what ``init`` made.
          xs: token ids, ``[B, T]`` integers.
          carry: the incoming carry of the body; ``None`` means the fresh one.
          lengths: the number of valid steps in each row, as for :func:`jlstm.unroll`.
          mask: true at valid steps, as for :func:`jlstm.unroll`.
          resets: boundaries within rows, as for :func:`jlstm.unroll`.
          key: a typed key for noise; ``None`` means no noise.

        Returns:
          ``(logits, carry)``, the logits ``[B, T, V]``, zeros at masked steps.
        """
        masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        ys, carry = self.features(params, xs, carry, key=key, **masking)
        w, b = self.head(params)
        dtype = common_dtype(ys.dtype, w.dtype)
        # As rows: of two axes to sum over, XLA would transpose the logits' gradient.
        rows = ys.reshape(-1, ys.shape[-1]).astype(dtype)
        logits = affine(rows, w.astype(dtype), b.astype(dtype))
        logits = logits.reshape(*ys.shape[:-1], self.vocab_size)
        return zero_rows(
            valid_steps(xs, **masking, where="LanguageModel"), logits
        ), carry

    def features(
        self,
        params: LanguageModelParams,
        xs: Array,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, PyTree]:
        """Computes the body's outputs, of which the head makes logits.

        It is for a loss that never holds the logits of all steps:
        ``train.projected_cross_entropy(ys, *model.head(params), labels)``.

        Args:
          params: what ``init`` made.
          xs: token ids, ``[B, T]`` integers.
          carry: as for ``apply``, as are the rest.
          lengths: as for ``apply``.
          mask: as for ``apply``.
          resets: as for ``apply``.
          key: as for ``apply``.

        Returns:
          ``(ys, carry)``, the outputs ``[B, T, H]``.
        """
        masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        valid_steps(xs, **masking, where="LanguageModel")
        joined = on_ids(self._embed, params.embed, self.body, params.body, xs)
        if joined is not None:
            self._embed.check(xs)
            return run_layer("body", *joined, xs, carry, key=key, **masking)
        vectors, _ = run_layer("embed", self._embed, params.embed, xs, **masking)
        return run_layer(
            "body", self.body, params.body, vectors, carry, key=key, **masking
        )

    def head(self, params: LanguageModelParams) -> tuple[Array, Array]:
        """Returns the weights ``[H, V]`` and the biases ``[V]`` of the logits.

        Args:
          params: what ``init`` made.
        """
        w = params.embed.table.T if params.w is None else params.w
        return w, params.b
