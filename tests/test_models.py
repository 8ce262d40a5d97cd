"""Models map sequences to answers, and handle padding as layers do."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

import jlstm
from jlstm.testing import random_like

BATCH, TIME, VOCAB = 3, 6, 7
TOKENS = jnp.arange(BATCH * TIME, dtype=jnp.int32).reshape(BATCH, TIME) % VOCAB
LENGTHS = jnp.array([4, TIME, 0])
VALID = jnp.arange(TIME)[None] < LENGTHS[:, None]
ENCODER = jlstm.stack(jlstm.Embed(VOCAB, 3), jlstm.bidirectional(jlstm.Elman(2)))
SHORTER = jlstm.stack(ENCODER, jlstm.Conv(3, width=3, padding="VALID"))
BODY = jlstm.RNN(jlstm.LSTM(3))
MODELS = {
    "classifier": (jlstm.Classifier(ENCODER, 4), (BATCH, 4)),
    "mean": (jlstm.Classifier(SHORTER, 4, pooling="mean"), (BATCH, 4)),
    "tagger": (jlstm.Tagger(ENCODER, 5), (BATCH, TIME, 5)),
    "shorter tagger": (jlstm.Tagger(SHORTER, 5), (BATCH, TIME - 2, 5)),
    "language model": (jlstm.LanguageModel(BODY, VOCAB, 2), (BATCH, TIME, VOCAB)),
    "tied": (jlstm.LanguageModel(BODY, VOCAB, 3, tied=True), (BATCH, TIME, VOCAB)),
}
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def init(model: Any) -> Any:
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)
    # So that no bias, such as a prior, is left at zero.
    return jax.tree.map(jnp.add, params, random_like(params, seed=1, scale=0.1))


@pytest.mark.parametrize("name", MODELS)
def test_model_answers_in_its_shape_with_inert_padding(name):
    model, shape = MODELS[name]
    params = init(model)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def results(params, tokens):
        answer, carry = model.apply(params, tokens, lengths=LENGTHS)
        return jnp.square(answer).sum(), (answer, carry)

    clean = results(params, TOKENS)
    (_, (answer, _)), grads = clean
    assert answer.shape == shape
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    for leaf in jax.tree.leaves(grads):
        assert bool((leaf != 0).any())
    chex.assert_trees_all_equal(results(params, jnp.where(VALID, TOKENS, -5)), clean)


@pytest.mark.parametrize("name", ["classifier", "mean"])
def test_classifier_gives_a_row_without_steps_the_prior(name):
    model, _ = MODELS[name]
    params = init(model)
    logits, _ = model.apply(params, TOKENS, lengths=LENGTHS)
    close(logits[2], params.head.b)
    assert bool((logits[:2] != params.head.b[None]).all())


def test_classifier_of_a_padded_row_equals_the_row_alone():
    model, _ = MODELS["mean"]
    params = init(model)
    together, _ = model.apply(params, TOKENS, lengths=LENGTHS)
    alone, _ = model.apply(params, TOKENS[:1, :4])
    close(together[:1], alone)


@pytest.mark.parametrize(("name", "kept"), [("tagger", 4), ("shorter tagger", 2)])
def test_tagger_emits_zeros_where_its_encoder_has_no_output(name, kept):
    model, _ = MODELS[name]
    params = init(model)
    logits, _ = model.apply(params, TOKENS, lengths=LENGTHS)
    alone, _ = model.apply(params, TOKENS[:1, :4])
    close(logits[:1, :kept], alone)
    assert bool((logits[0, kept:] == 0).all())
    assert bool((logits[2] == 0).all())


@pytest.mark.parametrize("name", ["language model", "tied"])
def test_language_model_streams(name):
    model, _ = MODELS[name]
    params = init(model)
    whole, after = model.apply(params, TOKENS)
    carry, parts = None, []
    for chunk in (TOKENS[:, :2], TOKENS[:, 2:5]):
        logits, carry = model.apply(params, chunk, carry)
        parts.append(logits)
    carry, logits = jlstm.step(model, params, carry, TOKENS[:, 5])
    close((jnp.concatenate([*parts, logits[:, None]], 1), carry), (whole, after))


def test_language_model_ties_its_head_to_the_embedding():
    model, _ = MODELS["tied"]
    params = init(model)
    assert params.w is None
    vectors = params.embed.table[TOKENS]
    ys, _ = BODY.apply(params.body, vectors)
    logits, _ = model.apply(params, TOKENS)
    close(logits, ys @ params.embed.table.T + params.b[None, None])
    untied = jax.tree.leaves(init(MODELS["language model"][0]))
    assert len(untied) == len(jax.tree.leaves(params)) + 1


def test_language_model_never_sees_the_symbol_that_it_predicts():
    model, _ = MODELS["language model"]
    params = init(model)
    logits, _ = model.apply(params, TOKENS)
    other, _ = model.apply(params, TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % VOCAB))
    chex.assert_trees_all_equal(logits[:, :3], other[:, :3])
    assert bool((logits[:, 3:] != other[:, 3:]).any())


@pytest.mark.parametrize(
    "body", [jlstm.bidirectional(jlstm.LSTM(2)), jlstm.RNN(jlstm.LSTM(2), reverse=True)]
)
def test_language_model_refuses_a_body_that_sees_the_future(body):
    for wrapped in (body, jlstm.stack(body), jlstm.Residual(body)):
        with pytest.raises(ValueError, match=r"LanguageModel.body: must be causal"):
            jlstm.LanguageModel(wrapped, VOCAB, 3)
