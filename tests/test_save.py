"""A layer and its params come back as they were, or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CELLS
from flax import struct

library = pytest.importorskip("safetensors.numpy")

import jlstm  # noqa: E402
from jlstm import weights  # noqa: E402
from jlstm.saved import names  # noqa: E402
from jlstm.saved.layer import _hash  # noqa: E402

KEY = jax.random.key(0)
XS, TOKENS = jnp.ones((2, 3, 4)), jnp.ones((2, 3), jnp.int32)


def made(layer: Any, xs: Any = XS) -> Any:
    """Params of a layer, by NumPy, since to compile each init takes longer."""
    rng = np.random.default_rng(0)
    types = jax.eval_shape(layer.init, KEY, xs)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), types)


def equal(left: Any, right: Any) -> None:
    """Asserts that two trees are the same, bits and types."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "layer.safetensors"


# What a user defines.


class Pair(NamedTuple):
    left: Any
    right: Any = None


@struct.dataclass
class Table:
    w: Any
    rows: int = struct.field(pytree_node=False, default=3)


def double(x: Any) -> Any:
    return x + x


@dataclasses.dataclass(frozen=True)
class Own:
    """A layer with params of any structure."""

    size: int = 2
    activation: Any = double
    causal = False

    def init(self, key, xs):
        return {
            "none": None,
            "pair": Pair(jnp.ones(2, jnp.bfloat16), [jnp.zeros((), jnp.float16)]),
            "table": Table(jnp.arange(3), rows=7),
            "by int": {1: (), 0: (jnp.array([True]), None)},
        }

    def init_carry(self, params, batch_shape):
        return ()

    def apply(self, params, xs, carry=None, **masking):
        return self.activation(xs), ()


# Round trips.


def test_save_keeps_a_classifier_that_reads_both_ways(path):
    encoder = jlstm.stack(jlstm.Embed(9, 4), jlstm.bidirectional(jlstm.LSTM(3)))
    model = jlstm.Classifier(encoder, num_classes=2)
    params = model.init(KEY, TOKENS)
    jlstm.save(path, model, params)
    again, loaded = jlstm.load(path)
    assert again == model
    assert repr(again) == repr(model)
    equal(loaded, params)
    lengths = jnp.array([3, 1])
    expected, _ = model.apply(params, TOKENS, lengths=lengths)
    got, _ = again.apply(loaded, TOKENS, lengths=lengths)
    np.testing.assert_array_equal(got, expected)
    assert jlstm.load(path, model)[0] is model
    equal(jlstm.load(path, model)[1], params)
    equal(jlstm.train.load_weights(path, params), params)


LAYERS = [
    jlstm.stack(*[jlstm.RNN(cell) for cell in CELLS]),
    jlstm.RNN(
        jlstm.LSTM(3, forget_bias=jlstm.init.Chrono(9)),
        reverse=True,
        policy=jlstm.Policy(param=jnp.bfloat16, carry=jnp.float32),
        checkpoint_every="sqrt",
        implementation="scan",
    ),
    jlstm.bidirectional(jlstm.LSTM(2), jlstm.GRU(2), merge="sum"),
    jlstm.stack(
        jlstm.Conv(3, width=2, padding="CAUSAL", activation=jax.nn.silu),
        jlstm.Dropout(0.5, shared_over_time=True),
        jlstm.Residual(jlstm.Dense(3, jax.nn.gelu, w_init=jlstm.init.Normal(0.1))),
        jlstm.stack(jlstm.LayerNorm(epsilon=1e-3, shift=False)),
        jlstm.RNN(jlstm.Elman(2, activation=jnp.sin)),
        jlstm.Dense(2, jlstm.tanh, bias=False),
    ),
    jlstm.Tagger(jlstm.RNN(jlstm.GRU(2)), num_tags=3),
]
MODELS = [
    jlstm.LanguageModel(jlstm.RNN(jlstm.LSTM(4)), 9, embed_size=4, tied=True),
    jlstm.Embed(9, 4, frozen=True, dtype=jnp.bfloat16),
]


@pytest.mark.parametrize("layer", [*LAYERS, *MODELS], ids=str)
def test_save_keeps_layers(path, layer):
    params = made(layer, TOKENS if layer in MODELS else XS)
    jlstm.save(path, layer, params)
    again, loaded = jlstm.load(path)
    assert again == layer
    assert hash(again) == hash(layer)
    equal(loaded, params)


def test_save_knows_every_config_and_initialiser():
    exported = {getattr(jlstm, name) for name in jlstm.__all__}
    configs = {c for c in exported if hasattr(c, "init_carry")}
    configs -= {jlstm.Cell, jlstm.Layer}
    assert configs | {jlstm.Policy, jlstm.init.Normal} <= set(names.configs().values())
    assert {jlstm.init.orthogonal, jlstm.tanh} <= set(names.functions().values())
    for name, cls in [*names.configs().items(), *names.functions().items()]:
        module, _, last = name.rpartition(".")
        assert getattr(sys.modules[module], last) is cls


