"""What a recurrent network does: its gates, memory and gradients, measured."""

from jlstm.diagnostics.flow import Flow, GradientFlow, gradient_flow
from jlstm.diagnostics.jacobians import (
    JacobianNorms,
    Lyapunov,
    Spectrum,
    jacobian_norms,
    lyapunov_exponents,
    spectrum,
)
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
from jlstm.diagnostics.verdict import Verdict, verdict

__all__ = [
    "PALETTE",
    "DeadUnits",
    "Flow",
    "GradientFlow",
    "JacobianNorms",
    "Lyapunov",
    "Saturation",
    "Spectrum",
    "TimeConstants",
    "Trace",
    "Traces",
    "Verdict",
    "Writes",
    "dead_units",
    "gradient_flow",
    "jacobian_norms",
    "lyapunov_exponents",
    "saturation",
    "spectrum",
    "style",
    "time_constants",
    "trace",
    "verdict",
    "writes",
]
