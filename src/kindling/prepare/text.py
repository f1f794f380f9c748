"""Text: a column of it as the tokens of a net that reads them, by the tokenizer that the net was trained with.

The tokenizer is one of the `tokenizers` library (the "fast" ones of transformers); its own file travels in the step,
so that a bundle needs nothing from elsewhere. Lists of ready tokens are `sequence.py`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kindling.errors import ConfigError, FormatError, MissingExtraError
from kindling.prepare.base import Packed, step_type
from kindling.prepare.sequence import SequenceStep

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 256
"""Texts that are split at a time."""


@step_type("tokens")
@dataclass(frozen=True)
class TokenStep(SequenceStep):
    """A text column as token numbers (N, L), L the longest row of the batch; shorter rows end in `padding`.

    Texts of more than `max_length` tokens are cut, what the tokenizer puts around a text stays. A row without any
    token is reported.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers  # doctest: +SKIP
    >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "?": 1, "good": 2, "day": 3}, "?"))  # doctest: +SKIP
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()  # doctest: +SKIP
    >>> step = TokenStep("tokens", "text", max_length=8, tokenizer=words.to_str())  # doctest: +SKIP
    >>> step.batch(step.pack(pa.RecordBatch.from_pydict({"text": ["good day", "day"]})).arrays)  # doctest: +SKIP
    tensor([[2, 3],
            [3, 0]])
    """

    tokenizer: str = dataclasses.field(default="", repr=False)
    """The tokenizer's own JSON: the text of `tokenizer.json`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tokenizer, str) or not self.tokenizer:
            raise ConfigError("tokenizer", str(self.tokenizer)[:40], "is no tokenizer", "Give tokenizer.json's text")
        if self.max_length < 2:
            raise ConfigError("max_length", self.max_length, "leaves no room for a text", "Use 2 or more")

    @cached_property
    def _opened(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError.of("Splitting text into tokens", "tokenizers", "hf") from None
        tokenizer = _guarded(lambda: Tokenizer.from_str(self.tokenizer), "cannot be read")
        tokenizer.no_padding()
        _guarded(lambda: tokenizer.enable_truncation(self.max_length), f"cannot cut texts to {self.max_length} tokens")
        return tokenizer

    def pack(self, rows: pa.RecordBatch) -> Packed:
        column = rows.column(rows.schema.get_field_index(self.column))
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            why = f"column {self.column!r} is {column.type}, not text"
            return self._packed(np.empty((0, self.max_length)), np.empty(0), dict.fromkeys(range(len(column)), why))
        texts = column.to_pylist()
        tokens: list[list[int] | None] = [None] * len(texts)
        given = [row for row, text in enumerate(texts) if text is not None]
        for at in range(0, len(given), _PIECE):
            piece = given[at : at + _PIECE]
            for row, found in zip(piece, self._split([texts[row] for row in piece]), strict=True):
                tokens[row] = found
        listed = pa.RecordBatch.from_arrays([pa.array(tokens, pa.list_(pa.int64()))], [self.column])
        packed = super().pack(listed)
        empty = packed.arrays[self.length_column] == 0
        if not empty.any():
            return packed
        good = np.array([row for row in range(len(texts)) if row not in packed.errors], np.int64)
        none = dict.fromkeys(good[empty].tolist(), f"column {self.column!r} holds a text without a token")
        arrays = {name: array[~empty] for name, array in packed.arrays.items()}
        return Packed(arrays, dict(sorted({**packed.errors, **none}.items())))

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        found = _guarded(lambda: self._opened.encode_batch(texts), "cannot split the texts")
        return [one.ids for one in found]

    def batch(self, arrays: Mapping[str, np.ndarray], rng: np.random.Generator | None = None) -> Tensor:
        import torch

        lengths = arrays[self.length_column]
        # Nets that were written down for any length were so for lengths of 2 and more.
        longest = max(int(lengths.max()) if len(lengths) else 0, 2)
        return torch.from_numpy(np.ascontiguousarray(arrays[self.name][:, :longest]))


def _guarded(call: Any, what: str) -> Any:
    """The library's own errors, and its panics, which are no `Exception`, as ours."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise FormatError(f"the tokenizer {what}: {line}.") from None
