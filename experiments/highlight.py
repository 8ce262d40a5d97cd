"""A BiLSTM highlights Python, and shows why both directions matter.

Each character of CPython's standard-library source is labelled with the class of its
token, as `tokenize` says: keyword, call, definition, string and so on. A reader from
left to right cannot know that `pri` begins a call before the bracket comes, nor whether
`i` is a name or the start of `if`; a network that reads both ways can. A BiLSTM is
compared with an LSTM of about as many parameters that reads forward only. The floor is
the most frequent class of each character. Whole files are held out for validation and
for the test, and the test files are scored once.

    python experiments/highlight.py --workdir runs/highlight

Paper: Graves & Schmidhuber, Framewise phoneme classification with bidirectional LSTM,
2005.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import data, train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the tagger."""

    corpus: int = 3_000_000
    """Characters of the standard library to read."""
    embed_size: int = 32
    """Features of the vector of each character."""
    hidden_size: int = 96
    """Hidden units of each direction of the BiLSTM; the LSTM gets as many as match its
    number of parameters."""
    batch_size: int = 32
    """Windows in each update."""
    length: int = 256
    """Characters of each window."""
    num_steps: int = 1_500
    """Updates of each network."""
    learning_rate: float = 6e-3
    """Highest learning rate of the schedule."""
    schedule: train.Schedule = train.Cosine(warmup=0.05)
    """How the learning rate rises and falls."""


PRESETS = {
    "cpu": Config(),
    "smoke": Config(
        corpus=60_000,
        embed_size=8,
        hidden_size=8,
        batch_size=4,
        length=64,
        num_steps=20,
    ),
    "paper": Config(
        corpus=100_000_000, hidden_size=256, num_steps=20_000, batch_size=64
    ),
}

COLOURS = {
    "whitespace": "#000000", "comment": "#6a737d", "string": "#032f62",
    "number": "#005cc5", "operator": "#586069", "keyword": "#d73a49",
    "name": "#24292e", "definition": "#6f42c1", "call": "#22863a",
    "decorator": "#e36209",
}  # fmt: skip


def windows(
    files: list[tuple[str, str]], vocabulary: data.Vocabulary, length: int
) -> dict[str, np.ndarray]:
    """Cuts files into windows, the last of each file padded: ``[N, T]`` arrays."""
    rows: dict[str, list[np.ndarray]] = {"chars": [], "classes": []}
    for _, source in files:
        arrays = (vocabulary.encode(source), data.python_token_classes(source))
        for name, array in zip(rows, arrays, strict=True):
            rows[name] += np.split(array, range(length, len(array), length))
    chars, lengths = data.pad(rows["chars"], length)
    classes, _ = data.pad(rows["classes"], length)
    return {"chars": chars, "classes": classes.astype(np.int32), "lengths": lengths}


def count(model: jlstm.Tagger) -> int:
    """Counts the parameters of a model of characters."""
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), example)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def make_models(config: Config, num_symbols: int) -> dict[str, jlstm.Tagger]:
    """Makes the BiLSTM, and the LSTM with the nearest number of parameters."""

    def tagger(layer: jlstm.Layer) -> jlstm.Tagger:
        embed = jlstm.Embed(num_symbols, config.embed_size)
        return jlstm.Tagger(jlstm.stack(embed, layer), len(data.TOKEN_CLASSES))

    both = tagger(jlstm.bidirectional(jlstm.LSTM(config.hidden_size)))
    wanted = count(both)
    sizes = range(config.hidden_size, 2 * config.hidden_size + 1)
    forward = (tagger(jlstm.RNN(jlstm.LSTM(size))) for size in sizes)
    nearest = min(forward, key=lambda model: abs(count(model) - wanted))
    return {"BiLSTM": both, "LSTM": nearest}


