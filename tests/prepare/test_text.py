"""Texts to tokens by a tokenizer that the step carries: what is kept, cut and refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kindling.errors import ConfigError, FormatError
from kindling.prepare import Preparation, TokenStep
from kindling.prepare.base import step_from_json

pytest.importorskip("tokenizers")

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "day")


def tokenizer(*, ends: bool = True) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return str(made.to_str())


def step(**fields: Any) -> TokenStep:
    return TokenStep("tokens", "text", **{"max_length": 6, "size": 7, "tokenizer": tokenizer(), **fields})


def rows(*texts: Any, kind: pa.DataType | None = None) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(texts, kind or pa.string())], ["text"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_texts_become_tokens_as_wide_as_the_longest(kind: pa.DataType) -> None:
    packed = step().pack(rows("a day", None, "good bad", "", kind=kind))
    assert packed.errors == {1: "column 'text' is null"}
    assert packed.arrays["tokens"].shape == (3, 6)
    tensor = step().batch(packed.arrays)
    assert tensor.tolist() == [[2, 4, 6, 3], [2, 5, 1, 3], [2, 3, 0, 0]]
    assert step(padding=5).batch(step(padding=5).pack(rows("a", "a day")).arrays).tolist() == [
        [2, 4, 3, 5],
        [2, 4, 6, 3],
    ]


def test_long_texts_keep_their_ends() -> None:
    packed = step().pack(rows("a a a a a a a a", "day"))
    assert packed.arrays["tokens"].tolist() == [[2, 4, 4, 4, 4, 3], [2, 6, 3, 0, 0, 0]]
    assert packed.arrays["tokens length"].tolist() == [6, 3]


def test_many_texts_are_each_split_alone() -> None:
    texts = [" ".join(["good"] * (number % 4)) for number in range(700)]
    arrays = step().pack(rows(*texts)).arrays
    np.testing.assert_array_equal(arrays["tokens length"], [number % 4 + 2 for number in range(700)])


def test_rows_that_are_no_text_for_the_net_are_reported() -> None:
    bare = step(tokenizer=tokenizer(ends=False))
    packed = bare.pack(rows("a", " ", None, "day day"))
    assert packed.arrays["tokens"].tolist() == [[4, 0, 0, 0, 0, 0], [6, 6, 0, 0, 0, 0]]
    assert packed.errors == {1: "column 'text' holds a text without a token", 2: "column 'text' is null"}
    assert bare.batch(bare.pack(rows("a")).arrays).tolist() == [[4, 0]]  # never one token wide
    (why,) = step(size=6).pack(rows("day")).errors.values()
    assert why == "column 'text' holds 6, not an index below 6"
    (why,) = step().pack(rows(3, kind=pa.int64())).errors.values()
    assert "is int64, not text" in why


def test_the_tokenizer_travels_in_the_step() -> None:
    kept = json.loads(json.dumps(Preparation((step(),)).to_json()))
    again = step_from_json(kept["inputs"][0])
    assert again == step()
    assert len(repr(again)) < 200
    assert again.pack(rows("a day")).arrays["tokens"].tolist() == [[2, 4, 6, 3, 0, 0]]


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"model": {"type": "WordLevel"}}', "[" * 10_000])
def test_what_is_no_tokenizer_is_said(text: str) -> None:
    with pytest.raises(FormatError, match="the tokenizer cannot be read"):
        step(tokenizer=text).pack(rows("a"))


@pytest.mark.parametrize(
    ("fields", "words"), [({"tokenizer": ""}, "is no tokenizer"), ({"max_length": 1}, "leaves no room for a text")]
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        step(**fields)
