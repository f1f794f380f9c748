"""A DistributedDataParallel script as one writes it without kindling: torchrun and TorchDistributor run this file.

It imports nothing of this repository: TorchDistributor starts it wherever Spark puts a task. Its one argument is a JSON
object. Rank 0 saves the weights and what it measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Asked: table (Parquet: features array<float>, label string), batch, epochs, lr, momentum, seed, into."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    began = time.time()
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = read(asked["table"], rank, world)
    torch.manual_seed(asked["seed"])
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=asked["lr"], momentum=asked["momentum"], fused=asked.get("fused")
    )
    loss = nn.CrossEntropyLoss()
    steps = int(agreed(-(-len(x) // asked["batch"])))
    seconds, losses, first_step = [], [], 0.0
    for _ in range(asked["epochs"]):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(x)).split(asked["batch"])
        for step in range(steps):
            rows = order[step % len(order)]
            optimizer.zero_grad()
            value = loss(model(x[rows]), y[rows])
            value.backward()
            optimizer.step()
            total += value.item()
            first_step = first_step or time.time()
        seconds.append(time.perf_counter() - start)
        losses.append(total / steps)
    if rank == 0:
        into = Path(asked["into"])
        torch.save(net.state_dict(), into / "weights.pt")
        told = {"seconds": seconds, "losses": losses, "steps": steps, "began": began, "first_step": first_step}
        (into / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def read(table: str, rank: int, world: int) -> tuple[Any, Any]:
    """This process's rows, every `world`-th of them."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    rows = pq.read_table(table, columns=["features", "label"])
    flat = rows.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    x = flat.reshape(rows.num_rows, -1)[rank::world].astype(np.float32)
    y = rows.column("label").cast("int64").to_numpy()[rank::world]
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))


def agreed(count: int) -> int:
    """The largest of the processes' numbers: all take as many steps, else the last would wait for ever."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor([count])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


if __name__ == "__main__":
    main()
