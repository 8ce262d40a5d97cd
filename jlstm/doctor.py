"""``python -m jlstm doctor`` checks whether this installation is fit for long runs.

Each check prints one line: ``ok``, a ``note`` about something that is missing but not
needed, or ``FAIL`` with what to do. The exit code is 1 if any check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlstm

# The versions with which the tests pass, by the first two numbers of JAX's version.
TESTED = {"0.10": "Python 3.11", "0.12": "Python 3.12 and 3.13"}
LEAST = {
    "jax": "0.10.1",
    "flax": "0.12.6",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.3",
    "numpy": "2.0",
}
EXTRAS = ("grain", "tyro", "rich", "matplotlib")
ROOM = 1 << 30  # bytes that a long run should find free
PATIENCE = 120  # seconds for two processes to meet


class Failure(Exception):
    """Raised by a check that failed, with advice."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.fix = fix


class Note(Failure):
    """Raised by a check that found something missing that is not needed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
      folder: the folder in which a checkpoint is saved and loaded for a trial.
      processes: whether to start two processes on this machine for a trial.
    """

    folder: Path
    processes: bool = True


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m jlstm doctor", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="folder for a trial checkpoint"
    )
    parser.add_argument(
        "--no-processes", action="store_true", help="start no other processes"
    )
    given = parser.parse_args(argv)
    sys.exit(examine(Options(given.dir.absolute(), not given.no_processes)))


def examine(options: Options) -> int:
    """Runs all checks, and prints one line for each.

    Returns:
      The exit code.
    """
    failed = 0
    for name, check in CHECKS.items():
        try:
            state, text = "ok  ", check(options)
        except Note as note:
            state, text = "note", f"{note}; {note.fix}"
        except Failure as failure:
            state, text = "FAIL", f"{failure}; {failure.fix}"
        except Exception as error:
            state, text = "FAIL", f"{type(error).__name__}: {error}"
        failed += state == "FAIL"
        print(f"{state} {name}: {text}", flush=True)
    return 1 if failed else 0


def check_versions(_: Options) -> str:
    """Compares versions with those that are needed and those that are tested."""
    found = {name: importlib.metadata.version(name) for name in LEAST}
    for name, least in LEAST.items():
        if _numbers(found[name]) < _numbers(least):
            raise Failure(
                f"{name} is {found[name]}, below {least}",
                f'run pip install --upgrade "{name}>={least}"',
            )
    lib = importlib.metadata.version("jaxlib")
    if _numbers(lib)[:3] != _numbers(found["jax"])[:3]:
        raise Failure(
            f"jax is {found['jax']}, but jaxlib {lib}",
            f'run pip install "jaxlib=={found["jax"]}"',
        )
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    line = ".".join(found["jax"].split(".")[:2])
    if line not in TESTED:
        tested = " and ".join(f"{k} ({v})" for k, v in TESTED.items())
        raise Note(text, f"jlstm {jlstm.__version__} is tested with jax {tested}")
    return text


def _numbers(version: str) -> tuple[int, ...]:
    digits = ("".join(filter(str.isdigit, part)) for part in version.split(".")[:3])
    return tuple(int(part or 0) for part in digits)


def check_devices(_: Options) -> str:
    """Lists the devices, and looks for a GPU that JAX does not use."""
    devices = jax.devices()
    kinds = {device.device_kind for device in devices}
    text = f"{len(devices)} of {jax.default_backend()} ({', '.join(sorted(kinds))})"
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if listed.stdout.startswith("GPU"):
            raise Failure(
                f"{text}, though there is a GPU", 'run pip install "jlstm[cuda12]"'
            )
    return text


def check_native(_: Options) -> str:
    """Looks for the C++ library."""
    from jlstm.kernels import library

    reason = library.why_not()
    if reason is not None:
        raise Note(
            f"the library in C++ {reason}",
            "on a CPU the loops run by XLA alone, at about half the speed",
        )
    return "the library in C++ is there"


def check_extras(_: Options) -> str:
    """Looks for the packages that experiments need."""
    absent = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if absent:
        raise Note(
            f"not installed: {', '.join(absent)}", 'run pip install "jlstm[train]"'
        )
    return f"{', '.join(EXTRAS)} are there"


def check_lstm(_: Options) -> str:
    """Compares the outputs and gradients of an LSTM with NumPy."""
    size, steps, rows = 16, 9, 4
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(rows, steps, 5))
    lengths = np.array([9, 1, 0, 6])
    weights = {
        "w_ih": rng.normal(size=(5, 4 * size)) / 2,
        "w_hh": rng.normal(size=(size, 4 * size)) / 4,
        "b": rng.normal(size=4 * size),
    }
    goal = rng.normal(size=(rows, steps, size))
    layer = jlstm.RNN(jlstm.LSTM(size))
    floats = jnp.asarray(xs, jnp.float32)
    like = layer.init(jax.random.key(0), floats)
    params = dataclasses.replace(
        like, **{k: jnp.asarray(v, jnp.float32) for k, v in weights.items()}
    )

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        ys, _ = layer.apply(params, floats, lengths=jnp.asarray(lengths))
        return jnp.sum(ys * jnp.asarray(goal, jnp.float32)), ys

    with jax.default_matmul_precision("highest"):
        (_, ys), grads = jax.value_and_grad(loss, has_aux=True)(params)
    want_ys, want = lstm(weights, xs, lengths, goal)
    worst = _difference(ys, want_ys)
    for name, gradient in want.items():
        worst = max(worst, _difference(getattr(grads, name), gradient))
    if not worst < 1e-4:
        raise Failure(
            f"an LSTM differs from NumPy by {worst:.1e}",
            "report it with the output of python -m jlstm info",
        )
    loop = jlstm.explain(layer.cell).implementation
    return f"{loop} loop equals NumPy up to {worst:.1e}, outputs and gradients"