def test_save_keeps_numbers_that_json_lacks(path):
    layer = jlstm.RNN(jlstm.LSTM(2, forget_bias=float("inf")))
    jlstm.save(path, layer, made(layer))
    assert jlstm.load(path)[0] == layer
    scaled = jlstm.Dropout(np.float32(0.1))  # type: ignore
    jlstm.save(path, scaled, made(scaled))
    assert jlstm.load(path)[0] == scaled


def test_save_keeps_params_of_any_structure(path):
    layer = Own()
    params = layer.init(KEY, XS)
    jlstm.save(path, layer, params)
    again, loaded = jlstm.load(path, Own())
    assert again == layer
    equal(loaded, params)
    assert loaded["table"].rows == 7
    inside = jlstm.stack(jlstm.Dense(2), layer)
    jlstm.save(path, inside, (made(jlstm.Dense(2)), params))
    equal(jlstm.load(path, inside)[1][1], params)


def test_save_keeps_a_layer_without_params(path):
    jlstm.save(path, jlstm.Dropout(0.5), ())
    assert jlstm.load(path) == (jlstm.Dropout(0.5), ())


def test_save_leaves_pretrained_vectors_out(path):
    vectors = np.ones((9, 4), np.float32)
    layer = jlstm.Embed(9, 4, table_init=jlstm.init.Pretrained(vectors))
    params = layer.init(KEY, TOKENS)
    jlstm.save(path, layer, params)
    again, loaded = jlstm.load(path)
    assert (again, repr(again)) == (layer, repr(layer))
    equal(loaded, params)
    with pytest.raises(ValueError, match="from a file, which does not hold the array"):
        again.init(KEY, TOKENS)
    jlstm.load(path, layer)
    other = jlstm.Embed(9, 4, table_init=jlstm.init.Pretrained(vectors + 1))
    with pytest.raises(ValueError, match=r"layer\.table_init\.sha256: '"):
        jlstm.load(path, other)


def test_save_replaces_a_file_at_once(path, monkeypatch):
    layer = jlstm.Dense(2)
    params = made(layer)
    jlstm.save(path, layer, params)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            jlstm.save(path, jlstm.Dense(3), made(jlstm.Dense(3)))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# What cannot be saved.


class Odd:
    def __init__(self, w):
        self.w = w


jax.tree_util.register_pytree_node(
    Odd, lambda odd: ((odd.w,), None), lambda _, w: Odd(*w)
)
DENSE = made(jlstm.Dense(2))
REFUSED = [
    (jlstm.LSTM(2), {}, TypeError, "save.layer: must be a layer, got the cell LSTM(2)"),
    (jlstm.Dense, DENSE, TypeError, "save.layer: must be a layer, got the class Dense"),
    (
        jlstm.RNN(jlstm.LSTM(2)),
        DENSE,
        ValueError,
        "save: the params are not those of RNN(LSTM(2)) (AttributeError: ",
    ),
    (
        Own(),
        {"a": {"key": KEY}},
        ValueError,
        "save: a/key is key<fry>, which a .safetensors file cannot hold; leave it",
    ),
    (
        Own(),
        [Odd(jnp.ones(2))],
        ValueError,
        "save: params.0 must be a dict with keys of strings or ints, a list, a tuple, "
        "a NamedTuple or a dataclass, got a Odd",
    ),
    (
        Own(size=(lambda: 0,)),  # type: ignore
        {},
        ValueError,
        "save: layer.size[0] must be a module-level function, got <lambda>; define it",
    ),
    (
        Own(size=[1]),  # type: ignore
        {},
        ValueError,
        "save: layer.size must be a number, a string, a tuple, a frozen dataclass or a "
        "module-level function, got a list",
    ),
]


