"""Weights come back bit by bit, or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

library = pytest.importorskip("safetensors.numpy")

from jlstm.weights import load_weights, save_weights  # noqa: E402

TREE = {"b": jnp.arange(4.0), "w": jnp.arange(6.0).reshape(2, 3)}
DTYPES = [
    "bool", "bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2",
    "int8", "int16", "int32", "uint8", "uint16", "uint32",
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def file_of(head: Any, body: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + body


def equal(left: Any, right: Any) -> None:
    """Asserts that two trees are the same, bits and types."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(a, jax.Array)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# Round trips.


def test_weights_of_all_dtypes_and_shapes_come_back(path):
    def make(dtype: str, shape: tuple[int, ...]) -> jax.Array:
        noise = jax.random.normal(jax.random.key(0), shape) * 3
        return noise.astype(dtype)

    shapes = [(), (0, 3), (5,), (2, 3, 4)]
    tree = {dtype: [make(dtype, shape) for shape in shapes] for dtype in DTYPES}
    tree["complex64"] = [jnp.array([1 + 2j])]
    save_weights(path, tree)
    equal(load_weights(path, tree), tree)
    equal(load_weights(path, jax.eval_shape(lambda: tree)), tree)


def test_weights_keep_what_is_no_number(path):
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32)
    tree = {"w": jnp.asarray(bits.view(np.float32))}
    save_weights(path, tree)
    equal(load_weights(path, tree), tree)


def test_weights_of_64_bits_need_them_enabled(path):
    with jax.enable_x64(True):
        tree = {"i": jnp.arange(3), "w": jnp.ones(2)}
        save_weights(path, tree)
        equal(load_weights(path, tree), tree)
        like = jax.tree.map(np.asarray, tree)
    with pytest.raises(ValueError, match=r"i in .* is int64\[3\].*jax_enable_x64"):
        load_weights(path, like)


def test_weights_are_named_by_their_paths(path):
    tree = {"layers": [{"w": jnp.ones(2)}], "key": (jnp.zeros(1),)}
    save_weights(path, tree)
    assert set(header(path)) == {"__metadata__", "layers/0/w", "key/0"}
    equal(load_weights(path, tree), tree)
    save_weights(path, jnp.ones(2))
    equal(load_weights(path, jnp.zeros(2)), jnp.ones(2))


def test_weights_of_any_layout_are_written_by_rows(path):
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"turned": square.T, "cut": square[:, ::2], "big": square.astype(">f4")}
    save_weights(path, tree)
    found = load_weights(path, tree)
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array)


def test_weights_are_read_by_the_library_itself(path):
    save_weights(path, TREE, metadata={"model": "tagger"})
    found = library.load_file(path)
    np.testing.assert_array_equal(found["w"], TREE["w"])
    about = header(path)["__metadata__"]
    assert about["model"] == "tagger"
    assert about["format"] == "jlstm"
    # The hash is part of the format: a change of it makes old files unreadable.
    assert about["sha256"] == (
        "9d77e4fb42217777c20a0b22e4cf64ca7503d88ba2b1a1cd8c945963a8db05fb"
    )


def test_weights_replace_a_file_at_once(path, monkeypatch):
    save_weights(path, {"w": jnp.ones(2)})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_weights(path, TREE)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    save_weights(path, TREE)
    equal(load_weights(path, TREE), TREE)
    assert os.listdir(path.parent) == [path.name]


def test_weights_make_folders(tmp_path):
    save_weights(tmp_path / "a" / "b" / "w", TREE)
    equal(load_weights(tmp_path / "a" / "b" / "w", TREE), TREE)


def test_weights_begin_as_a_pickle_may(path):
    for length in range(300):
        save_weights(path, TREE, metadata={"note": "x" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes().startswith(b"\x80")
    equal(load_weights(path, TREE), TREE)


# What cannot be saved.


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "the tree has no leaves"),
        ({"a/b": 1, "a": {"b": 2}}, "2 leaves have only 1 different"),
        ({"__metadata__": 1}, "cannot be called __metadata__"),
        ({"w": jax.random.key(0)}, "w is key<fry>.*a key with jax.random.key_data"),
        ({"w": jnp.ones(2, "int4")}, "w is int4, which a .safetensors file cannot"),
        ({"w": np.ones(2, complex)}, "w is complex128, which a .safetensors"),
        ({"w": np.array(["x"])}, "w is str"),
    ],
    ids=str,
)
def test_weights_refuse_trees(path, tree, message):
    with pytest.raises(ValueError, match=f"save_weights: .*{message}"):
        save_weights(path, tree)
    assert not path.exists()
    save_weights(path, TREE)
    with pytest.raises(ValueError, match=f"load_weights: .*{message}"):
        load_weights(path, tree)


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {1: "a"}, {"sha256": "0"}, {"format": "pt"}]
)
def test_weights_refuse_metadata(path, metadata):
    with pytest.raises(ValueError, match="metadata must map strings to strings"):
        save_weights(path, TREE, metadata=metadata)
    assert not path.exists()


