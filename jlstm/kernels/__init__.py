"""Loops: interchangeable ways to run one cell over one sequence.

A loop is a module or an object with two functions. ``unroll`` has the signature of
:func:`jlstm.kernels.scan.unroll`, the reference with which the tests compare every
loop. ``why_not(cell, request)`` returns ``None`` if the loop can run the cell as a
:class:`Request` asks, and otherwise the reason why not. A loop may also have
``note(cell, request, xs)``, a remark for :func:`jlstm.explain`.
"""

from jlstm.kernels import associative, cudnn, fused, mlstm, native, scan
from jlstm.kernels.request import Request

# In the order in which they are tried if none is named. "scan" can run every cell, so
# the loops after it run only if they are named. On two cores of a CPU, measured by
# tests/parallel_forms.py, "chunkwise" was 1.2 to 1.7 times as fast as "fused" without a
# gradient, and 1.5 to 2.6 times with one; "associative" was 0.4 to 1.5 times as fast
# without, and 0.4 to 1.1 times with one. "chunkwise", "associative" and "parallel" have
# not run on a GPU or a TPU, where "associative" should win if T is large: measure it
# there before making it a default.
IMPLEMENTATIONS = {
    "native": native,
    "chunkwise": mlstm.CHUNKWISE,
    "fused": fused,
    "cudnn": cudnn,
    "scan": scan,
    "associative": associative,
    "parallel": mlstm.PARALLEL,
}

__all__ = ["IMPLEMENTATIONS", "Request"]
