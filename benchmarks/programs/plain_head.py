"""The plain loop: a softmax head on arrays already in memory. No Spark, no files, no agreement between processes."""

from __future__ import annotations

import time

from benchmarks.programs import answer, spec, wait_for_go


def main() -> None:
    """Spec: arrays, part, parts, batch, epochs, threads, seed, and SGD's settings. Answers each epoch's seconds."""
    asked = spec()
    import numpy as np
    import torch
    from torch import nn

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    with np.load(asked["arrays"]) as arrays:
        part = slice(asked["part"], None, asked["parts"])
        x, y = (
            torch.from_numpy(np.ascontiguousarray(arrays["x"][part])),
            torch.from_numpy(np.ascontiguousarray(arrays["y"][part])),
        )
        classes = int(arrays["y"].max()) + 1
    module = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.SGD(
        module.parameters(),
        lr=asked["lr"],
        momentum=asked["momentum"],
        nesterov=asked["nesterov"],
        fused=asked["fused"],
    )
    loss = nn.CrossEntropyLoss()
    wait_for_go()
    seconds, losses, start = [], [], time.time()
    for _ in range(asked["epochs"]):
        began, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(x)).split(asked["batch"]):
            optimizer.zero_grad()
            value = loss(module(x[rows]), y[rows])
            value.backward()
            optimizer.step()
            total += value.item() * len(rows)
        seconds.append(time.perf_counter() - began)
        losses.append(total / len(x))
    answer({"seconds": seconds, "losses": losses, "began": start, "ended": time.time(), "rows": len(x)})


if __name__ == "__main__":
    main()
