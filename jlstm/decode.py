"""Draws sequences from a model of the next symbol."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jlstm import door
from jlstm.layers.compose import check_input, is_causal, step
from jlstm.layers.recurrent import take_valid
from jlstm.types import Array, Layer, PyTree, zero_rows


def generate(
    model: Layer,
    params: PyTree,
    prompt: Array,
    num_steps: int,
    *,
    key: Array | None = None,
    lengths: Array | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    r"""Continues prompts, one symbol at a time.

    .. math::
        x_{t+1} \sim \mathrm{softmax}(\mathrm{logits}_t / \tau)

    Args:
      model: a causal model that maps ids ``[B, T]`` to logits ``[B, T, V]``, such as
        :class:`jlstm.LanguageModel`.
      params: its params.
      prompt: the symbols to continue, ``[B, T]`` integers, T at least 1.
      num_steps: the number of symbols to draw for each row.
      key: a typed key, from which symbols are drawn; ``None`` takes the most likely
        symbol each time (greedy).
      lengths: the number of valid symbols in each prompt, ``[B]``, at least 1; ``None``
        means all of them.
      temperature: :math:`\tau`, above 0; ``None`` means 1. Below 1 likely symbols
        become more likely, above 1 less so.
      top_k: draws only from the k most likely symbols; ``None`` allows all.
      top_p: draws only from the most likely symbols whose probabilities together reach
        p, in (0, 1] (nucleus sampling); ``None`` allows all.

    Returns:
      ``[B, num_steps]`` symbols, without the prompt.

    Raises:
      ValueError: the model is not causal, the prompt is empty, an option is out of
        range, or one of the last three is given without a key.

    Example:
      >>> model = jlstm.LanguageModel(jlstm.RNN(jlstm.LSTM(8)), 10, embed_size=4)
      >>> prompt = jnp.array([[1, 2, 3]])
      >>> params = model.init(jax.random.key(0), prompt)
      >>> jlstm.generate(model, params, prompt, 5).shape
      (1, 5)

    References:
      Holtzman et al., 2020 (nucleus sampling).
    """
    (lengths,) = door.as_arrays(lengths)
    if not is_causal(model):
        raise ValueError(f"generate: needs a causal model, got {model!r}")
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"generate: prompt must be [B, T] with T >= 1, got {list(prompt.shape)}"
        )
    valid = door.valid_steps(prompt, lengths=lengths, where="generate")
    checkable = lengths is not None and door.is_concrete(lengths)
    if checkable and door.value_range(lengths)[0] < 1:
        raise ValueError("generate: lengths must be at least 1, got 0")
    check_input(model, zero_rows(valid, prompt))
    if temperature is not None and temperature <= 0:
        raise ValueError(
            f"generate: temperature must be positive, got {temperature}; for the most "
            "likely symbols leave out key and temperature"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if key is None and (temperature, top_k, top_p) != (None, None, None):
        raise ValueError(
            "generate: temperature, top_k and top_p need key=, because they draw "
            "symbols at random; leave them out for the most likely symbols (greedy)"
        )
    options = (1.0 if temperature is None else float(temperature), top_k, top_p)
    return _generate(model, num_steps, options, params, prompt, lengths, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model: Layer,
    num_steps: int,
    options: tuple[float, int | None, float | None],
    params: PyTree,
    prompt: Array,
    lengths: Array | None,
    key: Array | None,
) -> Array:
    logits, carry = model.apply(params, prompt, lengths=lengths)
    mask = door.valid_steps(prompt, lengths=lengths)
    logits = take_valid(logits, mask)

    def body(state: tuple[PyTree, Array], i: Array) -> tuple:
        carry, logits = state
        if key is None:
            symbol = jnp.argmax(logits, axis=-1)
        else:
            allowed = restrict(logits, *options)
            symbol = jax.random.categorical(jax.random.fold_in(key, i), allowed)
        symbol = symbol.astype(prompt.dtype)
        return step(model, params, carry, symbol), symbol

    steps = jnp.arange(num_steps, dtype=jnp.int32)
    _, symbols = jax.lax.scan(body, (carry, logits), steps)
    return symbols.T


def restrict(
    logits: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Divides logits by the temperature and rules symbols out, for sampling.

    Args:
      logits: ``[..., V]``.
      temperature: as for :func:`jlstm.generate`.
      top_k: as for :func:`jlstm.generate`.
      top_p: as for :func:`jlstm.generate`.

    Returns:
      Logits ``[..., V]``, minus infinity for symbols that are ruled out.

    Example:
      >>> jlstm.decode.restrict(jnp.array([1.0, 3.0, 2.0]), top_k=2).tolist()
      [-inf, 3.0, 2.0]
    """
    logits = logits / temperature
    size = logits.shape[-1]
    if top_k is not None and top_k < size:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A symbol stays if those before it do not reach p yet: the first always does.
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < top_p, ordered, jnp.inf)
        logits = jnp.where(logits < kept.min(-1, keepdims=True), -jnp.inf, logits)
    return logits