# Other files.


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**TREE, "more": jnp.ones(2)}, "more in .*: expected float32[2], got no such"),
        ({"w": TREE["w"]}, "b in .*: expected no such tensor, got float32[4]"),
        (
            {**TREE, "w": jnp.ones((3, 2))},
            "w in .*: expected float32[3,2], got float32[2,3]",
        ),
        (
            {**TREE, "w": TREE["w"].astype("bfloat16")},
            "w in .*: expected bfloat16[2,3], got float32[2,3]",
        ),
        ({**TREE, "b": jnp.ones((4, 1))}, "b in .*: expected float32[4,1]"),
    ],
)
def test_weights_refuse_another_structure(path, like, message):
    save_weights(path, TREE)
    message = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(ValueError, match=message):
        load_weights(path, like)


def test_weights_of_unknown_types_are_named(path):
    head = {"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    path.write_bytes(file_of(head, bytes(2)))
    with pytest.raises(ValueError, match=r"got F8_E8M0\[2\]"):
        load_weights(path, {"w": jnp.ones(2)}, require_hash=False)


def test_weights_of_others_need_trust(path):
    arrays = {name: np.asarray(array) for name, array in TREE.items()}
    for metadata in (None, {"format": "pt"}):
        library.save_file(arrays, path, metadata=metadata)
        with pytest.raises(ValueError, match="require_hash=False"):
            load_weights(path, TREE)
        equal(load_weights(path, TREE, require_hash=False), TREE)


@pytest.mark.parametrize("require_hash", [True, False])
def test_weights_of_other_bytes_are_refused(path, require_hash):
    save_weights(path, TREE)
    good = path.read_bytes()
    for place in (-1, -17, -40):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="have changed since they were written"):
            load_weights(path, TREE, require_hash=require_hash)
    # Two tensors that change places keep all bytes.
    same = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    save_weights(path, same)
    raw = path.read_bytes().replace(b'"a":', b'"c":')
    path.write_bytes(raw.replace(b'"b":', b'"a":').replace(b'"c":', b'"b":'))
    with pytest.raises(ValueError, match="have changed since they were written"):
        load_weights(path, same, require_hash=require_hash)


class Code:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


def torch_like() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Code()))
    return buffer.getvalue()


def tensor(*offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": list(offsets)}


GOOD = file_of({"a": tensor(0, 8), "b": tensor(8, 16)}, bytes(16))
MALFORMED = {
    "empty": b"",
    "cut length": GOOD[:5],
    "cut header": GOOD[:30],
    "cut body": GOOD[:-1],
    "trailing bytes": GOOD + b"x",
    "huge length": (1 << 63).to_bytes(8, "little") + GOOD[8:],
    "long length": (len(GOOD) - 7).to_bytes(8, "little") + GOOD[8:],
    "overlap": file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "hole": file_of({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "outside": file_of({"a": tensor(0, 8), "b": tensor(8, 16)}, bytes(12)),
    "reversed": file_of({"a": tensor(8, 0)}, bytes(8)),
    "negative": file_of({"a": tensor(-8, 0)}, bytes(8)),
    "wrong size": file_of({"a": {**tensor(0, 8), "shape": [3]}}, bytes(8)),
    "overflow": file_of({"a": {**tensor(0, 8), "shape": [1 << 62] * 3}}, bytes(8)),
    "dtype": file_of({"a": {**tensor(0, 8), "dtype": "object"}}, bytes(8)),
    "no JSON": file_of(b"{'a': 1}", b""),
    "a list": file_of([1], b""),
    "no UTF-8": file_of(b'{"\xff": 1}', b""),
    "nested": file_of(b'{"a":' + b"[" * 100_000, b""),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}', b""),
    "metadata of numbers": file_of({"__metadata__": {"sha256": 1}}, b""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_weights_refuse_malformed_files(path, name):
    path.write_bytes(MALFORMED[name])
    like = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(
        ValueError, match=r"is not a valid \.safetensors file"
    ) as caught:
        load_weights(path, like, require_hash=False)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_a_well_formed_file_are_the_control(path):
    path.write_bytes(GOOD)
    like = {"a": jnp.ones(2), "b": jnp.ones(2)}
    equal(
        load_weights(path, like, require_hash=False), jax.tree.map(jnp.zeros_like, like)
    )


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_weights_refuse_pickles(path, protocol):
    path.write_bytes(pickle.dumps(Code(), protocol))
    with pytest.raises(ValueError, match="a pickle, which could run any code"):
        load_weights(path, TREE, require_hash=False)


def test_weights_refuse_what_torch_writes(path):
    path.write_bytes(torch_like())
    with pytest.raises(ValueError, match=r"a zip archive, as torch\.save"):
        load_weights(path, TREE, require_hash=False)


def test_weights_name_what_is_missing(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="load_weights: there is no file"):
            load_weights(path, TREE)


def test_weights_say_how_to_install_safetensors():
    code = (
        "import sys\n"
        "sys.modules['safetensors'] = None\n"
        "from jlstm.weights import load_weights, save_weights\n"
        "for call in (save_weights, load_weights):\n"
        "    try:\n"
        "        call('x', {'w': 1})\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f'{name}: safetensors is not installed; run pip install "jlstm[weights]"'
        for name in ("save_weights", "load_weights")
    ]
