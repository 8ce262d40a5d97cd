"""Weights for others: one ``.safetensors`` file, which is data and runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.train.checkpoint import name_leaves, rebuild
from jlstm.train.files import part_of, sync
from jlstm.types import PyTree

# The format's names of dtypes, and NumPy's.
DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
LONG = ("float64", "int64", "uint64")


def save_weights(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a pytree of arrays to one ``.safetensors`` file, all or nothing.

    A tensor has the path of its leaf for a name, as ``forward/w_hh``. The file's
    metadata also get ``format``, which is ``jlstm``, and ``sha256``, a hash of all
    tensors. A file that is there is replaced.

    Args:
      path: of the file; folders are made.
      tree: the pytree, such as params; typed PRNG keys cannot be in it.
      metadata: more of it, such as the name of a model.

    Raises:
      ImportError: without safetensors.
      ValueError: the tree has no leaves, two of one name, or one of a dtype that the
        format lacks; metadata that are not strings.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/params.safetensors"
      >>> jlstm.train.save_weights(path, {"w": jnp.arange(3)})
      >>> jlstm.train.load_weights(path, {"w": jnp.zeros(3, int)})
      {'w': Array([0, 1, 2], dtype=int32)}
    """
    library, path = _library("save_weights"), Path(path).absolute()
    about = dict(metadata or {})
    texts = all(isinstance(text, str) for item in about.items() for text in item)
    if not texts or {"format", "sha256"} & set(about):
        raise ValueError(
            "save_weights: metadata must be strings by strings, without 'format' and "
            f"'sha256', got {about}"
        )
    arrays = {name: _plain(x) for name, x in _named("save_weights", tree).items()}
    about |= {"format": "jlstm", "sha256": _hash(arrays)}
    data = library.numpy.save(arrays, metadata=about)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = part_of(path)
    try:
        half.write_bytes(data)
        sync(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    sync(path.parent)


def load_weights(
    path: str | os.PathLike[str], like: PyTree, *, require_hash: bool = True
) -> PyTree:
    """Reads the pytree that :func:`save_weights` wrote, after all of it is checked.

    Args:
      path: of the file.
      like: a pytree of the same structure, shapes and dtypes; of arrays, or of
        ``jax.eval_shape``.
      require_hash: whether to refuse a file without the hash of its tensors, as other
        libraries write it. A hash that is there must always fit.

    Returns:
      The pytree of JAX arrays, of the structure of ``like``.

    Raises:
      FileNotFoundError: there is no file at ``path``.
      ImportError: without safetensors.
      ValueError: it is no whole ``.safetensors`` file, its tensors are not as they were
        written, or one is missing, unexpected, or of another shape or dtype; names the
        first.

    Example:
      See :func:`save_weights`.
    """
    library, path = _library("load_weights"), Path(path)
    expected = _named("load_weights", like)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights: there is no file at {path}")
    data = path.read_bytes()
    try:
        found = dict(library.deserialize(data))
    except library.SafetensorError as error:
        raise ValueError(
            f"load_weights: {path} is no whole .safetensors file: {error}{_hint(data)}"
        ) from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for name in [*expected, *sorted(found)]:
        want = got = "no such tensor"
        if name in expected:
            want = _type(expected[name].dtype.name, expected[name].shape)
        if name in found:
            dtype = str(found[name]["dtype"])
            got = _type(DTYPES.get(dtype, dtype), found[name]["shape"])
        if got != want:
            raise ValueError(
                f"load_weights: {name} in {path}: expected {want}, got {got}; give the "
                "structure that was saved"
            )
        if want.startswith(LONG) and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"load_weights: {name} in {path} is {got}, which JAX has only with "
                "jax_enable_x64; enable it"
            )
    arrays = {name: _view(found[name]) for name in expected}
    digest = (header.get("__metadata__") or {}).get("sha256")
    if digest is None and require_hash:
        raise ValueError(
            f"load_weights: {path} has no sha256 in its metadata, so its tensors "
            "cannot be checked; give require_hash=False if you trust it"
        )
    if digest is not None and digest != _hash(arrays):
        raise ValueError(
            f"load_weights: the tensors of {path} are not as they were written: "
            f"expected SHA-256 {digest}, got {_hash(arrays)}; get the file anew"
        )
    return rebuild(like, {name: jnp.array(x) for name, x in arrays.items()})


def _library(where: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'{where}: safetensors is not installed; run pip install "jlstm[weights]"'
        ) from error
    return safetensors


def _named(where: str, tree: PyTree) -> dict[str, Any]:
    """Names the leaves, of which all can be in a file, and none twice."""
    leaves = name_leaves(tree, where)
    if not leaves:
        raise ValueError(f"{where}: the tree has no leaves")
    for name, leaf in leaves.items():
        if name == "__metadata__":
            raise ValueError(f"{where}: a leaf cannot be called {name}; rename it")
        if leaf.dtype.name not in DTYPES.values():
            raise ValueError(
                f"{where}: {name} is {leaf.dtype.name}, which no .safetensors file "
                "holds; leave it out, or convert it, a key by jax.random.key_data"
            )
    return leaves


def _plain(leaf: Any) -> np.ndarray:
    """Lays an array out as the format does, little-endian and by rows."""
    array = np.asarray(leaf, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _view(tensor: Mapping[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(DTYPES[tensor["dtype"]])
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


def _type(dtype: str, shape: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        about = [name, array.dtype.name, array.shape]
        digest.update(json.dumps(about).encode() + b"\n")
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _hint(data: bytes) -> str:
    """Tells what is no such file; a good one may begin alike."""
    if data.startswith(b"PK"):
        return "; it is a zip archive, as torch.save and numpy.savez write"
    if data.startswith(b"\x80"):
        return "; it looks like a pickle, which could run any code and is never read"
    return ""
