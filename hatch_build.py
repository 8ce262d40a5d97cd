"""Builds the loops in C++ where a compiler is found, and does without where none is.

``python hatch_build.py`` builds them in a checkout that is not installed. The
environment variable ``JLSTM_NATIVE=0`` leaves them out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
SOURCES = ROOT / "jlstm" / "kernels" / "csrc"
LIBRARY = SOURCES.parent / f"_native.{sys.implementation.cache_tag}.so"

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-Wno-psabi"]
LOOPS = [*FLAGS, "-fno-exceptions", "-fno-math-errno", "-fvisibility=hidden"]
# The loops are compiled once for each set of instructions; the processor chooses.
PORTABLE = {"kPortable": []}
X86 = {
    "kAvx2": ["-mavx2", "-mfma"],
    "kAvx512": ["-mavx512f", "-mfma", "-mprefer-vector-width=512"],
}


def build() -> Path | None:
    """Compiles the library, and says in a line why if it cannot."""
    compiler = os.environ.get("CXX") or next(
        filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
    )
    jaxlib = find_spec("jaxlib")
    if os.environ.get("JLSTM_NATIVE") == "0":
        return _without("JLSTM_NATIVE=0")
    if compiler is None or os.name != "posix":
        return _without("no C++ compiler was found")
    if jaxlib is None or jaxlib.origin is None:
        return _without("jaxlib, which has the headers, is not installed")
    include = Path(jaxlib.origin).parent / "include"
    x86 = platform.machine() in ("x86_64", "AMD64")
    with tempfile.TemporaryDirectory() as folder:

        def compile(name: str, source: str, flags: list[str]) -> list[str]:
            output = str(Path(folder) / f"{name}.o")
            return [compiler, *flags, "-c", str(SOURCES / source), "-o", output]

        door = [*FLAGS, "-isystem", str(include), *(["-DJLSTM_X86"] if x86 else [])]
        commands = [compile("handlers", "handlers.cc", door)]
        for name, flags in (PORTABLE | X86 if x86 else PORTABLE).items():
            flags = [*LOOPS, f"-DJLSTM_LOOPS={name}", *flags]
            commands.append(compile(name, "recurrence.cc", flags))
        outputs = [command[-1] for command in commands]
        library = str(Path(folder) / "library.so")
        link = [compiler, "-shared", "-pthread", *outputs, "-o", library]
        if sys.platform == "linux":
            link += ["-s", "-static-libstdc++", "-static-libgcc"]
        problem = _run(commands) or _run([link])
        if problem:
            return _without(problem)
        # At once: another process may be reading the old one.
        new = LIBRARY.with_suffix(".new")
        shutil.copyfile(library, new)
        os.replace(new, LIBRARY)
    return LIBRARY


def _run(commands: list[list[str]]) -> str:
    """Runs commands side by side, and returns what the first that failed said."""
    pipe = subprocess.PIPE
    try:
        running = [
            subprocess.Popen(command, stderr=pipe, text=True) for command in commands
        ]
    except OSError as problem:
        return str(problem)
    said = [process.communicate()[1] for process in running]
    pairs = zip(running, said, strict=True)
    return next((text for process, text in pairs if process.returncode), "")


def _without(reason: str) -> None:
    LIBRARY.unlink(missing_ok=True)
    print(f"jlstm: the loops in C++ are left out: {reason}", file=sys.stderr)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class NativeHook(BuildHookInterface):
        """Adds the library to a wheel, which is then for one platform."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Builds it; an editable installation finds it where it was built."""
            if self.target_name != "wheel" or build() is None or version == "editable":
                return
            target = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            python = f"{sys.implementation.name[:2]}{sys.version_info.major}"
            python += str(sys.version_info.minor)
            build_data["pure_python"] = False
            build_data["tag"] = f"{python}-none-{target}"
            build_data["force_include"][str(LIBRARY)] = str(LIBRARY.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(build() is None)
