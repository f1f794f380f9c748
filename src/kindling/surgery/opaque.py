"""Modules that cannot be traced: running them whole, stopping at named submodules, and watching what they do.

`Opaque` is what a cut of such a module is made of. `observe` finds the order, the shapes and the data flow of the
layers inside from one run on the meta device or on a tiny batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kindling.errors import ModelError
from kindling.surgery.net import twin


class _Reached(BaseException):
    """Leaves a forward pass when the last wanted layer has answered; user code must not catch it as an Exception."""


class Opaque(nn.Module):
    """Runs `inner` with hooks and stops at the last of the wanted submodules.

    `stops` are paths inside `inner`; `""` is its own return value. One stop gives its value, several give a tuple.
    """

    def __init__(self, inner: nn.Module, prefix: str, stops: tuple[str, ...]) -> None:
        super().__init__()
        self.inner = inner
        self.prefix = prefix
        self.stops = stops

    def forward(self, *inputs: Any) -> Any:
        found: dict[str, Any] = {}
        wanted = [stop for stop in self.stops if stop]
        thread = threading.get_ident()  # another thread may be inside the same module

        def hook(stop: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if threading.get_ident() != thread or stop in found:
                    return
                # What follows may write into this value in place: when more than one is wanted, it is not the last.
                value = first_tensor(output, stop)
                found[stop] = value.clone() if len(self.stops) > 1 else value
                if all(name in found for name in self.stops):
                    raise _Reached

            return keep

        handles = [self.inner.get_submodule(stop).register_forward_hook(hook(stop)) for stop in wanted]
        try:
            result = self.inner(*inputs)
            if "" in self.stops:
                found[""] = result
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = [stop for stop in self.stops if stop not in found]
        if missing:
            raise ModelError(
                f"this batch did not pass through {', '.join(map(repr, missing))}, where the model was cut."
            )
        values = tuple(found[stop] for stop in self.stops)
        return values[0] if len(values) == 1 else values


class CutAway(nn.Module):
    """Stands where a module was that comes after the cut."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_inputs: Any, **_named: Any) -> Any:
        raise ModelError(
            f"layer {self.name!r} comes after the cut and was removed, but this batch reached it. "
            "The module's control flow depends on the data: cut at a layer that every batch passes last."
        )


def first_tensor(output: Any, name: str) -> Tensor:
    """The tensor a layer's name stands for: its output, or the first of several."""
    if isinstance(output, Tensor):
        return output
    values: Iterable[Any] = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ModelError(f"layer {name!r} returns {type(output).__name__}, not a tensor. Cut at a layer inside it.")


def without_rest(inner: nn.Module, stops: tuple[str, ...], seen: Observation) -> nn.Module:
    """A twin of `inner` without the modules that come after the last stop.

    Removed is only what is registered after the stops *and* was not touched in the observed run of the cut module:
    control flow that depends on the data may still take any branch before the cut.
    """
    made = twin(inner)
    if "" in stops:
        return made
    order = {path: place for place, (path, _) in enumerate(made.named_modules())}
    last = max(order[stop] for stop in stops)
    for path, module in list(made.named_modules()):
        if order[path] <= last or any(path.startswith(f"{stop}.") for stop in stops):
            continue
        inside = [f"inner.{path}", *(f"inner.{path}.{name}" for name, _ in module.named_modules() if name)]
        tensors = [f"inner.{path}.{name}" for name, _ in [*module.named_parameters(), *module.named_buffers()]]
        if not seen.called.isdisjoint(inside) or not seen.touched.isdisjoint(tensors):
            continue
        above, _, field = path.rpartition(".")
        try:
            holder = made.get_submodule(above)
        except AttributeError:
            continue  # went with a module above it
        if field in holder._modules and not isinstance(holder, CutAway):
            holder._modules[field] = CutAway(path)
    return made


# ------------------------------------------------------------------------------------------------ watching


@dataclass(frozen=True)
class Seen:
    """One leaf layer of an untraceable module, as it ran."""

    path: str
    sources: tuple[str, ...]
    """Paths of the leaf layers whose outputs it reads; `"<0>"` is the first input."""
    value: Any


@dataclass(frozen=True)
class Observation:
    """What one run of an untraceable module showed."""

    layers: tuple[Seen, ...]
    called: frozenset[str]
    touched: frozenset[str]
    """Paths of the parameters and buffers that took part."""
    ends: tuple[str, ...]
    """Leaf layers that the result comes from."""


class _Flow(TorchFunctionMode):
    """Remembers for every tensor which leaf layers it came from."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.origin: dict[int, frozenset[str]] = {}
        self.alive: list[Tensor] = []  # an id means something only as long as its tensor lives
        self.touched: set[str] = set()

    def mark(self, value: Any, origin: frozenset[str]) -> None:
        for tensor in tensors_in(value):
            self.origin[id(tensor)] = origin
            self.alive.append(tensor)

    def of(self, value: Any) -> frozenset[str]:
        found: set[str] = set()
        for tensor in tensors_in(value):
            found |= self.origin.get(id(tensor), frozenset())
            if id(tensor) in self.names:
                self.touched.add(self.names[id(tensor)])
        return frozenset(found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        origin = self.of((args, kwargs))
        if origin:
            self.mark(result, origin)
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def observe(module: nn.Module, inputs: tuple[Any, ...], leaves: Mapping[str, nn.Module]) -> tuple[Any, Observation]:
    """Run `module` (an `Opaque` or any other) and watch the `leaves` (path -> module) inside."""
    named = {id(t): path for path, t in [*module.named_parameters(), *module.named_buffers()]}
    flow = _Flow(named)
    for place, value in enumerate(inputs):
        flow.mark(value, frozenset({f"<{place}>"}))
    rows: dict[str, Seen] = {}
    called: set[str] = set()
    paths = {id(leaf): path for path, leaf in leaves.items()}
    handles = []

    def before(path: str) -> Callable[[nn.Module, Any], None]:
        def note(_module: nn.Module, _args: Any) -> None:
            called.add(path)

        return note

    def after(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path not in rows:
                order = list(rows)
                sources = sorted(flow.of((args, kwargs)), key=lambda p: order.index(p) if p in order else -1)
                rows[path] = Seen(path, tuple(sources), output)
            flow.mark(output, frozenset({path}))

        return note

    for path, inside in module.named_modules():
        handles.append(inside.register_forward_pre_hook(before(path)))
        if id(inside) in paths:
            handles.append(inside.register_forward_hook(after(paths[id(inside)]), with_kwargs=True))
    try:
        with flow, torch.no_grad():
            result = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return result, Observation(tuple(rows.values()), frozenset(called), frozenset(flow.touched), tuple(flow.of(result)))
