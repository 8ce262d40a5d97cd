"""What a recurrent network does: its gates, memory and gradients, measured."""

from jlstm.diagnostics.flow import Flow, GradientFlow, gradient_flow
from jlstm.diagnostics.memory import (
    DeadUnits,
    Saturation,
    TimeConstants,
    Writes,
    dead_units,
    saturation,
    time_constants,
    writes,
)
from jlstm.diagnostics.observe import Trace, Traces, trace
from jlstm.diagnostics.style import PALETTE, style

__all__ = [
    "PALETTE",
    "DeadUnits",
    "Flow",
    "GradientFlow",
    "Saturation",
    "TimeConstants",
    "Trace",
    "Traces",
    "Writes",
    "dead_units",
    "gradient_flow",
    "saturation",
    "style",
    "time_constants",
    "trace",
    "writes",
]
