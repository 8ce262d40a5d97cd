"""The file: tensors of params, and in its metadata the layer as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import jax

from jlstm import weights
from jlstm.layers.recurrent import check_layer_field
from jlstm.saved import config, structure
from jlstm.saved.names import Place, Refused
from jlstm.types import Layer, PyTree

VERSION = 1
NOT_OURS = "load: the layer in {} is not described in the format of jlstm.save"


def save(path: str | os.PathLike[str], layer: Layer, params: PyTree) -> None:
    """Writes a layer and its params to one ``.safetensors`` file, whole or not at all.

    A file that is there is replaced. Each tensor has the path of its leaf for a name,
    such as ``forward/w_hh``. The metadata hold the layer as JSON, and hashes of both,
    so that damage is noticed. It needs the extra ``weights`` (safetensors).

    Args:
      path: of the file, which should end in ``.safetensors``; missing folders are made.
      layer: a layer or model. It must be made of frozen dataclasses, as all layers of
        this library are.
      params: its params, made of dicts, lists, tuples, NamedTuples and dataclasses.

    Raises:
      ImportError: safetensors is not installed.
      TypeError: a cell is in the place of the layer.
      ValueError: the params are not those of the layer; or a param or a field of a
        config has a type that the file cannot hold, such as a typed PRNG key.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/classifier.safetensors"
      >>> encoder = jlstm.stack(jlstm.Embed(50, 4), jlstm.bidirectional(jlstm.LSTM(8)))
      >>> model, tokens = jlstm.Classifier(encoder, 2), jnp.ones((1, 3), int)
      >>> jlstm.save(path, model, model.init(jax.random.key(0), tokens))
      >>> again, params = jlstm.load(path)
      >>> again == model, again.apply(params, tokens)[0].shape
      (True, (1, 2))
    """
    check_layer_field("save.layer", layer)
    leaves = weights.named("save", params)
    _check_params("save", layer, params)
    about = {
        "version": VERSION,
        "layer": config.encode(layer, "save: layer"),
        "params": structure.encode(params, "save: params"),
    }
    text, arrays = json.dumps(about, allow_nan=False), weights.laid_out(leaves)
    digest = weights.hash_of(arrays)
    metadata = {"layer": text, "layer_sha256": _hash(digest, text), "sha256": digest}
    weights.write("save", path, arrays, metadata)


def load(
    path: str | os.PathLike[str], layer: Layer | None = None
) -> tuple[Any, PyTree]:
    """Reads what :func:`jlstm.save` wrote, after checking all of it.

    Nothing is imported or called because a file names it. Without ``layer``, the file
    may name no classes and functions but those of this library, and activations of
    ``jax.nn`` and ``jax.numpy``. With ``layer``, it may name others too, and the given
    layer is compared with the one in the file. Only ``implementation`` and
    ``checkpoint_every``, which change no result, may differ.

    Args:
      path: of the file.
      layer: the layer that was saved; needed if it has classes or functions of your
        own. ``None``, the default, makes the layer from the file. The array of a
        ``jlstm.init.Pretrained`` is not in the file, so that a layer made from it
        cannot ``init`` again.

    Returns:
      ``(layer, params)``.

    Raises:
      FileNotFoundError: there is no file at ``path``.
      ImportError: safetensors is not installed.
      ValueError: the file is not one of :func:`jlstm.save`, is damaged, holds another
        layer (the message has a line for each field), or names a class or function of
        your own while no layer is given.

    Example:
      See :func:`save`.
    """
    if layer is not None:
        check_layer_field("load.layer", layer)
        config.encode(layer, "load: layer")  # refuses what no file can hold
    file = weights.read("load", path)
    about = _about(file)
    try:
        if layer is None:
            made = config.decode(about["layer"], Place(file.path, "layer"))
        else:
            made = layer
            _check_same(file, about["layer"], layer)
        nodes = structure.classes(layer)
        like = structure.decode(about["params"], nodes, Place(file.path, "params"))
    except Refused:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise ValueError(NOT_OURS.format(file.path)) from None
    check_layer_field("load", made)
    params = weights.tree_of("load", file, like, weights.named("load", like))
    _check_params(f"load: {file.path}", made, params)
    return made, params


def _hash(tensors: str, text: str) -> str:
    """Hashes a layer together with its tensors."""
    return hashlib.sha256(f"{tensors}\n{text}".encode()).hexdigest()


def _about(file: weights.File) -> dict[str, Any]:
    """Reads what the metadata say of the layer."""
    text, digest = (file.about.get(key) for key in ("layer", "layer_sha256"))
    if file.about.get("format") != "jlstm" or text is None or digest is None:
        raise ValueError(
            f"load: {file.path} holds no layer, only tensors; read them with "
            "jlstm.train.load_weights(path, like)"
        )
    if digest != _hash(file.about.get("sha256", ""), text):
        raise ValueError(
            f"load: the layer in {file.path} has changed since it was written (its "
            "SHA-256 differs); get the file again"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"load: the layer in {file.path} is not valid JSON") from None
    if not isinstance(about, dict) or not {"version", "layer", "params"} <= set(about):
        raise ValueError(NOT_OURS.format(file.path))
    if about["version"] != VERSION:
        raise ValueError(
            f"load: {file.path} is in version {about['version']!r} of the format, but "
            f"this jlstm reads version {VERSION}; install the jlstm that wrote it"
        )
    return about


def _check_same(file: weights.File, stored: Any, layer: Layer) -> None:
    lines = list(config.differences(stored, layer, "layer"))
    if lines:
        each = "".join(f"\n  {line}" for line in lines)
        raise Refused(f"load: {file.path} was saved with another layer:{each}")


def _check_params(where: str, layer: Layer, params: PyTree) -> None:
    """Refuses params of which the layer cannot even make a carry."""
    try:
        jax.eval_shape(lambda p: layer.init_carry(p, (1,)), params)
    except Exception as problem:
        reason = (str(problem).splitlines() or [""])[0]
        raise ValueError(
            f"{where}: the params are not those of {layer!r} "
            f"({type(problem).__name__}: {reason})"
        ) from problem
