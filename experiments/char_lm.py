"""A character LSTM learns to write: Python, or any text.

It is trained on the source of CPython's standard library, or on any UTF-8 text (--data
FILE), by truncated backpropagation through time. Whole files are held out for
validation; of a single text, the last tenth. The score is bits per character on the
validation text. The floor is the best interpolated 3- to 8-gram model of the training
text, scored on the same characters.

    python experiments/char_lm.py --workdir runs/char_lm
    python experiments/char_lm.py --workdir runs/char_lm --generate "def "

Paper: Graves, Generating sequences with recurrent neural networks, 2013; Karpathy,
Johnson & Fei-Fei, Visualizing and understanding recurrent networks, 2015.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import data, train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the character model."""

    corpus: int = 4_000_000
    """Characters of the standard library to read; a file given by --data is read
    whole."""
    num_layers: int = 1
    """Number of LSTM layers."""
    hidden_size: int = 256
    """Hidden units of each layer."""
    embed_size: int = 64
    """Features of the vector of each character."""
    dropout: float = 0.0
    """Dropout rate after each layer, from 0 to below 1."""
    batch_size: int = 32
    """Lanes of the text that are read in parallel."""
    length: int = 64
    """Characters of a chunk, over which gradients flow."""
    segment: int = 8
    """Chunks that a lane reads before it jumps to another place."""
    num_steps: int = 1_600
    """Updates of the params."""
    learning_rate: float = 6e-3
    """Highest learning rate of the schedule."""
    schedule: train.Schedule = train.Cosine(warmup=0.05, final_fraction=0.01)
    """How the learning rate rises and falls."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices."""
    implementation: str | None = None
    """Loop that runs the recurrence, such as scan or native; none lets jlstm choose."""
    sample: int = 600
    """Characters to generate at the end."""
    temperature: float = 0.6
    """Temperature of generation; below 1 prefers likely characters."""
    generate: str | None = None
    """Continue this text with the finished run in --workdir, without training."""


PRESETS = {
    "quick": Config(),
    "smoke": Config(
        corpus=60_000, hidden_size=16, embed_size=8, batch_size=4, length=16, segment=2,
        num_steps=20, sample=40,
    ),
    "cpu": Config(
        corpus=5_000_000, hidden_size=512, length=100, num_steps=2_200,
        learning_rate=4e-3,
    ),
    "paper": Config(
        corpus=100_000_000, num_layers=3, hidden_size=512, embed_size=128, dropout=0.2,
        batch_size=100, length=100, num_steps=50_000, learning_rate=2e-3,
    ),
}  # fmt: skip


def read_corpus(config: Config) -> tuple[str, str]:
    """Returns the training and the validation text."""
    if config.data is not None:
        text = data.read_text(config.data)
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
    files = data.python_sources(limit=config.corpus)
    parts = data.split_files(files, (0.9, 0.1))
    training, validation = ("".join(source for _, source in part) for part in parts)
    return training, validation


def make_model(config: Config, vocabulary: data.Vocabulary) -> jlstm.LanguageModel:
    """Makes the model: an embedding, LSTM layers, and a softmax over characters."""
    layers = []
    for _ in range(config.num_layers):
        cell = jlstm.LSTM(config.hidden_size)
        layers.append(jlstm.RNN(cell, implementation=config.implementation))
        layers.append(jlstm.Dropout(config.dropout))
    body = jlstm.stack(*layers)
    return jlstm.LanguageModel(body, len(vocabulary), config.embed_size)


