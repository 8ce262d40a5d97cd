"""One answer for each step."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from jlstm.layers import Dense, is_causal, run_layer
from jlstm.layers.compose import retime
from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, PyTree, check_positive, config


@struct.dataclass
class TaggerParams:
    """Params of a tagger.

    Attributes:
      encoder: those of the encoder.
      head: those of the affine map from outputs to logits, a
        :class:`jlstm.DenseParams`.
    """

    encoder: PyTree
    head: PyTree


@config
class Tagger:
    r"""Labels every step: :math:`\mathrm{logits}_t = W y_t + b`.

    Attributes:
      encoder: any layer, whose output at step t is :math:`y_t`.
      num_tags: the number of logits, one for each label.

    Example:
      >>> model = jlstm.Tagger(jlstm.bidirectional(jlstm.LSTM(8)), num_tags=5)
      >>> xs = jnp.ones((2, 7, 3))
      >>> logits, _ = model.apply(model.init(jax.random.key(0), xs), xs)
      >>> logits.shape
      (2, 7, 5)
    """

    encoder: Any
    num_tags: int

    def __post_init__(self) -> None:
        check_layer_field("Tagger.encoder", self.encoder)
        check_positive(self, "num_tags")

    @property
    def causal(self) -> bool:
        """Whether the encoder is causal."""
        return is_causal(self.encoder)

    def init(self, key: Array, xs: PyTree) -> TaggerParams:
        """Makes params for inputs like ``xs [B, T, ...]``."""
        keys = jax.random.split(key)
        encoder = self.encoder.init(keys[0], xs)
        ys, _ = jax.eval_shape(self.encoder.apply, encoder, xs)
        return TaggerParams(encoder, Dense(self.num_tags).init(keys[1], ys))

    def init_carry(self, params: TaggerParams, batch_shape: tuple[int, ...]) -> Any:
        """Makes the encoder's fresh carry."""
        return self.encoder.init_carry(params.encoder, batch_shape)

    def retime(
        self, lengths: Array | None, mask: Array | None, resets: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Tells what lengths, mask and resets are for the logits."""
        return retime(self.encoder, lengths, mask, resets)

    def apply(
        self,
        params: TaggerParams,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, PyTree]:
        """Computes one vector of logits for each step.

        Args:
          params: what ``init`` made.
          xs: what the encoder takes, ``[B, T, ...]``.
          carry: the incoming carry of the encoder; ``None`` means the fresh one.
          lengths: the number of valid steps in each row, as for :func:`jlstm.unroll`.
          mask: true at valid steps, as for :func:`jlstm.unroll`.
          resets: boundaries within rows, as for :func:`jlstm.unroll`.
          key: a typed key for noise; ``None`` means no noise.

        Returns:
          ``(logits, carry)``, the logits ``[B, T, num_tags]``, zeros at masked steps.
        """
        masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        ys, carry = run_layer(
            "encoder", self.encoder, params.encoder, xs, carry, key=key, **masking
        )
        lengths, mask, _ = self.retime(**masking)
        logits, _ = Dense(self.num_tags).apply(
            params.head, ys, lengths=lengths, mask=mask
        )
        return logits, carry
