"""The suites: what is timed, at which sizes, and a cell as a user would write it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

import jlstm

Kind = Literal["layer", "step", "language"]


class Size(NamedTuple):
    """The size of one case: steps, rows, input features, hidden units."""

    T: int
    B: int
    D: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Size:
        """Reads ``"T,B,D,H"``.

        Raises:
          ValueError: not four positive integers.

        Example:
          >>> from jlstm.bench.cases import Size
          >>> Size.parse("100,32,128,256").H
          256
        """
        parts = text.split(",")
        if len(parts) != 4 or not all(p.strip().isdecimal() and int(p) for p in parts):
            raise ValueError(
                f"--sizes: must be T,B,D,H, four positive integers, got {text!r}"
            )
        return cls(*map(int, parts))


GRID = (
    Size(100, 32, 128, 128),
    Size(128, 64, 256, 256),
    Size(35, 20, 200, 200),
    Size(100, 32, 512, 512),
    Size(784, 64, 1, 128),
    Size(64, 128, 64, 64),
    Size(512, 1, 128, 128),
    Size(50, 256, 32, 32),
)

VARIANTS = ("scan", "xla", "one", "two", "native", "checkpoint")
JAX_PEERS = (
    "nnx",
    "nnx-unroll4",
    "linen",
    "linen-unroll4",
    "haiku",
    "haiku-unroll4",
    "equinox",
    "keras",
)
PEERS = ("torch", *JAX_PEERS)
# The packages that peers need, by the first part of their names.
PACKAGES = {"nnx": "flax", "linen": "flax"}


@dataclasses.dataclass(frozen=True)
class Suite:
    """One suite, which becomes one table.

    Attributes:
      about: the caption of the table.
      kind: the program that is timed: ``"layer"``, ``"step"`` or ``"language"``.
      sizes: the sizes, one for each row of the table. If the suite is ``resizable``,
        the command line may name others.
      cell: ``"lstm"``, ``"gru"`` or ``"mgu"``.
      train: whether to time gradients with respect to params and inputs; otherwise only
        the outputs are computed.
      bidirectional: whether to time two bidirectional layers on rows of different
        lengths, instead of one layer.
      compile_only: whether to time the compilation, in a new process for each round.
      shows_memory: whether to note the temporary memory that XLA reserves.
      vocab_size: the vocabulary of a language model.
      num_layers: the layers of a language model.
      variants: the variants of jlstm that can take part.
      peers: the other libraries that can take part.
      references: what the times are compared with: ``"torch"``, ``"jax"`` (the fastest
        other JAX library) or a variant.
      least_calls: the least number of calls in one measurement.
    """

    about: str
    kind: Kind = "layer"
    sizes: tuple[Size, ...] = GRID
    cell: str = "lstm"
    train: bool = True
    bidirectional: bool = False
    compile_only: bool = False
    shows_memory: bool = False
    vocab_size: int = 0
    num_layers: int = 1
    variants: tuple[str, ...] = ("scan", "xla", "one", "two", "native")
    peers: tuple[str, ...] = PEERS
    references: tuple[str, ...] = ("torch", "jax")
    least_calls: int = 3

    @property
    def resizable(self) -> bool:
        """Whether the command line may choose other sizes."""
        return self.kind == "layer"

    def takes(self, worker: str, size: Size) -> bool:
        """Tells whether a worker takes part at a size."""
        if worker == "two" and size.B > 1 and size.B % 2:
            return False
        return worker in (*self.variants, *self.peers)


SUITES = {
    "lstm-train": Suite("One LSTM layer: gradients of inputs and weights"),
    "lstm-forward": Suite("One LSTM layer: outputs", train=False),
    "gru-train": Suite("One GRU layer: gradients of inputs and weights", cell="gru"),
    "bilstm-ragged": Suite(
        "Two bidirectional LSTM layers, lengths from 10 to 100 % of T: gradients",
        sizes=(GRID[0], GRID[1], GRID[5]),
        bidirectional=True,
        peers=("torch", "nnx", "nnx-unroll4", "linen", "linen-unroll4", "keras"),
    ),
    "mgu": Suite(
        "A minimal gated unit written by a user: gradients",
        sizes=tuple(size for size in GRID if size.H != 512),
        cell="mgu",
        peers=(),
        references=("scan",),
    ),
    "step": Suite(
        "One step of an LSTM cell",
        kind="step",
        sizes=(Size(1, 1, 256, 256),),
        train=False,
        variants=("one", "native"),
        peers=("torch",),
        references=("torch",),
        least_calls=1000,
    ),
    "word-lm": Suite(
        "Word language model, 10,000 words, 2x200 LSTM, SGD: a whole training step",
        kind="language",
        sizes=(Size(35, 20, 200, 200),),
        vocab_size=10_000,
        num_layers=2,
        peers=("torch",),
        references=("torch",),
    ),
    "char-lm": Suite(
        "Character language model, 100 symbols, 1x512 LSTM, Adam: a whole training "
        "step",
        kind="language",
        sizes=(Size(100, 32, 512, 512),),
        vocab_size=100,
        peers=("torch",),
        references=("torch",),
    ),
    "memory": Suite(
        "A long LSTM: gradients, and the memory that XLA reserves for them",
        sizes=(Size(16_384, 8, 64, 256),),
        shows_memory=True,
        variants=("scan", "one", "native", "checkpoint"),
        peers=(),
        references=("scan",),
    ),
    "compile": Suite(
        "Time to trace, lower and compile the gradients of one LSTM layer",
        sizes=(Size(16, 32, 128, 128), Size(4096, 32, 128, 128)),
        compile_only=True,
        peers=JAX_PEERS,
        references=("jax",),
    ),
}


@struct.dataclass
class MGUParams:
    """The weights of a minimal gated unit: forget gate first, then the candidate."""

    w_ih: jax.Array  # [D, 2H]
    w_hh: jax.Array  # [H, 2H]
    b: jax.Array  # [2H]


@jlstm.config
class MGU:
    r"""A minimal gated unit whose gate comes after the recurrent product.

    .. math::
        f &= \sigma(x W_{ih}^f + h W_{hh}^f + b^f) \\
        n &= \tanh(x W_{ih}^n + b^n + f \odot (h W_{hh}^n)) \\
        h' &= (1 - f) \odot h + f \odot n

    Attributes:
      hidden_size: ``H``.

    References:
      Zhou, Wu, Zhang & Zhou, 2016.
    """

    hidden_size: int

    def init(self, key: jax.Array, x: jax.Array) -> MGUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys, H = jax.random.split(key), self.hidden_size
        glorot = jax.nn.initializers.glorot_uniform()
        return MGUParams(
            w_ih=glorot(keys[0], (x.shape[-1], 2 * H), x.dtype),
            w_hh=glorot(keys[1], (H, 2 * H), x.dtype),
            b=jnp.zeros((2 * H,), x.dtype),
        )

    def init_carry(self, params: MGUParams, batch_shape: tuple[int, ...]) -> jax.Array:
        """Makes the fresh carry, zeros ``[*batch_shape, H]``."""
        return jnp.zeros((*batch_shape, self.hidden_size), params.b.dtype)

    def project(self, params: MGUParams, x: jax.Array) -> jax.Array:
        """Computes what depends on ``x`` alone."""
        return jlstm.affine(x, params.w_ih, params.b)

    def mix(self, params: MGUParams, carry: jax.Array, zx: jax.Array) -> jax.Array:
        """Computes the recurrent product."""
        return carry @ params.w_hh

    def update(self, params: Any, carry: Any, zx: Any, zh: Any) -> tuple[Any, Any]:
        """Applies the gate and the candidate."""
        (xf, xn), (hf, hn) = jnp.split(zx, 2, axis=-1), jnp.split(zh, 2, axis=-1)
        (f,) = jlstm.gates(xf + hf, "s")
        n = jlstm.tanh(xn + f * hn)
        h = carry + f * (n - carry)
        return h, h

    def step(self, params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        """Advances one step."""
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))
