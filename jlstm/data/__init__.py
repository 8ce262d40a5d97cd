"""Data: readers, vocabularies, padding, buckets, lanes, windows, and floors.

Everything takes and returns NumPy arrays. The functions that make batches return a
``grain.MapDataset`` of one epoch. ``len(data)`` is its number of batches, ``data[i]``
is one of them, and ``data.repeat(n)`` gives ``n`` epochs, each shuffled differently;
``data.repeat()`` never ends. ``iter(data)`` has ``get_state`` and ``set_state``, with
which a run continues where it stopped.
"""

from jlstm.data.buckets import bucketed
from jlstm.data.download import extract, fetch
from jlstm.data.floors import (
    majority,
    majority_by_symbol,
    naive_bayes,
    nearest_neighbour,
    ngram_bits,
    seasonal_naive,
)
from jlstm.data.formats import read_text, split_files
from jlstm.data.padding import bucket_lengths, pad
from jlstm.data.pipeline import batches
from jlstm.data.python_source import (
    TOKEN_CLASSES,
    python_sources,
    python_token_classes,
)
from jlstm.data.series import elapsed, windows
from jlstm.data.streams import lanes, scoring_lanes
from jlstm.data.text import Vocabulary

__all__ = [
    "TOKEN_CLASSES",
    "Vocabulary",
    "batches",
    "bucket_lengths",
    "bucketed",
    "elapsed",
    "extract",
    "fetch",
    "lanes",
    "majority",
    "majority_by_symbol",
    "naive_bayes",
    "nearest_neighbour",
    "ngram_bits",
    "pad",
    "python_sources",
    "python_token_classes",
    "read_text",
    "scoring_lanes",
    "seasonal_naive",
    "split_files",
    "windows",
]
