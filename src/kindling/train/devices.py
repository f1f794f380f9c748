"""Which device a worker computes on: the GPU that Spark gave its task, where every worker has one; else the CPU.

Spark hands GPUs out by `spark.task.resource.gpu.amount` (and the executors' settings beside it) and tells each task the
addresses of its own; without these settings nothing here asks for one. Deciding is apart from asking, so that it can be
tested without a GPU; torch is imported inside functions, after the thread settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kindling.errors import SessionError

if TYPE_CHECKING:
    from torch import Tensor

CPU = "cpu"


def choose_device(addresses: Sequence[str], visible: str | None, count: int) -> str:
    """The device of a task.

    Args:
        addresses: of the GPUs that Spark gave the task; the first is used, one device per worker.
        visible: `CUDA_VISIBLE_DEVICES`, whose order torch counts by; None where it is not set.
        count: GPUs that torch sees.
    Returns: `"cpu"` without an address or where torch sees no GPU, else `"cuda:N"`.
    Raises: SessionError, where torch sees GPUs and the task's own is not among them.

    >>> choose_device([], None, 8), choose_device(["3"], None, 8), choose_device(["3"], "1,3", 2)
    ('cpu', 'cuda:3', 'cuda:1')
    """
    if not addresses or not count:
        return CPU
    first = addresses[0].strip()
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    if first not in names or names.index(first) >= count:
        raise SessionError(
            f"Spark gave this task the GPU {first!r}, and torch sees {names[:count]}. "
            "Is the discovery script of spark.executor.resource.gpu.discoveryScript made for these machines?"
        )
    return f"cuda:{names.index(first)}"


def agree(devices: Sequence[str], own: str) -> str:
    """A worker's device once all have said theirs: its own if everybody has a GPU, else the CPU for all.

    >>> agree(["cuda:0", "cuda:1"], "cuda:1"), agree(["cuda:0", "cpu"], "cuda:0")
    ('cuda:1', 'cpu')
    """
    return own if all(device != CPU for device in devices) else CPU


def backend(device: str) -> str:
    """The process group's: NCCL for tensors on GPUs, gloo for all others (row counts, say).

    >>> backend("cpu"), backend("cuda:1")
    ('gloo', 'cpu:gloo,cuda:nccl')
    """
    return "gloo" if device == CPU else "cpu:gloo,cuda:nccl"


def task_gpus() -> list[str]:
    """Addresses of the GPUs that Spark gave this task; none outside a task."""
    from pyspark import TaskContext

    context = TaskContext.get()
    found = context.resources().get("gpu") if context is not None else None
    return [] if found is None else list(found.addresses)


def own_device() -> str:
    """The device of this task."""
    import os

    addresses = task_gpus()
    if not addresses:
        return CPU  # torch is not asked: looking for GPUs takes time
    import torch

    return choose_device(addresses, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def to_device(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """A batch on a device. To a GPU it goes through pinned memory, and the caller does not wait for it to arrive.

    >>> import torch
    >>> rows = {"x": torch.ones(2)}
    >>> to_device(rows, "cpu")["x"] is rows["x"], to_device(rows, "meta")["x"].device.type
    (True, 'meta')
    """
    if device == CPU:
        return dict(batch)
    pinned = device.startswith("cuda")
    return {
        name: (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)
        for name, tensor in batch.items()
    }


def moved(state: Any, device: str) -> Any:
    """A state of nested mappings and lists with every tensor on a device; everything else as it is.

    >>> import torch
    >>> moved({"step": 3, "anchor": [torch.ones(2)]}, "meta")
    {'step': 3, 'anchor': [tensor(..., device='meta', size=(2,))]}
    """
    import torch

    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return {name: moved(value, device) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(moved(value, device) for value in state)
    return state


def seed(number: int, device: str) -> None:
    """Seed what the net draws from: the CPU's generator, and that of the device."""
    import torch

    # torch.manual_seed looks for every other device's generator as well: half a millisecond.
    torch.default_generator.manual_seed(number)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(number)
