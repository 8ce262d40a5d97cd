"""``python -m jlstm``: ``bench`` times it, ``doctor`` and ``info`` look around."""

from __future__ import annotations

import sys

USAGE = """usage: python -m jlstm COMMAND

  bench   times jlstm beside other libraries; bench --help lists the options
  doctor  checks that long runs work on this machine; --dir names a folder to check
  info    prints versions, devices, the processor and the libraries to compare with"""


def main(argv: list[str]) -> None:
    """Runs a command; an unknown one prints a line and exits with code 2."""
    match argv:
        case ["bench", *rest]:
            from jlstm.bench.run import main as bench

            bench(rest)
        case ["doctor", *rest]:
            from jlstm.doctor import main as doctor

            doctor(rest)
        case ["info"]:
            print(info())
        case [] | ["-h" | "--help"]:
            print(USAGE)
        case _:
            print(
                "error: the command must be bench, doctor or info, "
                f"got {' '.join(argv)!r}",
                file=sys.stderr,
            )
            sys.exit(2)


def info() -> str:
    """Lists what results depend on, a line each."""
    import jax

    from jlstm.bench.cases import PEERS
    from jlstm.bench.peers import installed
    from jlstm.bench.process import environment

    found = environment()
    lines = [f"{name} {version}" for name, version in found["versions"].items()]
    devices = ", ".join(device.device_kind for device in jax.devices())
    libraries = [peer for peer in PEERS if "-" not in peer and installed(peer)]
    lines.append(f"devices: {devices}")
    lines.append(f"processor: {found['cpu']}, {len(found['cores'])} cores")
    lines += [f"{name}={value}" for name, value in found["variables"].items()]
    lines.append(f"bench compares with: {', '.join(libraries) or 'nothing'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
