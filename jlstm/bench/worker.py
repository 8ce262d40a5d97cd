"""The process of one library in one case: compiles, then measures when told to.

Its argument is a JSON object. It writes JSON lines: first that it is ready, then the
times of one round for each line that it reads. While other workers are measured, it
waits for input. A worker that times PyTorch uses no JAX device.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from jlstm.bench import peers, variants
from jlstm.bench.cases import SUITES, VARIANTS, Size
from jlstm.bench.program import Program, Refused, median_ms

WARM_UP = 2


def main(argument: str) -> None:
    """Serves one case until its input ends."""
    # Libraries may print to stdout, so the answers go to a copy of it.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    order = json.loads(argument)
    suite = SUITES[order["suite"]]
    try:
        program = make_program(order)
        if not suite.compile_only:
            for call in list(program.calls.values()) * WARM_UP:
                call()
    except Refused as reason:
        return answer({"refused": str(reason)})
    answer({"facts": program.facts})
    for _ in sys.stdin:
        answer(
            {
                name: median_ms(call, order["seconds"], suite.least_calls)
                for name, call in program.calls.items()
            }
        )


def make_program(order: dict[str, Any]) -> Program:
    """Makes the program that an order names."""
    name, suite, size = order["worker"], SUITES[order["suite"]], Size(*order["size"])
    if name in VARIANTS:
        return variants.make_program(name, suite, size)
    return peers.make_program(name, suite, size, order["threads"])


if __name__ == "__main__":
    main(sys.argv[1])
