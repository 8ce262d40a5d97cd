"""One answer for each sequence."""

from __future__ import annotations

from typing import Any, get_args

import jax
from flax import struct

from jlstm.layers import Dense, is_causal, pool
from jlstm.layers.compose import Pooling
from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, PyTree, check_positive, config


@struct.dataclass
class ClassifierParams:
    """Params of a classifier.

    Attributes:
      encoder: those of the encoder.
      head: those of the affine map from the pooled vector to logits, a
        :class:`jlstm.DenseParams`.
    """

    encoder: PyTree
    head: PyTree


@config
class Classifier:
    r"""Classifies whole sequences: :math:`\mathrm{logits} = W\,\mathrm{pool}(y) + b`.

    The encoder's outputs :math:`y` are pooled over time to one vector. A row without
    valid steps has a vector of zeros, so its logits are the bias, which learns how
    frequent the classes are.

    Attributes:
      encoder: any layer.
      num_classes: the number of logits, one for each class.
      pooling: how the outputs become one vector: ``"last"``, the default, ``"first"``,
        ``"mean"``, ``"max"`` or ``"sum"``; see :func:`jlstm.pool`.

    Example:
      >>> model = jlstm.Classifier(jlstm.bidirectional(jlstm.LSTM(8)), num_classes=2)
      >>> xs = jnp.ones((4, 5, 3))
      >>> params = model.init(jax.random.key(0), xs)
      >>> logits, _ = model.apply(params, xs, lengths=jnp.array([5, 2, 1, 0]))
      >>> logits.shape
      (4, 2)
    """

    encoder: Any
    num_classes: int
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        check_layer_field("Classifier.encoder", self.encoder)
        check_positive(self, "num_classes")
        if self.pooling not in get_args(Pooling):
            names = ", ".join(repr(name) for name in get_args(Pooling))
            raise ValueError(
                f"Classifier.pooling: must be one of {names}, got {self.pooling!r}"
            )

    @property
    def causal(self) -> bool:
        """Whether the encoder is causal."""
        return is_causal(self.encoder)

    def init(self, key: Array, xs: PyTree) -> ClassifierParams:
        """Makes params for inputs like ``xs [B, T, ...]``."""
        keys = jax.random.split(key)
        encoder = self.encoder.init(keys[0], xs)
        y = jax.eval_shape(lambda p, x: self._pool(p, x, None)[0], encoder, xs)
        return ClassifierParams(encoder, Dense(self.num_classes).init(keys[1], y))

    def init_carry(self, params: ClassifierParams, batch_shape: tuple[int, ...]) -> Any:
        """Makes the encoder's fresh carry."""
        return self.encoder.init_carry(params.encoder, batch_shape)

    def apply(
        self,
        params: ClassifierParams,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, PyTree]:
        """Computes one vector of logits for each row.

        Args:
          params: what ``init`` made.
          xs: what the encoder takes, ``[B, T, ...]``.
          carry: the incoming carry of the encoder; ``None`` means the fresh one.
          lengths: the number of valid steps in each row, as for :func:`jlstm.unroll`.
          mask: true at valid steps, as for :func:`jlstm.unroll`.
          resets: boundaries within rows, as for :func:`jlstm.unroll`.
          key: a typed key for noise; ``None`` means no noise.

        Returns:
          ``(logits, carry)``, the logits ``[B, num_classes]``.
        """
        masking: dict[str, Any] = {
            "lengths": lengths,
            "mask": mask,
            "resets": resets,
            "key": key,
        }
        y, carry = self._pool(params.encoder, xs, carry, **masking)
        logits, _ = Dense(self.num_classes).apply(params.head, y[:, None])
        return logits[:, 0], carry

    def _pool(self, params: PyTree, xs: PyTree, carry: PyTree, **masking: Any) -> Any:
        options = {"kind": self.pooling, "name": "encoder", **masking}
        return pool(self.encoder, params, xs, carry, **options)