@pytest.mark.parametrize(("layer", "params", "kind", "message"), REFUSED)
def test_save_refuses(path, layer, params, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        jlstm.save(path, layer, params)
    assert not path.exists()


def test_save_says_how_to_install_safetensors(path, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: jlstm.save(path, jlstm.Dense(2), DENSE),
        lambda: jlstm.load(path),
    ):
        with pytest.raises(ImportError, match=r'run pip install "jlstm\[weights\]"'):
            call()


# Another layer.


def test_load_compares_the_layer_field_by_field(path):
    layer = jlstm.stack(jlstm.Dense(2, jax.nn.relu), jlstm.RNN(jlstm.LSTM(3)))
    jlstm.save(path, layer, made(layer))
    other = jlstm.stack(jlstm.Dense(4), jlstm.RNN(jlstm.GRU(3), reverse=True))
    with pytest.raises(ValueError, match="was saved with another layer") as caught:
        jlstm.load(path, other)
    assert str(caught.value).splitlines()[1:] == [
        "  layer.layers[0].size: 2 in the file, 4 in the layer given",
        "  layer.layers[0].activation: 'jax.nn.relu' in the file, None in the layer "
        "given".replace("'", ""),
        "  layer.layers[1].cell: jlstm.cells.LSTM in the file, jlstm.cells.GRU in the "
        "layer given",
        "  layer.layers[1].reverse: False in the file, True in the layer given",
    ]
    with pytest.raises(
        ValueError, match="layers: a tuple of 2 in the file, a tuple of"
    ):
        jlstm.load(path, jlstm.stack(*other.layers, jlstm.Dense(2)))
    with pytest.raises(ValueError, match=r"layer: jlstm\.layers\.Stack in the file, "):
        jlstm.load(path, jlstm.Dense(2))


def test_load_lets_a_layer_be_computed_in_another_way(path):
    layer = jlstm.RNN(jlstm.LSTM(3), checkpoint_every=2)
    jlstm.save(path, layer, made(layer))
    other = jlstm.RNN(jlstm.LSTM(3), implementation="scan")
    assert jlstm.load(path, other)[0] is other


def test_load_compares_what_a_user_defined(path):
    layer = Own()
    params = layer.init(KEY, XS)
    jlstm.save(path, layer, params)
    with pytest.raises(ValueError, match="size: 2 in the file, 3 in the layer given"):
        jlstm.load(path, Own(size=3))
    with pytest.raises(
        ValueError, match=r"activation: double in the file, jax\.nn\.re"
    ):
        jlstm.load(path, Own(activation=jax.nn.relu))
    with pytest.raises(
        ValueError,
        match=r"load: layer in .* is of the class test_save\.Own, which load does not "
        r"know; give the layer: load\(path, layer\)",
    ):
        jlstm.load(path)
    own = jlstm.Dense(2, activation=double)
    jlstm.save(path, own, made(own))
    with pytest.raises(ValueError, match=r"of the function test_save\.double, which"):
        jlstm.load(path)
    equal(jlstm.load(path, own)[1], made(own))


def test_load_needs_the_class_of_params_beside_the_layer(path):
    class Local(NamedTuple):
        w: Any

    jlstm.save(path, jlstm.Dropout(0.5), {"a": Local(jnp.ones(2))})
    for layer in (None, jlstm.Dropout(0.5)):
        with pytest.raises(
            ValueError, match=r"load: params\.a in .* is of the class .*\.Local, which"
        ):
            jlstm.load(path, layer)
    equal(
        jlstm.train.load_weights(path, {"a": Local(jnp.zeros(2))}),
        {"a": Local(jnp.ones(2))},
    )


def test_load_gives_fields_of_later_versions_their_defaults(path):
    layer = jlstm.Dense(2)
    rewrite(
        path, layer, made(layer), lambda about: about["layer"]["fields"].pop("bias")
    )
    assert jlstm.load(path)[0] == layer
    assert jlstm.load(path, layer)[0] == layer
    with pytest.raises(ValueError, match="bias: no such field in the file, False in"):
        jlstm.load(path, jlstm.Dense(2, bias=False))
    rewrite(path, layer, made(layer), lambda about: about["params"]["fields"].pop("b"))
    with pytest.raises(
        ValueError, match=r"params in .* has the fields w, expected w, b"
    ):
        jlstm.load(path)


# Bad files.


def rewrite(path: Path, layer: Any, params: Any, change: Any) -> None:
    """Saves a layer, with a change of what is said of it, and the hash that fits."""
    jlstm.save(path, layer, params)
    file = weights.read("test", path)
    about = json.loads(file.about["layer"])
    change(about)
    forge(path, json.dumps(about))


def forge(path: Path, text: str) -> None:
    file = weights.read("test", path)
    arrays = library.load(path.read_bytes())
    digest = _hash(file.about["sha256"], text)
    about = {**file.about, "layer": text, "layer_sha256": digest}
    path.write_bytes(library.save(arrays, metadata=about))


@pytest.fixture
def saved(path: Path) -> Path:
    jlstm.save(path, jlstm.Dense(2, bias=False), made(jlstm.Dense(2, bias=False)))
    return path


def refused(path: Path, message: str, layer: Any = None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        jlstm.load(path, layer)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("load: ")


def test_load_notices_every_byte(saved):
    good = saved.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        saved.write_bytes(bad)
        refused(saved, "^load: ")


def test_load_notices_a_file_that_was_cut(saved):
    good = saved.read_bytes()
    for length in [*range(0, len(good), 37), len(good) - 1]:
        saved.write_bytes(good[:length])
        refused(saved, r"is not a valid \.safetensors file")


def test_load_refuses_other_files(path):
    path.write_bytes(pickle.dumps({"w": np.ones(2)}))
    refused(path, "a pickle, which could run any code and is never read")
    jlstm.train.save_weights(path, {"w": jnp.ones(2)})
    refused(path, r"holds no layer, only tensors; read them with")
    with pytest.raises(FileNotFoundError, match="load: there is no file at"):
        jlstm.load(path.parent / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("w"), r"w in .*: expected float32\[4,2\], got no such tensor"),
        (
            lambda a: a.update(more=a["w"]),
            "more in .*: expected no such tensor, got fl",
        ),
        (
            lambda a: a.update(w=a["w"].T),
            r"expected float32\[4,2\], got float32\[2,4\]",
        ),
        (
            lambda a: a.update(w=-a["w"]),
            "have changed since they were written: expected",
        ),
    ],
)
def test_load_names_a_tensor_that_does_not_fit(saved, change, message):
    about = weights.read("test", saved).about
    arrays = library.load(saved.read_bytes())
    change(arrays)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    saved.write_bytes(library.save(arrays, metadata=about))
    refused(saved, message)


