"""Programs for any number of rows and steps, and files of them."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flatbuffers")

import jlstm
from jlstm import export
from jlstm.weights import name_leaves

KEY = jax.random.key(0)
XS, TOKENS = jnp.ones((1, 1, 3)), jnp.ones((1, 1), jnp.int32)


def made(layer: Any, xs: Any = XS) -> Any:
    """Params of a layer, by NumPy, since to compile each init takes longer."""
    rng = np.random.default_rng(0)
    types = jax.eval_shape(layer.init, KEY, xs)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype), types
    )


def inputs(like: Any, batch: int, time: int) -> Any:
    rng, shape = np.random.default_rng(batch), (batch, time, *like.shape[2:])
    if like.dtype == jnp.int32:
        return jnp.asarray(rng.integers(0, 9, shape), jnp.int32)
    return jnp.asarray(rng.normal(size=shape), like.dtype)


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "program.jax"


CLASSIFIER = jlstm.Classifier(
    jlstm.stack(jlstm.Embed(9, 3), jlstm.bidirectional(jlstm.LSTM(2))), 2
)
STREAM = jlstm.stack(
    jlstm.Embed(9, 3),
    jlstm.Conv(3, width=3, padding="CAUSAL"),
    jlstm.RNN(jlstm.LSTM(2, learned_carry=True), checkpoint_every="sqrt"),
    jlstm.Residual(jlstm.RNN(jlstm.Elman(2, activation=jax.nn.relu))),
    jlstm.Dropout(0.5),
    jlstm.LayerNorm(),
)
HALF = jlstm.RNN(
    jlstm.GRU(2), policy=jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
)


def test_sequence_is_a_program_for_any_batch_and_time(path):
    params = made(CLASSIFIER, TOKENS)
    export.save(path, export.sequence(CLASSIFIER, params, TOKENS))
    program = export.load(path)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "jlstm_" not in program.mlir_module()
    for batch, time in ((1, 1), (3, 7)):
        xs = inputs(TOKENS, batch, time)
        lengths = jnp.asarray([time, 0, 2][:batch], jnp.int32)
        logits, carry = program.call(xs, lengths)
        expected, after = CLASSIFIER.apply(params, xs, lengths=lengths)
        close(logits, expected)
        close(carry, name_leaves(after))


@pytest.mark.parametrize(
    ("layer", "xs"),
    [(STREAM, TOKENS), pytest.param(HALF, XS, marks=pytest.mark.slow)],
    ids=str,
)
def test_step_goes_on_from_a_sequence(path, layer, xs):
    params, tolerance = made(layer, xs), 0.02 if layer is HALF else 1e-5
    sequence = export.sequence(layer, params, xs)
    export.save(path, export.step(layer, params, xs))
    step = jax.jit(export.load(path).call)
    for batch in (1, 2):
        xs = inputs(xs, batch, 5)
        whole, end = sequence.call(xs, jnp.full(batch, 5, jnp.int32))
        close(whole, layer.apply(params, xs)[0], tolerance)
        _, carry = sequence.call(xs, jnp.full(batch, 2, jnp.int32))
        for t in range(2, 5):
            carry, y = step(carry, xs[:, t], jnp.zeros(batch, bool))
            close(y, whole[:, t])
        close(carry, end)
    # Rows that begin anew, whatever their carry is.
    anything = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), carry)
    carry, y = step(anything, xs[:, 0], jnp.ones(2, bool))
    close(y, whole[:, 0])
    _, fresh = sequence.call(xs, jnp.zeros(2, jnp.int32))
    close(step(fresh, xs[:, 0], jnp.zeros(2, bool)), (carry, y))


def test_sequence_takes_a_bound_of_its_time():
    layer = jlstm.Conv(2, width=3, padding="VALID")
    params = made(layer)
    message = "behaves differently for few rows or steps (Symbolic dimension compar"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export.sequence(layer, params, XS)
    assert len(str(caught.value).splitlines()) == 1
    program = export.sequence(layer, params, XS, constraints=["time >= 3"])
    xs, lengths = inputs(XS, 2, 4), jnp.array([4, 3], jnp.int32)
    expected, _ = layer.apply(params, xs, lengths=lengths)
    close(program.call(xs, lengths)[0], expected)


@dataclasses.dataclass(frozen=True)
class Own:
    """A layer that makes a recurrence where nothing can look."""

    implementation: str | None = None

    @property
    def inner(self) -> Any:
        cell = jlstm.LSTM(2)
        return jlstm.RNN(cell, implementation=self.implementation)

    def init(self, key, xs):
        return self.inner.init(key, xs)

    def init_carry(self, params, batch_shape):
        return self.inner.init_carry(params, batch_shape)

    def apply(self, params, xs, carry=None, **masking):
        return self.inner.apply(params, xs, carry, **masking)


def test_sequence_runs_no_loop_for_sizes_that_are_numbers():
    params = made(Own())
    program = export.sequence(Own(), params, XS)
    xs = inputs(XS, 2, 3)
    lengths = jnp.array([3, 2], jnp.int32)
    close(program.call(xs, lengths)[0], Own().apply(params, xs, lengths=lengths)[0])
    with pytest.raises(NotImplementedError, match="fused: needs fixed sizes"):
        export.sequence(Own("fused"), params, XS)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Twice(Own):
    """A layer whose outputs are of a class."""

    def apply(self, params, xs, carry=None, **masking):
        ys, carry = super().apply(params, xs, carry, **masking)
        return Pair(ys, ys), carry


@dataclasses.dataclass(frozen=True)
class Calls(Own):
    """A layer that calls another library."""

    def apply(self, params, xs, carry=None, **masking):
        ys, carry = super().apply(params, xs, carry, **masking)
        made = jax.ffi.ffi_call("of_another", jax.ShapeDtypeStruct((2,), ys.dtype))()
        return ys + made.reshape(1, 1, 2), carry


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: export.step(jlstm.bidirectional(jlstm.Elman(2)), {}, XS),
            ValueError,
            "export.step: needs a causal layer, got bidirectional(Elman(2), implementa",
        ),
        (
            lambda: export.step(model := jlstm.Classifier(Own(), 2), made(model), XS),
            ValueError,
            "export.step: needs a layer with one output for each step, got Classifier(",
        ),
        (
            lambda: export.sequence(jlstm.LSTM(2), {}, XS),  # type: ignore
            TypeError,
            "export.sequence: must be a layer, got the cell LSTM(2); wrap it",
        ),
        (
            lambda: export.sequence(jlstm.Dense(2), {}, jnp.ones(3)),
            ValueError,
            "export.sequence: xs must be [B, T, ...], got shape [3]",
        ),
        (
            lambda: export.sequence(jlstm.Dense(2), {}, XS, platforms=["gpu"]),
            ValueError,
            "export.sequence: platforms must be among cpu, cuda, tpu, rocm, got ['gp",
        ),
        (
            lambda: export.sequence(jlstm.Dense(2), {}, XS, platforms="cpu"),
            ValueError,
            "export.sequence: platforms must be among cpu, cuda, tpu, rocm, got 'cpu",
        ),
        (
            lambda: export.sequence(Calls(), made(Own()), XS, platforms=["cpu"]),
            ValueError,
            "export.sequence: Calls(implementation=None) calls code that cannot be",
        ),
    ],
)
def test_export_refuses(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


# Files.


@pytest.fixture
def saved(path: Path) -> Path:
    layer = jlstm.Dense(2)
    export.save(path, export.sequence(layer, made(layer), XS))
    return path


def test_programs_are_read_without_this_library(saved):
    program = jax.export.deserialize(bytearray(saved.read_bytes()))
    xs, lengths = inputs(XS, 2, 3), jnp.array([3, 1], jnp.int32)
    close(program.call(xs, lengths), export.load(saved).call(xs, lengths))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_programs_of_other_bytes_are_refused(saved):
    good = saved.read_bytes()
    for place in range(0, len(good), 97):
        bad = bytearray(good)
        bad[place] ^= 1
        saved.write_bytes(bad)
        refused(saved, "has changed since it was|is not a valid file of")
        saved.write_bytes(good[:place])
        refused(saved, "has changed since it was|is not a valid file of")


def test_programs_that_jax_cannot_read_are_refused(saved):
    data = b"no program at all"
    saved.write_bytes(data + export.MARK + export._hash(data))
    refused(saved, rf"JAX {re.escape(jax.__version__)} cannot read .*; export the laye")
    with pytest.raises(FileNotFoundError, match=r"export\.load: there is no file at"):
        export.load(saved.with_name("none"))


def test_programs_with_outputs_of_a_class_cannot_be_written(path):
    program = export.sequence(Twice(), made(Own()), XS)
    with pytest.raises(
        ValueError, match=r"export\.save: the program cannot be written"
    ):
        export.save(path, program)
    assert not path.exists()


def test_programs_say_how_to_install_flatbuffers(saved, monkeypatch):
    program = export.load(saved)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (lambda: export.load(saved), lambda: export.save(saved, program)):
        with pytest.raises(ImportError, match=r'run pip install "jlstm\[export\]"'):
            call()
