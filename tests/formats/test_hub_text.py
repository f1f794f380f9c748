"""Nets of texts of transformers: equal to the library's own, with their tokenizer, from folders made here."""

from __future__ import annotations

import importlib.util
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kindling as kd
from kindling.errors import ConfigError, FormatError
from kindling.formats.hub import torchvision_first

pytestmark = [
    pytest.mark.slow,  # transformers takes its time to import
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

TEXTS = ["w1 w2 w3 unknown", "w5", "w3 " * 60]
SIZES = {
    "vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16,
    "max_position_embeddings": 240,
}  # fmt: skip
ADAM = partial(torch.optim.Adam, lr=0.01)
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}


def library() -> Any:
    torchvision_first()
    import transformers

    return transformers


def tokenizer(padding: int = 0) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(46))]
    words.insert(padding, "[PAD]")
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    )
    return library().PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=30,
    )  # fmt: skip


def kept(folder: Path, net: Any, padding: int = 0) -> str:
    net.save_pretrained(folder)
    tokenizer(padding).save_pretrained(folder)
    return f"hf:{folder}"


def by_the_library(net: Any, padding: int = 0) -> tuple[Any, torch.Tensor]:
    words = tokenizer(padding)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return net(input_ids=words["input_ids"], attention_mask=words["attention_mask"]), words["attention_mask"]


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert", "GPT2"])
def test_classifiers_give_the_scores_of_the_library(tmp_path: Path, family: str) -> None:
    transformers, padding = library(), 1 if family == "Roberta" else 0
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES
    if family == "DistilBert":
        sizes = {"vocab_size": 50, "n_layers": 1, "n_heads": 2, "dim": 16, "hidden_dim": 32}
    if family == "GPT2":
        sizes = {"vocab_size": 50, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 240}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = getattr(transformers, f"{family}Config")(**sizes, **LABELS, pad_token_id=padding, **ends)
    net = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    model = kd.load(kept(tmp_path / "net", net, padding))
    shutil.rmtree(tmp_path / "net")
    assert model.labels == ("bad", "fair", "good")
    scores = by_the_library(net, padding)[0].logits.softmax(1)
    found = model.predict(TEXTS, top_k=3)
    for row, truth in zip(found, scores, strict=True):
        shares = {one["label"]: one["probability"] for one in row["top_k"]}
        assert [shares[label] for label in model.labels] == pytest.approx(truth.tolist(), abs=1e-5)
    assert any(isinstance(layer, nn.Dropout) for layer in model.module.modules())
    model.save(tmp_path / "bundle")
    again = kd.load(tmp_path / "bundle").predict(TEXTS)
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in found], abs=1e-6)


def test_encoders_give_a_vector_a_text(tmp_path: Path) -> None:
    transformers = library()
    torch.manual_seed(0)
    net = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    name = kept(tmp_path / "net", net)
    made, mask = by_the_library(net)
    states, mask = made.last_hidden_state, mask[..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    for pooling, truth in ((None, mean), ("first", states[:, 0])):
        model = kd.load(name, max_length=30, **({} if pooling is None else {"pooling": pooling}))
        assert model.labels is None
        (spec,) = model.signature.outputs.values()
        assert spec.shape == ("N", 16)
        found = torch.stack([torch.as_tensor(row["prediction"]) for row in model.predict(TEXTS)])
        torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-4)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    again = kd.load(name, weights=tmp_path / "w.pth", column="words", pooling="none")
    (spec,) = again.signature.outputs.values()
    assert (spec.shape[0], spec.shape[2]) == ("N", 16)
    (step,) = again.preparation.inputs
    assert step.column == "words"
    with pytest.raises(ConfigError, match="Use 2 to 30"):
        kd.load(name, max_length=31)
    with pytest.raises(ConfigError, match="Use one of mean"):
        kd.load(name, pooling="last")
    with pytest.raises(ConfigError, match="reads text"):
        kd.load(name, image={})
    with pytest.raises(ConfigError, match="mean nothing for"):
        kd.load(name, length=3)
    (tmp_path / "net" / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"transformers cannot load|fast tokenizer"):
        kd.load(name)


@pytest.mark.spark
def test_an_encoder_is_trained_and_predicts_on_spark(spark: Any, tmp_path: Path) -> None:
    transformers = library()
    torch.manual_seed(0)
    net = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=50, n_layers=1, n_heads=2, dim=16, hidden_dim=32)
    )
    encoder = kd.load(kept(tmp_path / "net", net))
    rows = [(f"w{number % 7} w{30 + number % 2}", "odd" if number % 2 else "even", number) for number in range(64)]
    df = spark.createDataFrame(rows, "text string, label string, id int").repartition(2)
    model = encoder.then(nn.Linear(16, 2), labels=("even", "odd"))
    trained = model.fit(df, workers=2, epochs=12, batch_size=16, key="id", optimizer=ADAM, progress=False)
    first, last = (trained.history[-1]["epochs"][place]["loss"] for place in (0, -1))
    assert last < first / 2
    table = trained.predict(df.select("text", "id")).collect()
    assert len(table) == 64
    assert trained.evaluate(df).accuracy == 1.0
