"""One sequence, one cell: interchangeable loops, each tested against ``scan``.

A kernel is a module with ``unroll``, of the signature of
:func:`jlstm.kernels.scan.unroll`, and ``why_not(cell)``, which gives the reason why it
cannot run a cell, or ``None``.
"""

from jlstm.kernels import fused, scan

# In the order in which they are chosen where none is named.
IMPLEMENTATIONS = {"fused": fused, "scan": scan}

__all__ = ["IMPLEMENTATIONS"]
