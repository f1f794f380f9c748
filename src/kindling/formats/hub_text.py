"""Nets of transformers that read text: `hf:NAME`, with their tokenizer as preparation.

Classifiers of texts come with their scores and labels. Other encoders give one vector a text, to be trained on or
featurised with. What is padding is told inside the net by the padding's number, so that a net has one input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, FormatError
from kindling.formats.models import Imported
from kindling.prepare import LabelStep, Preparation, TokenStep
from kindling.signature import Signature, TensorSpec

POOLINGS = ("mean", "first", "none")
LONGEST = 512
"""Tokens of a text, where the caller names no number and the net takes more."""
INPUT = "tokens"


class Wrapped(nn.Module):
    """A net of transformers behind one input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class TextScores(Wrapped):
    """Scores of a classifier of texts."""

    def __init__(self, net: nn.Module, padding: int) -> None:
        super().__init__(net)
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.padding).long()
        return self.net(input_ids=tokens, attention_mask=mask).logits  # type: ignore[no-any-return]


class TextVectors(TextScores):
    """What an encoder makes of a text: the mean over its tokens, its first token, or one vector for each."""

    def __init__(self, net: nn.Module, padding: int, pooling: str) -> None:
        super().__init__(net, padding)
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        kept = tokens != self.padding
        states: Tensor = self.net(input_ids=tokens, attention_mask=kept.long()).last_hidden_state
        if self.pooling == "first":
            return states[:, 0]
        weights = kept.to(states.dtype).unsqueeze(-1)
        if self.pooling == "none":
            return states * weights
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def reads_text(config: Any) -> bool:
    """Whether a configuration of transformers is that of a net of texts, not of photos."""
    from transformers.models.auto import modeling_auto

    named = str((getattr(config, "architectures", None) or [""])[0])
    photos = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    texts = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if named.endswith(("ForSequenceClassification", "ForMaskedLM")):
        return True
    return config.model_type in texts and (config.model_type not in photos or "Image" not in named)


def open_text(
    name: str,
    config: Any,
    weights: Any,
    *,
    column: str = "text",
    max_length: int | None = None,
    pooling: str | None = None,
) -> Imported:
    """A net of texts of transformers.

    Args:
        name: of a repository, or a folder.
        config: transformers' own.
        weights: as `hub.open_named` takes them.
        column: of the texts.
        max_length: most tokens of a text; what the net takes if None, and no more than 512.
        pooling: what an encoder gives for a text: `"mean"` over its tokens (the default), its `"first"`, or `"none"`:
            one vector for each token.
    Raises: ConfigError, for what cannot be; FormatError, for a repository without safetensors or a fast tokenizer.
    """
    import transformers

    from kindling import surgery
    from kindling.formats.hub import storable

    named = str((getattr(config, "architectures", None) or [""])[0])
    scores = named.endswith("ForSequenceClassification")
    if pooling is not None and (scores or pooling not in POOLINGS):
        hint = "Leave it out: the net gives scores" if scores else f"Use one of {', '.join(POOLINGS)}"
        raise ConfigError("pooling", pooling, f"is nothing that {name} can give", hint)
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise FormatError(f"{name} has no fast tokenizer (tokenizer.json), which kindling keeps with the model.")
    padding = config.pad_token_id if getattr(config, "pad_token_id", None) is not None else tokenizer.pad_token_id
    if padding is None:
        raise FormatError(f"{name} names no padding token: texts of several lengths make no batch.")
    if weights is None or weights == "pretrained":
        net = kind.from_pretrained(name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    else:
        from kindling.formats.files import open_weights
        from kindling.formats.weights import into

        net = into(kind.from_config(config), open_weights(weights), str(weights))
    longest = _longest(config, tokenizer, int(padding))
    length = min(longest, LONGEST) if max_length is None else max_length
    if not isinstance(length, int) or not 2 <= length <= longest:
        raise ConfigError("max_length", max_length, f"is more than {name} takes, or too few", f"Use 2 to {longest}")
    step = TokenStep(
        INPUT,
        column,
        max_length=length,
        padding=int(padding),
        size=int(net.get_input_embeddings().num_embeddings),
        tokenizer=tokenizer.backend_tokenizer.to_str(),
    )
    module: nn.Module = TextScores(net, int(padding)) if scores else TextVectors(net, int(padding), pooling or "mean")
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()  # else the graph leaves it out, and there would be none in training
    example = torch.full((3, 5), _other_than(int(padding)))
    axes = {0: torch.export.Dim("N", min=1, max=1 << 20), 1: torch.export.Dim("L", min=2, max=longest)}
    graph = storable(module, example, axes, f"hf:{name}")
    specs = {INPUT: TensorSpec(("N", f"L_{INPUT}"), step.dtype)}
    signature = surgery.infer_output_shapes(graph, Signature(specs, {}))
    labels = tuple(str(config.id2label[key]) for key in sorted(config.id2label)) if scores else None
    if labels is not None and (
        len(labels) < 2 or getattr(config, "problem_type", None) == "multi_label_classification"
    ):
        labels = None
    return Imported(
        module=graph,
        signature=signature,
        preparation=Preparation((step,), () if labels is None else (LabelStep("target", "label", labels),)),
        labels=labels,
        name=name.rpartition("/")[2],
    )


def _other_than(padding: int) -> int:
    return 1 if padding == 0 else 0


_BEHIND_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "longformer", "ibert",
    "data2vec-text", "xmod", "esm",
)  # fmt: skip
"""Nets that count positions from behind the padding's number."""


def _longest(config: Any, tokenizer: Any, padding: int) -> int:
    """Most tokens of a text that the net takes."""
    places = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20
    if config.model_type in _BEHIND_PADDING:
        places -= padding + 1
    return int(min(places, tokenizer.model_max_length, 1 << 20))
