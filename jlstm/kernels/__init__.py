"""One sequence, one cell: interchangeable loops, each tested against ``scan``.

A kernel is a module, or an object, with ``unroll``, of the signature of
:func:`jlstm.kernels.scan.unroll`, and ``why_not(cell, request)``, which gives the
reason why it cannot run a cell as a :class:`Request` asks, or ``None``. It may have
``note(cell, request, xs)``, for :func:`jlstm.explain`.
"""

from jlstm.kernels import associative, cudnn, fused, mlstm, native, scan
from jlstm.kernels.request import Request

# In the order in which they are chosen where none is named.
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
