"""Layers, which map sequences to sequences, and layers made of layers."""

from jlstm.layers.compose import (
    Residual,
    Stack,
    is_causal,
    pool,
    stack,
    step,
    with_implementation,
)
from jlstm.layers.conv import Conv, ConvCarry, ConvParams
from jlstm.layers.lifted import Lifted, lift
from jlstm.layers.pointwise import (
    Dense,
    DenseParams,
    Dropout,
    Embed,
    EmbedParams,
    LayerNorm,
    LayerNormParams,
)
from jlstm.layers.recurrent import (
    RNN,
    Bidirectional,
    BidirectionalCarry,
    BidirectionalParams,
    bidirectional,
    run_layer,
)
from jlstm.layers.summary import Summary, summary

__all__ = [
    "RNN",
    "Bidirectional",
    "BidirectionalCarry",
    "BidirectionalParams",
    "Conv",
    "ConvCarry",
    "ConvParams",
    "Dense",
    "DenseParams",
    "Dropout",
    "Embed",
    "EmbedParams",
    "LayerNorm",
    "LayerNormParams",
    "Lifted",
    "Residual",
    "Stack",
    "Summary",
    "bidirectional",
    "is_causal",
    "lift",
    "pool",
    "run_layer",
    "stack",
    "step",
    "summary",
    "with_implementation",
]