def _difference(got: Any, want: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))


def lstm(
    weights: dict[str, np.ndarray],
    xs: np.ndarray,
    lengths: np.ndarray,
    goal: np.ndarray,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Computes an LSTM's outputs, and the gradients of ``sum(ys * goal)``, in NumPy."""
    rows, steps, _ = xs.shape
    size = weights["w_hh"].shape[0]
    h = c = np.zeros((rows, size))
    kept, ys = [], np.zeros((rows, steps, size))
    for t in range(steps):
        z = xs[:, t] @ weights["w_ih"] + h @ weights["w_hh"] + weights["b"]
        i, f, g, o = np.split(z, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        g = np.tanh(g)
        valid = (t < lengths)[:, None]
        new_c = f * c + i * g
        new_h = o * np.tanh(new_c)
        kept.append((valid, h, c, i, f, g, o, new_c))
        h, c = np.where(valid, new_h, h), np.where(valid, new_c, c)
        ys[:, t] = np.where(valid, new_h, 0)
    grads = {name: np.zeros_like(value) for name, value in weights.items()}
    dh, dc = np.zeros((rows, size)), np.zeros((rows, size))
    for t in reversed(range(steps)):
        valid, h, c, i, f, g, o, new_c = kept[t]
        dy = np.where(valid, dh + goal[:, t], 0)
        tanh = np.tanh(new_c)
        d = np.where(valid, dc + dy * o * (1 - tanh**2), 0)
        dz = np.concatenate(
            [
                d * g * i * (1 - i),
                d * c * f * (1 - f),
                d * i * (1 - g**2),
                dy * tanh * o * (1 - o),
            ],
            axis=1,
        )
        grads["w_ih"] += xs[:, t].T @ dz
        grads["w_hh"] += h.T @ dz
        grads["b"] += dz.sum(0)
        dh = np.where(valid, dz @ weights["w_hh"].T, dh)
        dc = np.where(valid, d * f, dc)
    return ys, grads


def check_checkpoint(options: Options) -> str:
    """Saves a checkpoint, loads it, damages it, and loads it again."""
    from jlstm import train

    try:
        made = _missing(options.folder)
        options.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="jlstm-doctor-", dir=options.folder))
    except OSError as error:
        raise Failure(
            f"{options.folder} cannot be written ({error.strerror})",
            "choose another --dir, or make it writable",
        ) from None
    try:
        tree = {"w": jnp.arange(1000.0), "key": jax.random.key(1)}
        train.save(folder / "saved", tree)
        loaded = train.load(folder / "saved", tree)
        if train.hash_tree(loaded) != train.hash_tree(tree):
            raise Failure(
                f"what was saved in {options.folder} came back with other bits",
                "do not keep checkpoints there",
            )
        files = [p for p in (folder / "saved").rglob("*") if p.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        with contextlib.suppress(train.Damaged):
            train.load(folder / "saved", tree)
            raise Failure("a flipped bit of a checkpoint was not noticed", "report it")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else came there meanwhile
            for parent in made:
                parent.rmdir()
    return f"saved and loaded bit for bit in {options.folder}, a flipped bit noticed"


def _missing(folder: Path) -> list[Path]:
    """Lists those of a folder and its parents that do not exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def check_disk(options: Options) -> str:
    """Looks for free space on the disk."""
    existing = next(p for p in (options.folder, *options.folder.parents) if p.exists())
    if not existing.is_dir():
        raise Failure(f"{existing} is not a folder", "choose another --dir")
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB are free in {options.folder}"
    if free < ROOM:
        raise Failure(text, "choose another --dir, or make room")
    return text


def check_processes(options: Options) -> str:
    """Starts two processes on this machine and lets them add their numbers."""
    if not options.processes:
        raise Note("not tried", "leave out --no-processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "jlstm.doctor", str(port), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in both]
    except subprocess.TimeoutExpired:
        raise Failure(
            f"two processes did not meet on 127.0.0.1 within {PATIENCE} s",
            "let processes of this machine connect to each other",
        ) from None
    finally:
        for process in both:
            process.kill()
    if any("sum 3" not in output for output in outputs):
        last = (outputs[0].strip().splitlines() or ["no output"])[-1]
        raise Failure(
            f"two processes could not add their numbers ({last})",
            "let processes of this machine connect to each other",
        )
    return "two of this machine added their numbers"


def _peer(port: str, index: int) -> None:
    """Is one of the two processes: adds its number to that of the other."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.experimental import multihost_utils

    numbers = multihost_utils.process_allgather(jnp.int32(index + 1))
    print("sum", int(numbers.sum()), flush=True)


CHECKS: dict[str, Callable[[Options], str]] = {
    "versions": check_versions,
    "devices": check_devices,
    "native": check_native,
    "extras": check_extras,
    "lstm": check_lstm,
    "checkpoint": check_checkpoint,
    "disk": check_disk,
    "processes": check_processes,
}

if __name__ == "__main__":
    _peer(sys.argv[1], int(sys.argv[2]))
