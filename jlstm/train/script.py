"""The options that every experiment script has, and how a script begins and ends.

::

    @dataclass(frozen=True)
    class Config(train.Options):
        hidden_size: int = 256
        \"\"\"Width of each layer.\"\"\"

    PRESETS = {"smoke": Config(hidden_size=16), "cpu": Config()}

    def main(config: Config) -> dict:
        workdir = train.Workdir(config, experiment="add_numbers")
        ...
        return workdir.write_result(metric="loss", value=loss, floor=..., ...)

    if __name__ == "__main__":
        train.run(main, PRESETS)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from jlstm.extras import import_optional
from jlstm.train.checkpoints import Resume
from jlstm.train.signals import Interrupted
from jlstm.train.state import NonFiniteError
from jlstm.train.workdir import device_kind, fields_of
from jlstm.types import PyTree

TRACEBACK = "JLSTM_TRACEBACK"


def indifferent(default: Any) -> Any:
    """Makes a config field that does not change the result of a run.

    A run that is continued may have another value of this field, whereas a change of
    any other field is refused. Use it for options such as verbosity.

    Args:
      default: the default value of the field.

    Returns:
      The field, to be assigned in the class body.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config(jlstm.train.Options):
      ...     sample: int = 600
      ...     verbose: bool = jlstm.train.indifferent(False)
    """
    return dataclasses.field(default=default, metadata={"indifferent": True})


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every experiment script has; subclass it to add your own.

    Each field is an option on the command line of :func:`run`.
    """

    preset: str = ""
    """Name of the preset whose values the other options change."""
    data: Path | None = None
    """Path of the data; by default a script uses data that every machine has."""
    workdir: Path | None = indifferent(None)
    """Folder of the run, with its config, metrics, plots, checkpoints and result; by
    default a temporary one."""
    seed: int = 0
    """Seed of all random numbers."""
    resume: Resume = indifferent("auto")
    """Whether to continue from the checkpoints in the workdir: auto if there are any,
    must refuses to begin anew, never refuses to continue."""
    checkpoint_minutes: float = indifferent(10.0)
    """Minutes between two checkpoints."""
    checkpoint_every: int | None = indifferent(None)
    """Steps between two checkpoints; replaces the minutes."""
    tensorboard: bool = indifferent(False)
    """Write the metrics for TensorBoard too, to WORKDIR/tensorboard."""
    debug_nans: bool = indifferent(False)
    """Find the operation that first gives NaN or infinity; slows the run down."""
    mesh: str = indifferent("data=1")
    """data=N shares the rows of each batch among N devices; on a CPU, choose N no
    larger than its number of cores."""
    distributed: bool = indifferent(False)
    """Join the other processes that SLURM, Kubernetes or MPI started."""
    coordinator: str | None = indifferent(None)
    """HOST:PORT of process 0; joins processes that were started by hand."""
    num_processes: int | None = indifferent(None)
    """Number of processes that were started by hand."""
    process_id: int | None = indifferent(None)
    """Number of this process among them, from 0."""

    @property
    def devices(self) -> int:
        """The number of devices that share each batch, read from ``mesh``.

        Raises:
          ValueError: ``mesh`` is not ``data=N``.
        """
        name, _, size = self.mesh.partition("=")
        if name != "data" or not size.isdecimal() or not int(size):
            raise ValueError(f"--mesh: must be data=N, got {self.mesh!r}")
        return int(size)


ConfigT = TypeVar("ConfigT", bound=Options)


