"""PyTorch: modules, packed sequences, and a cell."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

import jlstm
from peers import D, Live, Module, T, load

H = 2
CELLS = {
    "LSTM": jlstm.LSTM(H, double_bias=True),
    "GRU": jlstm.GRU(H, double_bias=True),
    "RNN": jlstm.Elman(H, double_bias=True),
}


def _make(kind: str, **options: Any) -> Live:
    torch = load("torch")
    module = getattr(torch.nn, kind)(D, H, batch_first=True, **options)
    weights = {n: np.asarray(p.detach()) for n, p in module.named_parameters()}
    return Live(weights, evaluate=partial(_evaluate, module.double()))


def _make_projected(**options: Any) -> Live:
    torch = load("torch")
    options |= {"batch_first": True, "proj_size": H}
    module = torch.nn.LSTM(D, 3, **options).double()
    weights = {n: np.asarray(p.detach()) for n, p in module.named_parameters()}
    return Live(weights, evaluate=partial(_evaluate, module))


def _make_cell(kind: str) -> Live:
    torch = load("torch")
    cell = getattr(torch.nn, kind)(D, H).double()
    weights = {n: np.asarray(p.detach()) for n, p in cell.named_parameters()}
    return Live(weights, evaluate=partial(_evaluate, cell))


def _evaluate(module: Any, weights: Any, drawn: dict[str, Any]) -> tuple[Any, Any]:
    """Does with PyTorch what :func:`peers.evaluate` does with JAX."""
    torch = load("torch")
    inputs = {name: drawn[name] for name in ("xs", "carry")} | {"weights": weights}
    leaves, structure = jax.tree.flatten(inputs)
    leaves = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    tensors = structure.unflatten(leaves)
    run = _run_cell if type(module).__name__.endswith("Cell") else _run
    ys, carry = run(torch, module, tensors, drawn["lengths"])
    values = {"ys": [ys], "carry": carry}
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(drawn["to"]), strict=True)
    total = sum((a * torch.tensor(b)).sum() for a, b in pairs)
    gradients = structure.unflatten(torch.autograd.grad(total, leaves))
    return jax.tree.map(lambda leaf: leaf.detach().numpy(), (values, gradients))


def _run(torch: Any, module: Any, tensors: Any, lengths: Any) -> tuple[Any, Any]:
    rnn = load("torch.nn.utils.rnn")
    count = 2 if module.mode == "LSTM" else 1
    # From layer by layer, h and c, to all h and all c.
    states = tuple(torch.stack(tensors["carry"][i::count]) for i in range(count))
    xs, options = tensors["xs"], {"batch_first": True}
    if lengths is not None:
        lengths = torch.tensor(lengths).long()
        xs = rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False, **options)
    args = (xs, states if count == 2 else states[0])
    ys, final = torch.func.functional_call(module, tensors["weights"], args)
    if lengths is not None:
        ys, _ = rnn.pad_packed_sequence(ys, total_length=T, **options)
    final = final if count == 2 else (final,)
    return ys, [leaf for pair in zip(*final, strict=True) for leaf in pair]


def _run_cell(torch: Any, cell: Any, tensors: Any, lengths: Any) -> tuple[Any, Any]:
    del lengths
    carry: Any = tensors["carry"]
    single, ys = len(carry) == 1, []
    for x in tensors["xs"].unbind(1):
        args = (x, carry[0] if single else tuple(carry))
        carry = torch.func.functional_call(cell, tensors["weights"], args)
        carry = [carry] if single else carry
        ys.append(carry[0])
    return torch.stack(ys, 1), list(carry)


def _deep(cell: Any, layers: int, directions: int) -> Any:
    make = jlstm.bidirectional if directions == 2 else jlstm.RNN
    return jlstm.stack(*[make(cell)] * layers) if layers > 1 else make(cell)


def _module(kind: str, layers: int, directions: int) -> Module:
    options = {"num_layers": layers, "bidirectional": directions == 2}
    name = f"{kind} {layers}x{'bidirectional' if directions == 2 else 'forward'}"
    layer = _deep(CELLS[kind], layers, directions)
    return Module("torch", name, layer, partial(_make, kind, **options), lengths=True)


RELU = jlstm.RNN(jlstm.Elman(H, activation=jax.nn.relu, double_bias=True))
BIASES = {"zero": ("b", "b_hh"), "options": (("bias", False),)}

MODULES = [
    *(_module(kind, 1, 1) for kind in CELLS),
    *(_module(kind, 2, 2) for kind in CELLS),
    Module(
        "torch", "RNN relu", RELU, partial(_make, "RNN", nonlinearity="relu"), False
    ),
    Module(
        "torch",
        "LSTM without bias",
        jlstm.RNN(jlstm.LSTM(H)),
        partial(_make, "LSTM", bias=False),
        **BIASES,
    ),
    Module(
        "torch",
        "GRU without bias",
        jlstm.bidirectional(jlstm.GRU(H)),
        partial(_make, "GRU", bias=False, bidirectional=True),
        **BIASES,
    ),
    Module(
        "torch",
        "LSTM projected 2x bidirectional",
        jlstm.stack(
            *[jlstm.bidirectional(jlstm.LSTMP(3, H, double_bias=True))] * 2,
        ),
        partial(_make_projected, num_layers=2, bidirectional=True),
        lengths=True,
    ),
    Module(
        "torch",
        "LSTM projected to one bias",
        jlstm.RNN(jlstm.LSTMP(3, H)),
        _make_projected,
        told=False,
        folds=True,
    ),
    Module(
        "torch",
        "LSTM projected without bias",
        jlstm.RNN(jlstm.LSTMP(3, H)),
        partial(_make_projected, bias=False),
        **BIASES,
    ),
    Module(
        "torch",
        "LSTM to one bias",
        jlstm.RNN(jlstm.LSTM(H)),
        partial(_make, "LSTM"),
        told=False,
        folds=True,
    ),
    Module(
        "torch",
        "GRU to one bias",
        jlstm.RNN(jlstm.GRU(H)),
        partial(_make, "GRU"),
        told=False,
        folds=True,
    ),
    *(
        Module(
            "torch",
            f"{kind}Cell",
            jlstm.RNN(cell),
            partial(_make_cell, f"{kind}Cell"),
            bare=True,
        )
        for kind, cell in CELLS.items()
    ),
]
