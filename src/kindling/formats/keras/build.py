"""From a description and weights to a torch graph: layers in the order in which they can be called."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kindling.errors import FormatError, did_you_mean
from kindling.formats.channels import Flow
from kindling.formats.keras.config import Call, Layer, Net, Ref
from kindling.formats.keras.layers import MASKED, MERGES, ONE, aligned
from kindling.formats.keras.recurrent import Free, attention, bidirectional, recurrent, time_distributed
from kindling.formats.keras.site import Building, Site
from kindling.formats.keras.weights import Store

_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Subtract": operator.sub,
    "Multiply": operator.mul,
    "Divide": operator.truediv,
    "TrueDivide": operator.truediv,
}
"""Classes of `keras.ops` that `+ - * /` on tensors leave in a model."""
_ACTIVATIONS = {"Relu": "relu", "Relu6": "relu6", "Sigmoid": "sigmoid", "Tanh": "tanh", "Softmax": "softmax",
                "Silu": "silu", "Gelu": "gelu", "LeakyRelu": "leaky_relu", "Elu": "elu", "HardSigmoid": "hard_sigmoid",
                "HardSilu": "hard_silu", "Softplus": "softplus"}  # fmt: skip

_REGISTERED: dict[str, Callable[[Site], nn.Module]] = {}


def register_layer(kind: str, make: Callable[[Site], nn.Module]) -> None:
    """Teach the reader a class of layers of one's own, for this process; it comes before Keras's class of that name.

    The module is given the layer's inputs in Keras's order (channels last); its parameters and then its buffers take
    the layer's arrays in order, in the shapes that they have in the file.

    Args:
        kind: the class's name in the file.
        make: given the `Site` (the layer's `name`, `fields` and the `rows` it is called on), makes the torch module.

    >>> register_layer("Swish2", lambda site: nn.SiLU())
    >>> "Swish2" in registered(), forget_layer("Swish2"), "Swish2" in registered()
    (True, None, False)
    """
    _REGISTERED[kind] = make


def forget_layer(kind: str) -> None:
    """Undo `register_layer`."""
    _REGISTERED.pop(kind, None)


def registered() -> Mapping[str, Callable[[Site], nn.Module]]:
    """The classes that were registered."""
    return dict(_REGISTERED)


def build(
    building: Building, net: Net, store: Store, inputs: Sequence[Flow], prefix: str = "", frozen: bool = False
) -> list[Flow]:
    """Add a model's layers; returns its outputs.

    Raises: FormatError, naming the first layer that cannot be read and its type.
    """
    what = building.net.what
    if len(inputs) != len(net.inputs):
        raise FormatError(f"{what}: model {net.name[:80]!r} has {len(net.inputs)} inputs and is given {len(inputs)}.")
    layers = [layer for layer in net.layers if not layer.is_operation]
    stores = store.members([(layer.name, layer.kind) for layer in layers])
    by_name = {layer.name: own for layer, own in zip(layers, stores, strict=True)}
    done: dict[tuple[str, int], list[Flow]] = {
        (ref.layer, ref.call): [flow] for ref, flow in zip(net.inputs, inputs, strict=True)
    }
    waiting = [
        (layer, number, call)
        for layer in net.layers
        for number, call in enumerate(layer.calls)
        if (layer.name, number) not in done
    ]
    if len(waiting) > 20_000:
        raise FormatError(f"{what} calls its layers {len(waiting):,} times, which is refused.")
    while waiting:
        later = []
        for layer, number, call in waiting:
            if any((ref.layer, ref.call) not in done for ref in call.refs):
                later.append((layer, number, call))
                continue
            own = by_name.get(layer.name, store)
            name = f"{prefix}{layer.name}"
            site = Site(building, layer, own, name, frozen or layer.fields.get("trainable") is False)
            done[layer.name, number] = _called(site, call, done, number)
        if len(later) == len(waiting):
            layer = later[0][0]
            raise FormatError(
                f"{what}: layer {layer.name[:80]!r} ({layer.kind[:60]}) waits for a tensor that is never made."
            )
        waiting = later
    if id(net) not in building.finished:  # a model that is called again takes nothing again
        building.finished.add(id(net))
        for layer, own in zip(layers, stores, strict=True):
            if layer.model is None and layer.calls:
                own.done()
    return [_pick(done, ref, what) for ref in net.outputs]


def _pick(done: Mapping[tuple[str, int], list[Flow]], ref: Ref, what: str) -> Flow:
    flows = done.get((ref.layer, ref.call))
    if flows is None or ref.tensor >= len(flows):
        raise FormatError(f"{what}: layer {ref.layer[:80]!r} has no output {ref.tensor} of call {ref.call}.")
    return flows[ref.tensor]


def _called(site: Site, call: Call, done: Mapping[tuple[str, int], list[Flow]], number: int) -> list[Flow]:
    def flows(value: Any) -> Any:
        if isinstance(value, Ref):
            return _pick(done, value, site.building.net.what)
        if isinstance(value, list):
            return [flows(part) for part in value]
        return {key: flows(part) for key, part in value.items()} if isinstance(value, dict) else value

    found = apply(
        site, tuple(flows(arg) for arg in call.args), {key: flows(value) for key, value in call.kwargs.items()}
    )
    return found if isinstance(found, list) else [found]


def apply(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow | list[Flow]:
    """Add one call of one layer."""
    layer, building = site.layer, site.building
    if site.frozen and site.name not in building.frozen:
        building.frozen.append(site.name)
    if layer.model is not None:
        given = _flat(args)
        return build(building, layer.model, site.store, given, f"{site.name}/", site.frozen)
    policy = layer.fields.get("dtype")
    if isinstance(policy, dict) and "Quantized" in str(policy.get("class_name")):
        raise site.fail("is quantised, which is not read. Load the model that it was made from")
    mask = kwargs.get("mask")
    if isinstance(mask, Flow) and args and isinstance(args[0], Flow):
        args = (replace(args[0], mask=mask.wire), *args[1:])
    custom = building.custom.get(layer.kind) or _REGISTERED.get(layer.kind)
    if custom is not None:
        return _custom(site, custom, _flat(args))
    if layer.is_operation:
        return _operation(site, args)
    free = _FREE.get(layer.kind)
    if free is not None:
        return free(site, args, kwargs)
    given = _flat(args)
    many = MERGES.get(layer.kind)
    if many is not None:
        if len(given) < 2:  # an operation with a number, in files that do not tell it from the layer of its name
            return _operation(site, args)
        return many(site, [_unmasked(site, flow) for flow in given])
    one = ONE.get(layer.kind)
    if one is None:
        return _operation(site, args)
    if len(given) != 1:
        raise site.fail(f"is called on {len(given)} tensors")
    return one(site, given[0] if layer.kind in MASKED else _unmasked(site, given[0]))


def _flat(args: Sequence[Any]) -> list[Flow]:
    found: list[Flow] = []
    for arg in args:
        if isinstance(arg, Flow):
            found.append(arg)
        elif isinstance(arg, list):
            found += _flat(arg)
    return found


def _unmasked(site: Site, flow: Flow) -> Flow:
    if flow.mask is not None:
        raise site.fail("is given a sequence with masked steps, which is not read for this type")
    return flow


def _unknown(site: Site) -> FormatError:
    hint = "kindling.formats.keras.register_layer teaches the reader a layer of your own"
    if site.kind in ("Lambda", "TFOpLambda", "SlicingOpLambda"):
        return site.fail(f"holds Python code, which is not run; {hint}")
    known = [*ONE, *MERGES, *_FREE]
    return site.fail(f"is of a type that is not read; {hint}.{did_you_mean(site.kind[:60], known)}".rstrip(".?"))


def _custom(site: Site, make: Callable[[Site], nn.Module], flows: list[Flow]) -> Flow | list[Flow]:
    flows = [site.building.mover.plain(_unmasked(site, flow)) for flow in flows]
    site = replace(site, rows=tuple(flow.row for flow in flows))

    def made() -> nn.Module:
        try:
            module = make(site)
        except FormatError:
            raise
        except Exception as error:
            seen = f"{type(error).__name__}: {error}"
            raise site.fail(f"cannot be made by the function registered for it: {seen}") from error
        if not isinstance(module, nn.Module):
            raise site.fail(f"was registered with a function that makes a {type(module).__name__}, no torch module")
        return module

    def tensors() -> dict[str, Tensor]:
        with torch.device("meta"):
            module = made()
        parts = [*module.named_parameters(), *module.named_buffers()]
        return {name: site.take(name, *part.shape) for name, part in parts}

    out = site.module("", made, *(flow.wire for flow in flows), tensors=tensors)
    if isinstance(out.value, Tensor):
        return Flow(out)
    return [Flow(site.call(f"{place}", operator.getitem, out, place)) for place in range(len(out.value))]


def _operation(site: Site, args: tuple[Any, ...]) -> Flow:
    """`+ - * /` between tensors and numbers, and activations called as functions."""
    function, name = _OPERATIONS.get(site.kind), _ACTIVATIONS.get(site.kind)
    if name is not None and len(args) == 1 and isinstance(args[0], Flow):
        return site.activate(_unmasked(site, args[0]), {"class_name": name, "config": dict(site.fields)}, "")
    if site.kind in ("NotEqual", "Any") and args and isinstance(args[0], Flow):  # what makes masks
        flow = site.building.mover.plain(_unmasked(site, args[0]))
        if site.kind == "Any" and site.fields.get("axis") in (-1, flow.rank - 1):
            return Flow(site.call("", torch.any, flow.wire, -1))
        if site.kind == "NotEqual" and len(args) == 2 and isinstance(args[1], int | float):
            return Flow(site.call("", torch.not_equal, flow.wire, args[1]))
    if function is None or len(args) != 2:
        raise _unknown(site)
    flows = [_unmasked(site, arg) for arg in args if isinstance(arg, Flow)]
    numbers = [arg for arg in args if isinstance(arg, int | float) and not isinstance(arg, bool)]
    if not flows or len(flows) + len(numbers) != 2:
        raise site.fail("is called on something other than tensors and numbers")
    if len(flows) == 1:
        flow = flows[0]
        pair = [arg.wire if isinstance(arg, Flow) else arg for arg in args]
        return Flow(site.call("", function, *pair), flow.moved)
    if len({flow.rank for flow in flows}) > 1:  # numpy's rule puts axes in front, where the batch is
        raise site.fail(f"is called on rows of shapes {[flow.row for flow in flows]}")
    wires, moved = aligned(site, flows)
    return Flow(site.call("", function, *wires), moved)


def _step(site: Site, layer: Layer, flow: Flow) -> Flow:
    """The layer of a TimeDistributed."""
    inner = replace(site, layer=layer, store=site.store.part("layer"), name=f"{site.name}/{layer.name}")
    found = apply(inner, (flow,), {})
    if isinstance(found, list):
        if len(found) != 1:
            raise site.fail("wraps a layer with several outputs, which is not read")
        found = found[0]
    return found


_FREE: Mapping[str, Free] = {
    "Bidirectional": bidirectional,
    "GRU": recurrent,
    "LSTM": recurrent,
    "MultiHeadAttention": attention,
    "SimpleRNN": recurrent,
    "TimeDistributed": time_distributed(_step),
}


def consumers(net: Net, ref: Ref) -> list[Layer]:
    """The layers that are called on a tensor, looking into models."""
    found: list[Layer] = []
    for layer in net.layers:
        for call in layer.calls:
            places = [place for place, one in enumerate(call.refs) if one == ref]
            if places and layer.model is not None and max(places) < len(layer.model.inputs):
                found += [part for place in places for part in consumers(layer.model, layer.model.inputs[place])]
            elif places:
                found.append(layer)
    return found


def has_channels_first(net: Net) -> bool:
    """Whether a layer of the net has its channels in front."""
    return any(
        layer.fields.get("data_format") == "channels_first"
        or (layer.model is not None and has_channels_first(layer.model))
        for layer in net.layers
    )