def main(config: Config) -> dict:
    """Trains, scores and writes a sample; or only writes, with ``generate``."""
    if config.generate is not None:
        return continue_text(config)
    workdir = train.Workdir(config, experiment="char_lm")
    if workdir.result is not None:
        return workdir.result
    training, validation = read_corpus(config)
    vocabulary = data.Vocabulary.from_text(training + validation)
    (workdir.path / "vocabulary.json").write_text(vocabulary.to_json())
    ids, held_out = vocabulary.encode(training), vocabulary.encode(validation)

    model = make_model(config, vocabulary)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    print(train.describe(config, params))
    print(
        f"{len(training):,} characters to train on, {len(validation):,} held out, "
        f"{len(vocabulary)} symbols"
    )
    ngrams = data.ngram_bits(ids, held_out, len(vocabulary), orders=range(3, 9))
    order = min(ngrams, key=lambda n: ngrams[n])
    print(f"floor: a {order}-gram model takes {ngrams[order]:.3f} bits per character")

    def loss_fn(params, batch, *, key, carry):
        masking = {"lengths": batch.get("lengths"), "resets": batch["resets"]}
        ys, carry = model.features(params, batch["inputs"], carry, key=key, **masking)
        loss = train.projected_cross_entropy(
            ys, *model.head(params), batch["targets"], lengths=batch.get("lengths")
        )
        return loss, train.Aux({"bits": train.bits(loss)}, carry)

    shared = train.data_parallel(loss_fn, config.devices)
    shape = {"batch_size": config.batch_size, "length": config.length}
    lanes = data.lanes(ids, segment=config.segment, seed=config.seed, **shape)
    scoring = data.scoring_lanes(held_out, **shape)
    tx = train.adamw(
        config.learning_rate,
        num_steps=config.num_steps,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        b2=0.99,
    )
    state = train.create_state(
        params,
        tx,
        key=jax.random.key(config.seed + 1) if config.dropout else None,
        carry=model.init_carry(params, (config.batch_size,)),
    )
    every = max(config.num_steps // 8, 1)
    eval_step = train.make_eval_step(shared)
    report = train.fit(
        state,
        train.make_train_step(shared, tx, debug_nans=config.debug_nans),
        lanes.repeat(),
        num_steps=config.num_steps,
        hooks=[
            train.evaluate_every(every, eval_step, lambda: scoring),
            *workdir.watchers(unit="characters"),
        ],
        log_every=max(config.num_steps // 80, 1),
        checkpoints=workdir.checkpoints(),
    )
    params = report.state.params
    train.save(workdir.path / "params", params, overwrite=True)
    bits = report.metrics["validation_bits"]
    train.plot_metrics(
        workdir.metrics,
        workdir.plots / "bits.png",
        "bits",
        unit="bits per character",
        floor=ngrams[order],
        floor_name=f"{order}-gram model",
    )
    sample = write(config, model, params, vocabulary, "\n")
    (workdir.path / "sample.txt").write_text(sample)
    print(f"\n{sample}\n")
    result = workdir.write_result(
        metric="validation bits per character",
        value=bits,
        floor=ngrams[order],
        floor_name=f"{order}-gram model, Witten-Bell interpolation",
        lower_is_better=True,
        nats_per_character=bits * float(np.log(2)),
        ngram_bits={str(n): value for n, value in ngrams.items()},
        training_characters=len(training),
        validation_characters=len(validation),
    )
    verdict = "below" if result["beats_floor"] else "not below"
    print(
        f"{bits:.3f} bits per character ({bits * np.log(2):.3f} nats) on held-out "
        f"text, {verdict} the floor of {ngrams[order]:.3f}; {result['seconds']:.0f} s"
    )
    return result


def write(
    config: Config,
    model: jlstm.LanguageModel,
    params: jlstm.LanguageModelParams,
    vocabulary: data.Vocabulary,
    prompt: str,
) -> str:
    """Continues a prompt, whose characters must be in the vocabulary."""
    ids = jnp.asarray(vocabulary.encode(prompt))[None]
    options = {"temperature": config.temperature, "key": jax.random.key(config.seed)}
    out = jlstm.generate(model, params, ids, config.sample, **options)
    return prompt + vocabulary.decode(np.asarray(out[0]))


def continue_text(config: Config) -> dict:
    """Continues the text of ``--generate`` with the params of a finished run."""
    workdir = config.workdir
    if workdir is None or not (Path(workdir) / "result.json").exists():
        raise ValueError(
            f"char_lm: --generate needs the --workdir of a finished run, got {workdir}"
        )
    prompt = config.generate
    if not prompt:
        raise ValueError("char_lm: --generate needs a text of at least one character")
    saved = json.loads((workdir / "config.json").read_text())
    shape = {name: saved[name] for name in ("num_layers", "hidden_size", "embed_size")}
    config = dataclasses.replace(config, **shape)
    vocabulary = data.Vocabulary.from_json((workdir / "vocabulary.json").read_text())
    model = make_model(config, vocabulary)
    blank = jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(model.init, jax.random.key(0), blank)
    params = train.load(workdir / "params", like)
    text = write(config, model, params, vocabulary, prompt)
    print(text)
    return {"text": text}


if __name__ == "__main__":
    train.run(main, PRESETS)