def run(
    main: Callable[[ConfigT], Any],
    presets: Mapping[str, ConfigT],
    argv: list[str] | None = None,
) -> None:
    """Runs an experiment script from the command line.

    ``--preset NAME`` picks a config, the first one by default, and ``--FIELD VALUE``
    changes one of its fields. ``--help`` lists the fields with their docstrings and
    their values in the preset.

    A script ends with code 0 if it succeeds. Bad options, bad input and files that
    cannot be written (``ValueError`` or ``OSError`` from ``main``) print one line and
    give code 2; with the environment variable ``JLSTM_TRACEBACK`` set, the traceback is
    printed too. Numbers that stay non-finite (:class:`jlstm.train.NonFiniteError`) give
    code 3. After SIGTERM or Ctrl-C, once everything is saved, the code is 143 or 130.
    Any other exception is a bug and is not caught.

    Args:
      main: the experiment, a function of the config.
      presets: the configs by name; the first one is the default.
      argv: the command-line arguments; None takes those of the process.

    Raises:
      SystemExit: with one of these codes, unless ``main`` succeeds.

    Example:
      >>> presets = {"smoke": jlstm.train.Options(seed=1)}
      >>> jlstm.train.run(lambda config: print(config.seed), presets, ["--seed", "7"])
      7
    """
    arguments = sys.argv[1:] if argv is None else argv
    config = _parse(presets, arguments)
    try:
        _join_devices(config)
        main(config)
    except (ValueError, OSError, NonFiniteError) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        code = 3 if isinstance(error, NonFiniteError) else 2
        _exit(str(error) or type(error).__name__, code)
    except Interrupted as interrupted:
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        _end(interrupted.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(code: Any) -> NoReturn:
    """Ends the process without waiting for threads that are still reading data."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _join_devices(config: Options) -> None:
    """Makes the devices of a CPU, and joins other processes, before JAX looks."""
    by_hand = (config.coordinator, config.num_processes, config.process_id)
    given = [value is not None for value in by_hand]
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator, --num-processes and --process-id belong together"
        )
    if config.devices > 1:
        # Read by CPUs alone.
        local, rest = divmod(config.devices, config.num_processes or 1)
        if rest:
            raise ValueError(
                f"--mesh: {config.num_processes} processes cannot share "
                f"{config.devices} devices evenly"
            )
        jax.config.update("jax_num_cpu_devices", local)
    if config.distributed or config.coordinator is not None:
        jax.distributed.initialize(*by_hand)
    cores, local = os.cpu_count() or 1, config.devices // (config.num_processes or 1)
    if local > cores and jax.default_backend() == "cpu":
        print(
            f"--mesh: {local} devices share the {cores} cores of this machine, which "
            f"is slower than data={cores}",
            file=sys.stderr,
        )


def _parse(presets: Mapping[str, ConfigT], arguments: list[str]) -> ConfigT:
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    first.add_argument("--preset", default=next(iter(presets)))
    try:
        name = first.parse_known_args(arguments)[0].preset
    except argparse.ArgumentError as error:
        _exit(str(error))
    if name not in presets:
        _exit(f"--preset: {name!r} is not one of {', '.join(presets)}")
    tyro = import_optional("tyro")
    base = dataclasses.replace(presets[name], preset=name)
    summary = (sys.modules[type(base).__module__].__doc__ or "").strip()
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                type(base),
                default=base,
                args=arguments,
                description=f"{summary}\n\nPresets: {', '.join(presets)}.".strip(),
            )
    except SystemExit as error:
        if error.code:
            line = _flatten(message.getvalue())
            advice = _suggest(line, message.getvalue(), base)
            _exit(f"{line}; {advice}--help shows the options")
        raise


def _flatten(box: str) -> str:
    """Takes the message out of the frame that tyro draws around it."""
    text = []
    for line in box.splitlines()[1:]:
        line = line.strip("│ ")
        if line.strip("─╰╯-"):
            text.append(line)
        elif text:  # a rule; where output is ASCII, another is above
            break
    return " ".join(text).rstrip(".") or "bad options"


def _suggest(line: str, message: str, config: Options) -> str:
    """Suggests the known option that is most like an unknown one."""
    kind, _, wrong = line.partition("Unrecognized options: ")
    if kind or not wrong:
        return ""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(config)]
    names += re.findall(r"[a-z-]+:[a-z-]+", message.partition("subcommands:")[2])
    for tried in (wrong.replace(", ", ":"), wrong.partition(",")[0]):
        for name in difflib.get_close_matches(tried.lstrip("-"), names, 1):
            return f"did you mean {name if ':' in name else f'--{name}'}? "
    return ""


def _exit(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if jax.distributed.is_initialized():
        _end(code)  # the others are not waited for
    sys.exit(code)


def describe(config: Any, params: PyTree = None) -> str:
    """Describes a run in a few lines: config, device, number of parameters.

    Args:
      config: the config, a dataclass.
      params: the params, to count their elements; None leaves that line out.

    Returns:
      The lines, joined by newlines.

    Example:
      >>> config = jlstm.train.Options(seed=3)
      >>> text = jlstm.train.describe(config, {"w": jnp.ones((2, 3))})
      >>> print(text.splitlines()[-1])
      parameters: 6
    """
    fields = ", ".join(f"{k}={v!r}" for k, v in fields_of(config).items())
    lines = [f"config: {fields}", f"device: {device_kind()}"]
    if params is not None:
        lines.append(f"parameters: {sum(x.size for x in jax.tree.leaves(params)):,}")
    return "\n".join(lines)
