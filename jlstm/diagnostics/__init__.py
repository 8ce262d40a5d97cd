"""Diagnostics: the gates, the memory and the gradients of a recurrent network.

The functions take a cell, a layer or a model with its params and a batch of inputs.
They answer questions such as how long units remember, how far gradients reach back, and
which inputs an answer rests on. Results print as text, and the ``plot_`` functions draw
them.
"""

from jlstm.diagnostics.attribution import Attribution, attribute, occlude
from jlstm.diagnostics.canvas import PALETTE, style
from jlstm.diagnostics.flow import Flow, GradientFlow, gradient_flow
from jlstm.diagnostics.health import Verdict, verdict
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
from jlstm.diagnostics.observe import trace
from jlstm.diagnostics.plots_flow import (
    plot_gradient_flow,
    plot_gradient_history,
    plot_jacobian_norms,
    plot_spectrum,
    plot_training,
)
from jlstm.diagnostics.plots_inputs import (
    plot_attention,
    plot_attribution,
    plot_text,
)
from jlstm.diagnostics.plots_memory import (
    plot_gates,
    plot_memory,
    plot_time_constants,
)
from jlstm.diagnostics.text import ColouredText, colour_text
from jlstm.diagnostics.traces import Trace, Traces
from jlstm.diagnostics.training import Watch, watch

__all__ = [
    "PALETTE",
    "Attribution",
    "ColouredText",
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
    "Watch",
    "Writes",
    "attribute",
    "colour_text",
    "dead_units",
    "gradient_flow",
    "jacobian_norms",
    "lyapunov_exponents",
    "occlude",
    "plot_attention",
    "plot_attribution",
    "plot_gates",
    "plot_gradient_flow",
    "plot_gradient_history",
    "plot_jacobian_norms",
    "plot_memory",
    "plot_spectrum",
    "plot_text",
    "plot_time_constants",
    "plot_training",
    "saturation",
    "spectrum",
    "style",
    "time_constants",
    "trace",
    "verdict",
    "watch",
    "writes",
]
