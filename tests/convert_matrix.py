"""Compares converted weights with every peer that is installed.

Prints, for each module of each peer and each direction of conversion, the largest
errors of outputs, final states and gradients, relative to the magnitude of each array,
in float64, from random initial states, and with lengths where the peer takes them::

    python tests/convert_matrix.py

Ends with code 1 if an error exceeds the tolerance.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import peers
from peers import of_equinox, of_flax, of_haiku, of_keras, of_torch

FAMILIES = (of_torch, of_keras, of_flax, of_haiku, of_equinox)


def main() -> int:
    """Prints the table."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    columns = "".join(f"{name:>11}" for name in peers.Errors._fields)
    print(f"{'peer':9}{'module':36}{'':6}{columns}")
    absent, worst = set(), 0.0
    for module in (module for family in FAMILIES for module in family.MODULES):
        if not module.installed:
            absent.add(module.peer)
            continue
        for way, errors in peers.compare(module).items():
            cells = "".join(f"{value:11.1e}" for value in errors)
            print(f"{module.peer:9}{module.name:36}{way:6}{cells}", flush=True)
            worst = max(worst, *errors)
    for peer in sorted(absent):
        print(f"{peer}: is not installed")
    print(f"worst {worst:.1e}, tolerance {peers.TOLERANCE:.0e}")
    return int(worst > peers.TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