def fit_one(
    config: Config,
    workdir: train.Workdir,
    name: str,
    model: jlstm.Tagger,
    parts: list[dict[str, np.ndarray]],
) -> tuple[jlstm.TaggerParams, float]:
    """Trains a model; returns its params and its accuracy on the test files."""
    training, validation, test = parts

    def loss_fn(params, batch, *, key, carry):
        lengths, classes = batch["lengths"], batch["classes"]
        logits, _ = model.apply(params, batch["chars"], lengths=lengths)
        loss = train.softmax_cross_entropy(logits, classes, lengths=lengths)
        right = train.accuracy(logits, classes, lengths=lengths)
        return loss, train.Aux({"accuracy": right})

    shared = train.data_parallel(loss_fn, config.devices)
    tx = train.adamw(
        config.learning_rate,
        num_steps=config.num_steps,
        schedule=config.schedule,
        b2=0.99,
    )
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    size = config.batch_size
    batches = data.batches(
        training, batch_size=size, seed=config.seed, drop_remainder=True
    )
    eval_step = train.make_eval_step(shared)
    print(f"{name}, {count(model):,} parameters: {model!r}")
    report = train.fit(
        train.create_state(params, tx),
        train.make_train_step(shared, tx, debug_nans=config.debug_nans),
        batches.repeat(),
        num_steps=config.num_steps,
        hooks=[
            train.evaluate_every(
                max(config.num_steps // 4, 1),
                eval_step,
                lambda: data.batches(validation, batch_size=size),
            ),
            *workdir.watchers(name.lower(), unit="characters"),
        ],
        log_every=max(config.num_steps // 60, 1),
        checkpoints=workdir.checkpoints(name.lower()),
    )
    params = report.state.params
    train.save(workdir.path / f"params_{name.lower()}", params, overwrite=True)
    metrics = workdir.metrics_of(name.lower())
    train.plot_metrics(metrics, workdir.plots / f"{name.lower()}.png", "accuracy")
    score = train.evaluate(eval_step, params, data.batches(test, batch_size=size))
    return params, score["accuracy"]


def render(
    path, source: str, columns: dict[str, np.ndarray], truth: np.ndarray
) -> None:
    """Draws source once for each labelling, with wrong characters on red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    lines = source.split("\n")
    width, height = max(map(len, lines)), len(lines)
    figure, panels = pyplot.subplots(
        1, len(columns), figsize=(0.085 * width * len(columns), 0.19 * (height + 2))
    )
    for panel, (title, labels) in zip(
        np.atleast_1d(panels), columns.items(), strict=True
    ):
        place = 0
        for row, line in enumerate(lines):
            for column, character in enumerate(line):
                label, right = labels[place], truth[place]
                if label != right:
                    box = (column - 0.5, row - 0.5)
                    panel.add_patch(patches.Rectangle(box, 1, 1, color="#ffb3b3"))
                colour = COLOURS[data.TOKEN_CLASSES[label]]
                panel.text(
                    column, row, character, color=colour, family="monospace",
                    fontsize=8, ha="center", va="center",
                )  # fmt: skip
                place += 1
            place += 1
        wrong = int((labels != truth).sum())
        panel.set(xlim=(-1, width), ylim=(height, -1), title=f"{title}: {wrong} wrong")
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def excerpt(files: list[tuple[str, str]], length: int) -> str:
    """Picks the excerpt of whole lines with the most kinds of tokens."""

    def variety(source: str) -> float:
        labels = data.python_token_classes(source)
        shares = np.bincount(labels, minlength=len(data.TOKEN_CLASSES)) / len(labels)
        shares = shares[shares > 0]
        return float(-(shares * np.log(shares)).sum())

    def begin(source: str) -> str:
        # From the first definition on, so that what is shown parses as it is.
        start = max(source.find("\nclass "), source.find("\ndef "), 0)
        text = source[start:].lstrip("\n")
        lines = [line for line in text.split("\n")[:40] if len(line) <= 80]
        return "\n".join(lines[:24])[:length]

    best = ""
    for _, source in files:
        text = begin(source)
        try:
            if len(text) > length // 2 and (not best or variety(text) > variety(best)):
                best = text
        except ValueError:
            continue  # it ends within a string
    return best or files[0][1]


def main(config: Config) -> dict:
    """Trains both networks, scores them, and draws their labels of an excerpt."""
    if config.data is not None:
        raise ValueError(
            "highlight: takes no --data; its labels come from the standard library"
        )
    workdir = train.Workdir(config, experiment="highlight")
    if workdir.result is not None:
        return workdir.result
    print(train.describe(config))
    files = data.python_sources(limit=config.corpus)
    split = data.split_files(files, (0.8, 0.1, 0.1))
    vocabulary = data.Vocabulary.from_text("".join(source for _, source in files))
    parts = [windows(part, vocabulary, config.length) for part in split]
    valid = [np.arange(config.length) < part["lengths"][:, None] for part in parts]
    pairs = [
        (part["chars"][mask], part["classes"][mask])
        for part, mask in zip(parts, valid, strict=True)
    ]
    floor = data.majority_by_symbol(*pairs[0], *pairs[2])
    print(f"floor: the most frequent class of each character is right in {floor:.2%}")

    models = make_models(config, len(vocabulary))
    results, labels = {}, {}
    shown = excerpt(split[2], 1_500)
    truth = data.python_token_classes(shown)
    for name, model in models.items():
        params, results[name] = fit_one(config, workdir, name, model, parts)
        logits, _ = model.apply(params, jnp.asarray(vocabulary.encode(shown))[None])
        labels[name] = np.asarray(logits[0].argmax(-1))
    render(workdir.plots / "highlighted.png", shown, labels, truth)

    both, forward = results["BiLSTM"], results["LSTM"]
    print(
        f"accuracy on {pairs[2][0].size:,} characters of unseen files: BiLSTM "
        f"{both:.2%}, LSTM {forward:.2%}, floor {floor:.2%}; the BiLSTM makes "
        f"{(1 - both) / (1 - forward):.2f} of the LSTM's errors"
    )
    return workdir.write_result(
        metric="accuracy per character on test files",
        value=both,
        floor=floor,
        floor_name="most frequent class of the character",
        lower_is_better=False,
        test_evaluations=1,
        others={"LSTM of as many parameters": forward},
        error_ratio=(1 - both) / (1 - forward),
        parameters={name: count(model) for name, model in models.items()},
        test_characters=int(pairs[2][0].size),
    )


if __name__ == "__main__":
    train.run(main, PRESETS)