def set_class(name: str, **more: Any) -> Any:
    return lambda about: about["layer"].update({"class": name, **more})


def set_field(name: str, value: Any) -> Any:
    return lambda about: about["layer"]["fields"].update({name: value})


def function(name: str, **more: Any) -> Any:
    return set_field("activation", {"function": name, **more})


UNKNOWN = [
    (set_class("jlstm.layers.Dens"), r"of the class jlstm\.layers\.Dens, which load"),
    (set_class("Popen", module="subprocess"), "of the class subprocess.Popen, which"),
    (
        set_class("jlstm.layers.DenseParams"),
        "of the class jlstm.layers.DenseParams, wh",
    ),
    (set_class("jlstm.layers.stack"), "of the class jlstm.layers.stack, which"),
    (
        function("system", module="os"),
        "activation in .* of the function os.system, whi",
    ),
    (function("os.system"), "activation in .* is of the function os.system, which"),
    (function("jax.nn.initializers.zeros"), "of the function jax.nn.initializers.zero"),
    (function("Tk", module="tkinter"), "of the function tkinter.Tk, which"),
]
INVALID = [
    (set_field("size", 0), r"layer in .* cannot be made: Dense\.size: must be a posit"),
    (
        set_field("activation", "relu"),
        "cannot be made: Dense.activation: must be a fun",
    ),
    (set_field("colour", 1), "cannot be made: .*unexpected keyword argument 'colour'"),
    (lambda about: about["layer"]["fields"].pop("size"), "cannot be made: .*'size'"),
    (set_field("size", {"float": "x"}), "is not described in the format"),
    (lambda about: about["layer"].update(fields=[1]), "is not described in the format"),
    (lambda about: about.update(version=2), r"is in version 2 of the format, but this"),
    (lambda about: about.pop("version"), "is not described in the format"),
    (lambda about: about.pop("params"), "is not described in the format"),
    (lambda about: about.update(layer={}), "is not described in the format"),
    (
        lambda about: about.update(params={"class": []}),
        "is not described in the format",
    ),
    (lambda about: about.update(params=3), "is not described in the format"),
    (
        lambda about: about["params"]["fields"]["w"].update(dtype="object"),
        "w is object, which a .safetensors file cannot hold",
    ),
]


@pytest.mark.parametrize(("change", "message"), UNKNOWN + INVALID)
def test_load_refuses_a_layer_that_it_does_not_know(path, change, message):
    before = set(sys.modules)
    rewrite(path, jlstm.Dense(2), made(jlstm.Dense(2)), change)
    refused(path, message)
    assert "tkinter" not in set(sys.modules) - before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'a': 1}", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "is not described in the format"),
        ("null", "is not described in the format"),
        (
            '{"version": 1, "layer": %s, "params": null}' % ("[" * 900 + "]" * 900),
            "is not described in the format|got",
        ),
    ],
    ids=range(6),
)
def test_load_refuses_metadata_that_describe_no_layer(saved, text, message):
    forge(saved, text)
    refused(saved, message)


def test_load_refuses_a_cell(path):
    change = lambda about: about.update(layer=about["layer"]["fields"]["cell"])  # noqa: E731
    layer = jlstm.RNN(jlstm.LSTM(2))
    rewrite(path, layer, made(layer), change)
    with pytest.raises(
        TypeError, match=r"load: must be a layer, got the cell LSTM\(2\)"
    ):
        jlstm.load(path)
