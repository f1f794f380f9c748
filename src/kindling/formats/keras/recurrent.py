"""Keras's recurrent layers, its wrappers around layers, and attention: what looks at more than one tensor by name.

Gates of an LSTM stand in the same order in Keras and torch; a GRU's first two are exchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kindling.formats.assemble import Wire
from kindling.formats.channels import Flow
from kindling.formats.keras.config import Layer, inner_layer
from kindling.formats.keras.site import Site
from kindling.formats.keras.weights import Fresh
from kindling.nets.layers_keras import ACTIVATIONS, KerasAttention, KerasRNN

Free = Callable[[Site, tuple[Any, ...], Mapping[str, Any]], "Flow | list[Flow]"]
Apply = Callable[[Site, Layer, Flow], Flow]

_KINDS = {"LSTM": "lstm", "GRU": "gru", "SimpleRNN": "simple"}
_GATES = {"lstm": 4, "gru": 3, "simple": 1}


def recurrent(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow | list[Flow]:
    """LSTM, GRU and SimpleRNN."""
    flow, initial = _given(site, args, kwargs)
    return _run(site, "", site.layer, flow, initial)


def _given(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Flow, list[Flow]]:
    """The sequence, and the states it begins with."""
    values = [*args]
    if values and isinstance(values[0], list):  # Keras 2 puts the states behind the sequence
        values = [values[0][0], *values[0][1:], *values[1:]]
    initial = [value for value in values[1:] if isinstance(value, Flow)]
    state = kwargs.get("initial_state")
    if state is not None:
        initial = list(state) if isinstance(state, list) else [state]
    if not values or not all(isinstance(flow, Flow) for flow in (values[0], *initial)):
        raise site.fail("is not called on a sequence")
    if values[0].rank != 3:
        raise site.fail(f"works on sequences, and is given rows of shape {values[0].row}")
    return values[0], initial


def _run(site: Site, part: str, layer: Layer, flow: Flow, initial: list[Flow]) -> Flow | list[Flow]:
    inner = replace(site, layer=layer)
    kind = _KINDS[layer.kind]
    units, bias = inner.whole("units"), inner.flag("use_bias", True)
    gates = _GATES[kind]
    wire = site.last(flow)
    features = wire.row[-1]
    reset_after = inner.flag("reset_after", False) if kind == "gru" else True
    sequences, backwards = inner.flag("return_sequences", False), inner.flag("go_backwards", False)
    states, zero_output = inner.flag("return_state", False), inner.flag("zero_output_for_mask", False)
    inner.unset("time_major")
    if inner.flag("stateful", False):
        site.note("it kept its state from batch to batch; here every batch begins with zeros")
    if inner.fields.get("dropout") or inner.fields.get("recurrent_dropout"):
        site.note("its dropout acts in training only and is left out")
    act, gate = (
        _name(site, inner.fields.get(key, default))
        for key, default in (("activation", "tanh"), ("recurrent_activation", "sigmoid"))
    )
    store = site.store.part(part) if part else site.store

    def tensors() -> dict[str, Tensor]:
        cell = store.part("cell")
        weights = {
            "rnn.weight_ih_l0": cell.take("kernel", (features, gates * units), inner.fields).T,
            "rnn.weight_hh_l0": cell.take("recurrent_kernel", (units, gates * units), inner.fields).T,
        }
        if bias:
            both = kind == "gru" and reset_after
            given = cell.take("bias", (2, gates * units) if both else (gates * units,), inner.fields)
            own, other = (given[0], given[1]) if both else (given, torch.zeros_like(given))
            if kind == "lstm" and isinstance(cell, Fresh) and inner.flag("unit_forget_bias", True):
                own[units : 2 * units] = 1.0
            weights |= {"rnn.bias_ih_l0": own, "rnn.bias_hh_l0": other}
        if kind == "gru":
            for name, value in weights.items():
                update, reset, new = value.chunk(3, 0)
                weights[name] = torch.cat([reset, update, new])
        return weights

    held = [] if kind == "gru" and reset_after else ["rnn.bias_hh_l0"]
    inputs: list[Wire] = [wire]
    if flow.mask is not None:
        inputs.append(flow.mask)
    if initial and len(initial) != (2 if kind == "lstm" else 1):
        raise site.fail(f"is given {len(initial)} states")
    inputs += [site.last(state) for state in initial]
    masked = flow.mask is not None
    label = part.removesuffix("_layer")
    out = site.module(
        label,
        lambda: KerasRNN(
            kind, features, units, act, gate, bias, reset_after, sequences, backwards, states, zero_output, masked
        ),
        *inputs,
        tensors=tensors,
        held=held,
    )
    mask = flow.mask if sequences else None
    if not states:
        return Flow(out, mask=mask)
    parts = [site.call(f"{label}_{place}", operator.getitem, out, place) for place in range(len(out.value))]
    return [Flow(parts[0], mask=mask), *(Flow(state) for state in parts[1:])]


def _name(site: Site, given: Any) -> str:
    """The name of an activation inside a recurrent layer."""
    name, _ = site.activation_name(given)
    if name == "hard_sigmoid" and site.building.major < 3:
        name = "hard_sigmoid_2"
    if name not in ACTIVATIONS:
        raise site.fail(f"has activation {name[:60]!r} inside, which is not read")
    return name


def bidirectional(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow | list[Flow]:
    """One layer forwards, its twin backwards, and both together."""
    forward = inner_layer(site.layer, "layer", site.what)
    if forward.kind not in _KINDS:
        raise site.fail(f"wraps a {forward.kind[:60]}; {', '.join(_KINDS)} are read")
    given = site.fields.get("backward_layer")
    twin = {**forward.fields, "go_backwards": not forward.fields.get("go_backwards", False)}
    backward = (
        inner_layer(Layer("", "", site.fields), "backward_layer", site.what)
        if given
        else Layer(forward.name, forward.kind, twin)
    )
    if backward.kind not in _KINDS:
        raise site.fail(f"wraps a {backward.kind[:60]}; {', '.join(_KINDS)} are read")
    mode = (
        site.text("merge_mode", "concat", "concat", "sum", "mul", "ave")
        if site.fields.get("merge_mode", "") is not None
        else None
    )
    flow, initial = _given(site, args, kwargs)
    half = len(initial) // 2
    outs = []
    for part, layer, begin in (
        ("forward_layer", forward, initial[:half]),
        ("backward_layer", backward, initial[half:]),
    ):
        found = _run(site, part, layer, flow, begin)
        outs.append(found if isinstance(found, list) else [found])
    ahead, behind = outs[0][0], outs[1][0]
    if forward.fields.get("return_sequences"):
        back = site.call("turned", torch.flip, behind.wire, [1])
        behind = replace(behind, wire=back)
    states = [*outs[0][1:], *outs[1][1:]]
    if mode is None:
        return [ahead, behind, *states]
    if mode == "concat":
        wire = site.call("", torch.cat, [ahead.wire, behind.wire], -1)
    else:
        wire = site.call(
            "both" if mode == "ave" else "", operator.mul if mode == "mul" else operator.add, ahead.wire, behind.wire
        )
        wire = site.call("", operator.truediv, wire, 2) if mode == "ave" else wire
    flow = Flow(wire, mask=ahead.mask)
    return [flow, *states] if states else flow


def time_distributed(apply: Apply) -> Free:
    """A layer on every step by itself."""

    def make(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow:
        if len(args) != 1 or not isinstance(args[0], Flow) or args[0].rank < 3:
            raise site.fail("is not called on a sequence")
        flow = args[0]
        layer = inner_layer(site.layer, "layer", site.what)
        wire = site.last(flow)
        steps = wire.row[0]
        rows = Flow(site.method("steps", "reshape", wire, -1, *wire.row[1:]))
        out = apply(site, layer, rows)
        plain = site.last(out)
        return Flow(site.method("", "reshape", plain, -1, steps, *plain.row), mask=flow.mask)

    return make


def attention(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Flow:
    """MultiHeadAttention."""
    names = ("query", "value", "key")
    given = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
    query, value = given.get("query"), given.get("value")
    key = given.get("key") or value
    for name in ("attention_mask", "query_mask", "value_mask", "key_mask", "return_attention_scores"):
        if kwargs.get(name) not in (None, False):
            raise site.fail(f"is called with {name}, which is not read")
    site.unset("use_gate", "sliding_window")
    if site.fields.get("attention_axes") not in (None, 1, [1]):
        raise site.fail("attends over axes other than the first of a row, which is not read")
    flows = [flow for flow in (query, value, key) if isinstance(flow, Flow)]
    if len(flows) != 3 or any(flow.rank != 3 for flow in flows):
        raise site.fail("is not called on sequences of (time, features)")
    heads, key_dim = site.whole("num_heads"), site.whole("key_dim")
    value_dim = site.whole("value_dim", default=key_dim)
    shape = site.fields.get("output_shape")
    wires = [site.last(flow) for flow in flows]
    q_in, v_in, k_in = (wire.row[-1] for wire in wires)
    if isinstance(shape, list) and len(shape) == 1:
        shape = shape[0]
    if shape is not None and (isinstance(shape, bool) or not isinstance(shape, int) or not 0 < shape < 2**31):
        raise site.fail(f"has output_shape={str(shape)[:60]}")
    out, bias, dropout = shape or q_in, site.flag("use_bias", True), site.number("dropout", 0.0)
    causal = kwargs.get("use_causal_mask") is True

    def tensors() -> dict[str, Tensor]:
        found = {}
        for name, features, size in (("query", q_in, key_dim), ("key", k_in, key_dim), ("value", v_in, value_dim)):
            part = site.store.part(f"{name}_dense")
            kernel = part.take("kernel", (features, heads, size), site.fields)
            found[f"{name}.weight"] = kernel.reshape(features, heads * size).T
            if bias:
                found[f"{name}.bias"] = part.take("bias", (heads, size), site.fields).reshape(-1)
        part = site.store.part("output_dense")
        found["output.weight"] = part.take("kernel", (heads, value_dim, out), site.fields).reshape(-1, out).T
        return found | ({"output.bias": part.take("bias", (out,), site.fields)} if bias else {})

    wire = site.module(
        "",
        lambda: KerasAttention(heads, key_dim, value_dim, q_in, v_in, k_in, out, bias, dropout, causal),
        *wires,
        tensors=tensors,
    )
    return Flow(wire)
