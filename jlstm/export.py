"""Programs that run without this library, made by ``jax.export``.

A program holds the params, and takes any number of rows and steps. Its file needs JAX
and nothing else: ``jax.export.deserialize(open(path, "rb").read()).call(...)``. JAX
promises to read such files for six months. To keep a layer and its params for longer,
write them by :func:`jlstm.save`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jlstm import door
from jlstm.files import write_whole
from jlstm.layers import compose
from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, Layer, PyTree
from jlstm.weights import name_leaves

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN = (*PLATFORMS, "rocm")
# Ends a file, before the hash of what comes before; JAX does not read so far.
MARK = b"jlstm-sha256:"


def sequence(
    layer: Layer,
    params: PyTree,
    xs: PyTree,
    *,
    platforms: Sequence[str] = PLATFORMS,
    constraints: Sequence[str] = (),
) -> jax.export.Exported:
    """Makes a program that runs a layer on whole sequences.

    ``program.call(xs, lengths)``, with ``lengths [B]`` in int32, returns
    ``(ys, carry)`` as ``layer.apply`` does, without noise. The carry is a dict of
    arrays by their paths, which a program of :func:`step` takes. In rows of length 0 it
    is the fresh carry.

    Args:
      layer: a layer or model.
      params: its params, which become constants of the program.
      xs: an example of its input, ``[B, T, ...]``, arrays or ``jax.ShapeDtypeStruct``;
        the sizes B and T are left open.
      platforms: where the program can run, of ``"cpu"``, ``"cuda"``, ``"rocm"`` and
        ``"tpu"``; all but ``"rocm"`` unless given.
      constraints: what B and T must fulfil, under the names ``batch`` and ``time``,
        such as ``"time >= 3"`` for a convolution. Both are at least 1.

    Returns:
      The program.

    Raises:
      TypeError: a cell is in the place of the layer.
      ValueError: the layer does not fit ``xs``; it treats few rows or steps otherwise
        than many, so that constraints are needed; or it runs code that no program can
        hold.

    Example:
      >>> layer, xs = jlstm.bidirectional(jlstm.Elman(4)), jnp.ones((1, 1, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> program = jlstm.export.sequence(layer, params, xs)
      >>> ys, carry = program.call(jnp.ones((2, 5, 3)), jnp.array([5, 2]))
      >>> ys.shape, sorted(carry)
      ((2, 5, 8), ['backward/h', 'forward/h'])
    """
    where = "export.sequence"
    layer = _plain(where, layer, platforms)
    batch, time = _sizes(constraints)
    inputs, params = _types(where, xs, batch, time), _host(params)

    def run(xs: PyTree, lengths: Array) -> tuple[PyTree, dict[str, Array]]:
        ys, carry = layer.apply(_constants(params), xs, lengths=lengths)
        return ys, name_leaves(carry)

    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return _export(where, layer, run, (inputs, lengths), platforms)


def step(
    layer: Layer,
    params: PyTree,
    xs: PyTree,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> jax.export.Exported:
    """Makes a program that advances a causal layer by one step.

    ``program.call(carry, x, reset)`` returns ``(carry, y)``. It takes the carry of the
    step before, or of a program of :func:`sequence`, a dict of arrays; ``x [B, ...]``;
    and ``reset [B]``, booleans, true in rows that start from the fresh carry. In such
    rows anything may stand in ``carry``.

    Args:
      layer: a causal layer or model with one output for each step.
      params: its params, which become constants of the program.
      xs: an example of its input as a sequence, ``[B, T, ...]``, as for
        :func:`sequence`.
      platforms: where the program can run, as for :func:`sequence`.

    Returns:
      The program.

    Raises:
      TypeError: a cell is in the place of the layer.
      ValueError: the layer is not causal, or has not one output for each step; or
        :func:`sequence` would refuse it.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.Elman(4)), jnp.ones((1, 1, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> program = jlstm.export.step(layer, params, xs)
      >>> anything, reset = {"h": jnp.zeros((2, 4))}, jnp.ones(2, bool)
      >>> carry, y = program.call(anything, jnp.ones((2, 3)), reset)
      >>> y.shape, carry["h"].shape
      ((2, 4), (2, 4))
    """
    where = "export.step"
    layer = _plain(where, layer, platforms)
    if not compose.is_causal(layer):
        raise ValueError(
            f"{where}: needs a causal layer, got {layer!r}, whose outputs need the "
            "future; export.sequence takes it"
        )
    batch, time = _sizes(())
    _check_steps(where, layer, params, _types(where, xs, batch, time), time)
    x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[2:]), leaf.dtype), xs
    )
    params = _host(params)

    def first(x: PyTree) -> PyTree:
        return compose.step(layer, _constants(params), None, x)[0]

    after = jax.eval_shape(first, x)
    types = name_leaves(after)

    def run(carry: dict[str, Array], x: PyTree, reset: Array) -> tuple:
        before = jax.tree.unflatten(
            jax.tree.structure(after), [carry[name] for name in types]
        )
        carry, y = compose.step(layer, _constants(params), before, x, reset=reset)
        return name_leaves(carry), y

    reset = jax.ShapeDtypeStruct((batch,), bool)
    return _export(where, layer, run, (types, x, reset), platforms)


def save(path: str | os.PathLike[str], program: jax.export.Exported) -> None:
    """Writes a program to a file, whole or not at all.

    A file that is there is replaced. The file is what ``program.serialize()`` returns,
    followed by a hash. It needs the extra ``export`` (flatbuffers).

    Args:
      path: of the file; missing folders are made.
      program: what :func:`sequence` or :func:`step` made.

    Raises:
      ImportError: flatbuffers is not installed.
      ValueError: the layer's outputs have a class that the format lacks.

    Example:
      >>> import tempfile
      >>> path, xs = tempfile.mkdtemp() + "/dense.jax", jnp.ones((1, 1, 3))
      >>> layer = jlstm.Dense(4)
      >>> params = layer.init(jax.random.key(0), xs)
      >>> jlstm.export.save(path, jlstm.export.sequence(layer, params, xs))
      >>> program = jlstm.export.load(path)
      >>> program.call(jnp.ones((2, 5, 3)), jnp.array([5, 2]))[0].shape
      (2, 5, 4)
    """
    _check_flatbuffers("export.save")
    try:
        data = bytes(program.serialize())
    except ValueError as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(
            f"export.save: the program cannot be written: {reason}; let the layer "
            "return tuples and dicts"
        ) from problem
    write_whole(Path(path).absolute(), data + MARK + _hash(data))


def load(path: str | os.PathLike[str]) -> jax.export.Exported:
    """Reads the program that :func:`jlstm.export.save` wrote.

    A program runs whatever it was made of: load none from people whom you do not trust.
    Outside of ``jax.jit`` each ``program.call`` is prepared anew, so call it inside.

    Args:
      path: of the file.

    Returns:
      The program.

    Raises:
      FileNotFoundError: there is no file at ``path``.
      ImportError: flatbuffers is not installed.
      ValueError: the file holds no program, has other bytes than were written, or is
        too old or too new for this JAX.

    Example:
      See :func:`save`.
    """
    where, path = "export.load", Path(path)
    _check_flatbuffers(where)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file at {path}")
    data, mark, digest = path.read_bytes().rpartition(MARK)
    if not mark:
        raise ValueError(
            f"{where}: {path} is not a valid file of export.save; read files of "
            "other programs with jax.export.deserialize"
        )
    if digest != _hash(data):
        raise ValueError(
            f"{where}: {path} has changed since it was written (its SHA-256 differs); "
            "get the file again"
        )
    try:
        return jax.export.deserialize(bytearray(data))
    except Exception as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ValueError(
            f"{where}: JAX {jax.__version__} cannot read {path}: {reason}; export the "
            "layer again"
        ) from problem


def _plain(where: str, layer: Layer, platforms: Sequence[str]) -> Any:
    """A layer all of whose recurrences any platform can run."""
    check_layer_field(where, layer)
    unknown = [name for name in platforms if name not in KNOWN]
    if isinstance(platforms, str) or unknown or not platforms:
        raise ValueError(
            f"{where}: platforms must be among {', '.join(KNOWN)}, got {platforms!r}"
        )
    # checkpoint_every is for gradients, and a program has none.
    return compose.replace_recurrences(
        layer, implementation="scan", checkpoint_every=None
    )


def _sizes(constraints: Sequence[str]) -> Sequence[Any]:
    return jax.export.symbolic_shape("batch, time", constraints=constraints)


def _types(where: str, xs: PyTree, batch: Any, time: Any) -> PyTree:
    door.batch_and_time(xs, where)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch, time, *leaf.shape[2:]), leaf.dtype),
        xs,
    )


def _host(params: PyTree) -> PyTree:
    """Takes params from their devices."""
    return jax.tree.map(np.asarray, params)


def _constants(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, params)


def _check_steps(
    where: str, layer: Layer, params: PyTree, inputs: PyTree, time: Any
) -> None:
    """Refuses a layer that gives one answer a sequence."""
    ys, _ = jax.eval_shape(layer.apply, params, inputs)
    if any(leaf.ndim < 2 or leaf.shape[1] != time for leaf in jax.tree.leaves(ys)):
        raise ValueError(
            f"{where}: needs a layer with one output for each step, got {layer!r}, "
            f"whose outputs are {door.shapes(ys)}; export.sequence takes it"
        )


def _export(
    where: str,
    layer: Layer,
    run: Callable,
    inputs: tuple,
    platforms: Sequence[str],
) -> jax.export.Exported:
    try:
        return jax.export.export(jax.jit(run), platforms=tuple(platforms))(*inputs)
    except jax.errors.InconclusiveDimensionOperation as problem:
        reason = str(problem).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{where}: {layer!r} behaves differently for few rows or steps "
            f"({reason}); exclude them, for example by constraints=['time >= 3']"
        ) from None
    except ValueError as problem:
        if "custom calls" not in str(problem):
            raise
        reason = str(problem).splitlines()[0]
        raise ValueError(
            f"{where}: {layer!r} calls code that cannot be exported ({reason}); write "
            "that part in JAX"
        ) from problem


def _check_flatbuffers(where: str) -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{where}: flatbuffers is not installed; run pip install "jlstm[export]"'
        ) from error


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
