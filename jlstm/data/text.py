"""Vocabularies: symbols as integers, and back."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text, either characters or words, and their ids.

    The id of a symbol is its index in ``symbols``. Make one from a text with
    :meth:`from_text` or :meth:`from_words`.

    Attributes:
      symbols: the symbols, all different.
      unknown: the symbol that stands for all others, one of ``symbols``. If it is None,
        other symbols are an error.
      separator: what :meth:`decode` puts between symbols: nothing for characters, a
        space for words.

    Example:
      >>> vocabulary = jlstm.data.Vocabulary.from_text("banana")
      >>> vocabulary.encode("nab").tolist(), vocabulary.decode([1, 0, 2])
      ([2, 0, 1], 'ban')
    """

    symbols: tuple[str, ...]
    unknown: str | None = None
    separator: str = ""

    def __post_init__(self) -> None:
        if not self.symbols or len(set(self.symbols)) < len(self.symbols):
            raise ValueError(
                f"Vocabulary: symbols must all be different, got {len(self.symbols)}, "
                f"of which {len(set(self.symbols))} are different"
            )
        if self.unknown is not None and self.unknown not in self.symbols:
            raise ValueError(
                f"Vocabulary: unknown={self.unknown!r} is not among the symbols; add it"
            )

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """Makes the vocabulary of the characters of a text, sorted by their codes.

        Args:
          text: the text; to score another one, give both joined, so that the vocabulary
            has its characters too.

        Returns:
          The vocabulary, without an unknown symbol.
        """
        return cls(tuple(sorted(set(text))))

    @classmethod
    def from_words(
        cls,
        words: Iterable[str],
        *,
        max_size: int | None = None,
        min_count: int = 1,
        unknown: str | None = "<unk>",
    ) -> Vocabulary:
        """Makes the vocabulary of a list of words, the most frequent ones first.

        Args:
          words: the words of the training text, with repetitions.
          max_size: the largest number of symbols, the unknown one included; None keeps
            all.
          min_count: words that occur less often are left out.
          unknown: the symbol for words that are left out, which gets id 0; None makes
            such words an error.

        Returns:
          The vocabulary. Words of equal frequency are in alphabetical order.

        Example:
          >>> words = "the cat and the dog".split()
          >>> jlstm.data.Vocabulary.from_words(words, max_size=3).symbols
          ('<unk>', 'the', 'and')
        """
        counts = collections.Counter(words)
        first = () if unknown is None else (unknown,)
        kept = [w for w, n in counts.items() if n >= min_count and w not in first]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls((*first, *kept)[:max_size], unknown, separator=" ")

    def __len__(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, symbols: str | Iterable[str]) -> np.ndarray:
        """Turns a text, or a list of words, into ids.

        Args:
          symbols: a string for a vocabulary of characters, a list of words for one of
            words.

        Returns:
          The ids ``[N]``, int32.

        Raises:
          ValueError: the vocabulary lacks a symbol and has no unknown one, or a text
            was given where words are expected.
        """
        if self.separator and isinstance(symbols, str):
            raise ValueError(
                "Vocabulary.encode: a vocabulary of words takes a list of words, got a "
                "str; split it first"
            )
        symbols = symbols if isinstance(symbols, str) else list(symbols)
        other = -1 if self.unknown is None else self._ids[self.unknown]
        found = map(self._ids.get, symbols, itertools.repeat(other))
        ids = np.fromiter(found, np.int32, len(symbols))
        if self.unknown is None and (ids < 0).any():
            position = int((ids < 0).argmax())
            raise ValueError(
                f"Vocabulary.encode: {symbols[position]!r} at position {position} is "
                f"not among the {len(self)} symbols; build the vocabulary from text "
                "that has it, or give the vocabulary an unknown symbol"
            )
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """Turns ids back into text.

        Args:
          ids: ``[N]``, integers.

        Returns:
          The symbols, joined by ``separator``.

        Raises:
          ValueError: an id is outside the vocabulary, or the ids are not integers
            ``[N]``.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                "Vocabulary.decode: ids must be integers [N], got "
                f"{array.dtype} of shape {array.shape}"
            )
        outside = (array < 0) | (array >= len(self))
        if outside.any():
            position = int(outside.argmax())
            raise ValueError(
                f"Vocabulary.decode: id {array[position]} at position {position} is "
                f"outside the vocabulary of {len(self)} symbols"
            )
        return self.separator.join(self.symbols[i] for i in array.tolist())

    def to_json(self) -> str:
        """Writes the vocabulary as JSON, to be saved beside a model."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Reads a vocabulary that :meth:`to_json` wrote.

        Args:
          text: the JSON text.

        Returns:
          The vocabulary.

        Raises:
          ValueError: :meth:`to_json` did not write the text.
        """
        try:
            fields = json.loads(text)
            return cls(**{**fields, "symbols": tuple(fields["symbols"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"Vocabulary.from_json: expected what to_json wrote: {error}"
            ) from error
