"""A net whose first layers are wide runs in two stages: those on few rows at a time, all others on the whole batch.

Early feature maps of a photo are large, late ones are small: VGG16's first take 6 MB a row in bfloat16, its last fully
connected layer reads 33 MB of weights whatever the number of rows. One batch size suits only one end. Batches of 4 keep
the memory of the first layers small and run VGG16 a fifth slower than batches of 16 do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from kindling.signature import Signature

BATCH_NUMBERS = 1 << 24
"""Numbers in the largest tensor of a forward pass in one stage, where the net allows."""
STAGE_NUMBERS = 1 << 23
"""The same for each of two stages."""
ROWS = 16
"""Rows from which on reading the weights takes little of a pass: VGG16 takes 28.7 rows a second in batches of 16, 26.9
in batches of 8, 23.5 in batches of 4, and no more in larger ones (one thread of a Xeon with AMX, bfloat16)."""


_MOST_WIDENING = 64
"""Nets that are not looked at: so small inputs that layers would have to be so many times as wide. VGG16's are 21."""


class TwoStages(nn.Module):
    """`front` on `rows` rows at a time, `rest` on all of them."""

    def __init__(self, front: nn.Module, rest: nn.Module, rows: int) -> None:
        super().__init__()
        self.front, self.rest, self.rows = front, rest, rows

    def forward(self, *inputs: Tensor) -> Any:
        count, middle = inputs[0].shape[0], None
        for start in range(0, count, self.rows):
            part = self.front(*(tensor[start : start + self.rows] for tensor in inputs))
            if middle is None:
                plain = part.dim() != 4 or part.is_contiguous()
                layout = torch.contiguous_format if plain else torch.channels_last
                middle = torch.empty((count, *part.shape[1:]), dtype=part.dtype, memory_format=layout)
            middle[start : start + self.rows] = part
            del part
        return self.rest(middle)


class Sizes(fx.Interpreter):
    """Runs a graph and notes the shapes of what it computes."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = result.shape
        return result


def in_stages(module: nn.Module, signature: Signature, batch_size: int, ghost: Callable[[], nn.Module]) -> nn.Module:
    """The module itself, or in two stages where one of its tensors is very large and a narrow place follows.

    Args:
        module: an fx graph, else it comes back as it is.
        batch_size: rows of each pass.
        ghost: makes a copy of the module on the meta device.
    """
    if not isinstance(module, fx.GraphModule) or batch_size == 1:
        return module
    try:
        rows_in = max(math.prod(int(size) for size in spec.shape[1:]) for spec in signature.inputs.values())
        if _MOST_WIDENING * rows_in * batch_size <= BATCH_NUMBERS:
            return module
        single = _sizes(ghost(), signature, 1)
        widest = _widest(single.values())
        if widest * batch_size <= BATCH_NUMBERS:
            return module
        whole = _sizes(ghost(), signature, batch_size)
    except Exception:  # a net that does not run without numbers runs in one stage
        return module
    nodes = list(module.graph.nodes)
    fits = [
        at
        for at in _narrow_places(nodes[:-2])  # behind the last layer nothing would be left to run on all rows
        if whole.get(nodes[at].name) == (batch_size, *single.get(nodes[at].name, ())[1:])
        and single[nodes[at].name][:1] == (1,)
        and _widest(single[node.name] for node in nodes[at:] if node.name in single) * batch_size <= STAGE_NUMBERS
    ]
    if not fits:
        return module
    rows = max(k for k in range(1, batch_size) if batch_size % k == 0 and (k == 1 or k * widest <= STAGE_NUMBERS))
    return TwoStages(*_cut(module, nodes, fits[0]), rows)


def _sizes(ghost: nn.Module, signature: Signature, rows: int) -> dict[str, torch.Size]:
    assert isinstance(ghost, fx.GraphModule)
    inputs = [
        torch.empty((rows, *(int(size) for size in spec.shape[1:])), dtype=getattr(torch, spec.dtype), device="meta")
        for spec in signature.inputs.values()
    ]
    with torch.inference_mode():
        seen = Sizes(ghost)
        seen.run(*inputs)
    return seen.shapes


def _widest(shapes: Iterable[torch.Size]) -> int:
    return max((math.prod(shape) for shape in shapes), default=0)


def _of_rows(nodes: list[fx.Node]) -> set[fx.Node]:
    """What depends on the inputs; the rest are the net's own tensors."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _narrow_places(nodes: list[fx.Node]) -> list[int]:
    """Where all that comes later depends on one value alone: positions of the nodes that compute it."""
    of_rows = _of_rows(nodes)
    position = {node: at for at, node in enumerate(nodes)}
    places, last_use = (
        [],
        {node: max((position.get(u, len(nodes)) for u in node.users), default=-1) for node in of_rows},
    )
    still_used: set[fx.Node] = set()
    for at, node in enumerate(nodes):
        if node in of_rows:
            still_used.add(node)
        still_used = {value for value in still_used if last_use[value] > at}
        ready = all(n.op != "placeholder" for n in nodes[at + 1 :])
        if ready and node.op not in ("placeholder", "output") and still_used == {node}:
            places.append(at)
    return places


def _cut(module: fx.GraphModule, nodes: list[fx.Node], at: int) -> tuple[nn.Module, nn.Module]:
    front, rest, of_rows = fx.Graph(), fx.Graph(), _of_rows(nodes)
    memo: dict[fx.Node, fx.Node] = {}
    for node in nodes[: at + 1]:
        memo[node] = front.node_copy(node, memo.__getitem__)
    front.output(memo[nodes[at]])
    # The net's own tensors may serve on both sides; a node without users may still write into another's tensor.
    memo = {nodes[at]: rest.placeholder("middle")}
    needed = set(nodes[at + 1 :])
    for node in reversed(nodes[:at]):
        if node not in of_rows and needed.intersection(node.users):
            needed.add(node)
    for node in nodes:
        if node in needed:
            memo[node] = rest.node_copy(node, memo.__getitem__)
    return fx.GraphModule(module, front), fx.GraphModule(module, rest)
