"""Makes the golden files: ``torch.nn.LSTM``, ``GRU`` and ``RNN`` in float64.

Written with torch 2.13.0 (CPU) by::

    python tests/golden/make_golden.py

A file holds the inputs of one case and what torch computes from them. Weights and
results have torch's names; the gradient of ``name`` is ``d_name``. NumPy draws every
input from the seed of the case, so that another run writes equal arrays.
"""

from __future__ import annotations

import importlib
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
GATES = {"LSTM": 4, "GRU": 3, "tanh": 1, "relu": 1}
HIDDEN_SIZE = 3

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A recurrent module of torch, and the inputs to compare it on.

    Attributes:
      kind: ``"LSTM"``, ``"GRU"``, or the activation of a simple ``RNN``.
      layers: how many.
      directions: 1 or 2.
      lengths: of a packed batch, in any order; ``None`` means an unpacked one.
      batch: ``B``.
      time: ``T``.
      carry: gives an initial state; else torch starts from zeros.
      seed: of every draw.
    """

    kind: str
    layers: int = 1
    directions: int = 1
    lengths: tuple[int, ...] | None = (3, 5, 1)
    batch: int = 3
    time: int = 5
    carry: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """Names the case, and its file."""
        directions = "bidirectional" if self.directions == 2 else "forward"
        parts = [self.kind.lower(), f"{self.layers}x{directions}"]
        parts += [f"b{self.batch}", f"t{self.time}"]
        parts += [] if self.lengths is None else ["packed"]
        return "-".join(parts + ([] if self.carry else ["zero"]))

    @property
    def places(self) -> list[str]:
        """Torch's suffix of each weight: layer by layer, forward first."""
        suffixes = ("", "_reverse")[: self.directions]
        return [f"l{i}{suffix}" for i in range(self.layers) for suffix in suffixes]

    @property
    def carries(self) -> tuple[str, ...]:
        """The arrays of the initial state."""
        if not self.carry:
            return ()
        return ("h0", "c0") if self.kind == "LSTM" else ("h0",)


# Few, because each compiles twice: every value of every field occurs, and the most
# intricate ones together. The live comparison and the table are denser.
CASES = (
    Case("LSTM", 1, 1, None, carry=False),
    Case("LSTM", 3, 2, (2, 4, 1)),
    Case("LSTM", 2, 1, (1,), batch=1, time=1),
    Case("GRU", 2, 2),
    Case("GRU", 3, 1, None, batch=1),
    Case("GRU", 1, 2, None, time=1),
    Case("tanh", 1, 2),
    Case("relu", 2, 1, seed=1),
    Case("relu", 3, 2, None),
)


def draw(case: Case) -> Arrays:
    """Draws weights, inputs, initial states and the projection of the results."""
    rng = np.random.default_rng(case.seed)
    batch, time, size, features = case.batch, case.time, HIDDEN_SIZE, 4
    rows, states = GATES[case.kind] * size, (len(case.places), batch, size)
    arrays = {}
    for place in case.places:
        wide = features if place.startswith("l0") else size * case.directions
        arrays[f"weight_ih_{place}"] = rng.uniform(-0.8, 0.8, (rows, wide))
        arrays[f"weight_hh_{place}"] = rng.uniform(-0.8, 0.8, (rows, size))
        arrays[f"bias_ih_{place}"] = rng.uniform(-0.8, 0.8, rows)
        arrays[f"bias_hh_{place}"] = rng.uniform(-0.8, 0.8, rows)
    arrays["x"] = rng.standard_normal((batch, time, features))
    arrays |= {name: rng.standard_normal(states) for name in case.carries}
    arrays["to_ys"] = rng.standard_normal((batch, time, size * case.directions))
    for name in ("h", "c")[: 2 if case.kind == "LSTM" else 1]:
        arrays[f"to_{name}"] = rng.standard_normal(states)
    return arrays


def run_torch(case: Case, arrays: Arrays) -> Arrays:
    """Computes outputs, final states, and all gradients of their projection."""
    torch = importlib.import_module("torch")  # which types are checked without
    rnn = importlib.import_module("torch.nn.utils.rnn")

    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "bidirectional": case.directions == 2,
        "batch_first": True,
        "dtype": torch.float64,
    }
    sizes = (arrays["x"].shape[-1], HIDDEN_SIZE)
    if case.kind in ("tanh", "relu"):
        module = torch.nn.RNN(*sizes, nonlinearity=case.kind, **options)
    else:
        module = getattr(torch.nn, case.kind)(*sizes, **options)
    weights = {name: tensors[name] for name, _ in module.named_parameters()}
    module.load_state_dict(weights)

    inputs = {name: tensors[name].requires_grad_() for name in ("x", *case.carries)}
    xs, states = inputs["x"], tuple(inputs[name] for name in case.carries)
    incoming = None if not states else states if len(states) == 2 else states[0]
    if case.lengths is None:
        ys, final = module(xs, incoming)
    else:
        lengths = torch.tensor(case.lengths)
        xs = rnn.pack_padded_sequence(
            xs, lengths, batch_first=True, enforce_sorted=False
        )
        ys, final = module(xs, incoming)
        ys, _ = rnn.pad_packed_sequence(ys, batch_first=True, total_length=case.time)

    final = final if isinstance(final, tuple) else (final,)
    results: dict[str, Any] = dict(zip(("ys", "h", "c"), (ys, *final), strict=False))
    parts = [(results[name] * tensors[f"to_{name}"]).sum() for name in results]
    torch.stack(parts).sum().backward()
    results |= {f"d_{name}": p.grad for name, p in module.named_parameters()}
    results |= {f"d_{name}": tensor.grad for name, tensor in inputs.items()}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def load(case: Case) -> Arrays:
    """Reads the golden file of a case."""
    with np.load(FOLDER / f"{case.name}.npz") as file:
        return dict(file)


def main() -> None:
    """Writes the golden file of each case."""
    for case in CASES:
        arrays = draw(case)
        contents: dict[str, Any] = arrays | run_torch(case, arrays)
        file = FOLDER / f"{case.name}.npz"
        np.savez_compressed(file, **contents)
        print(f"{file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
