"""Which layers of a file make up the net of one phase: `include` and `exclude` rules, levels and stages."""

from __future__ import annotations

from dataclasses import dataclass

from kindling.errors import FormatError
from kindling.formats.caffe.schema import Message, where


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What `include` and `exclude` rules are asked about."""

    phase: str = "TEST"
    """`"TRAIN"` or `"TEST"`."""
    level: int = 0
    stages: tuple[str, ...] = ()

    @classmethod
    def of(cls, message: Message, phase: str = "TEST") -> State:
        """From a NetState message; `phase` where it names none."""
        given = message.get("phase") if message.has("phase") else phase
        return cls(phase=given, level=message.get("level"), stages=tuple(message.all("stage")))


def select(layers: list[Message], state: State) -> list[Message]:
    """The layers that belong to the net in that state, in order.

    Raises: FormatError, for a layer with both kinds of rules.

    >>> from kindling.formats.caffe.prototxt import parse
    >>> net = parse('layer { name: "a" include { phase: TRAIN } } layer { name: "b" exclude { stage: "deploy" } }')
    >>> [layer.get("name") for layer in select(net.all("layer"), State(stages=("deploy",)))]
    []
    >>> [layer.get("name") for layer in select(net.all("layer"), State(phase="TRAIN"))]
    ['a', 'b']
    """
    kept = []
    for layer in layers:
        include, exclude = layer.all("include"), layer.all("exclude")
        if include and exclude:
            raise FormatError(
                f"layer {layer.get('name')!r}{where(layer.line)} has both include and exclude rules; Caffe takes one."
            )
        rules = [_meets(rule, state) for rule in include or exclude]
        if any(rules) if include else not any(rules):
            kept.append(layer)
    return kept


def _meets(rule: Message, state: State) -> bool:
    return (
        (not rule.has("phase") or rule.get("phase") == state.phase)
        and (not rule.has("min_level") or state.level >= rule.get("min_level"))
        and (not rule.has("max_level") or state.level <= rule.get("max_level"))
        and set(rule.all("stage")) <= set(state.stages)
        and not set(rule.all("not_stage")) & set(state.stages)
    )
