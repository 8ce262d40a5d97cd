"""One sequence, one cell: interchangeable loops, each tested against ``scan``.

A kernel is a module, or an object, with ``unroll``, of the signature of
:func:`jlstm.kernels.scan.unroll`, and ``why_not(cell, request)``, which gives the
reason why it cannot run a cell as a :class:`Request` asks, or ``None``. It may have
``note(cell, request, xs)``, for :func:`jlstm.explain`.
"""

from jlstm.kernels import associative, cudnn, fused, mlstm, native, scan
from jlstm.kernels.request import Request

# In the order in which they are chosen where none is named. What stands after "scan",
# which always can, runs where it is named alone. On two cores of a CPU, by
# tests/parallel_forms.py, "chunkwise" was 1.2 to 1.7 times as fast as "fused" forward,
# and 1.5 to 2.6 times with a gradient; "associative" was 0.4 to 1.5 times as fast
# forward, and 0.4 to 1.1 times with a gradient. None of the three has run on a GPU or a
# TPU, where "associative" should win if T is large: measure it there before it is a
# default.
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
