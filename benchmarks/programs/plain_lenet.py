"""LeNet on MNIST in plain torch: one process, the pictures as bytes in memory, batches cut from a permutation."""

from __future__ import annotations

import time

from benchmarks.programs import answer, spec, wait_for_go


def main() -> None:
    """Spec: arrays, batch, epochs, threads, seed, fused, and SGD's settings. Answers each epoch's seconds and loss."""
    asked = spec()
    import numpy as np
    import torch
    from torch import nn

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    with np.load(asked["arrays"]) as arrays:
        x = torch.from_numpy(arrays["x"]).unsqueeze(1)
        y = torch.from_numpy(arrays["y"])
    module = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(inplace=True),
        nn.Linear(500, 10),
    )
    optimizer = torch.optim.SGD(module.parameters(), **asked["sgd"])
    loss = nn.CrossEntropyLoss()
    wait_for_go()
    seconds, losses = [], []
    for _ in range(asked["epochs"]):
        began, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(x)).split(asked["batch"]):
            images = x[rows].float().div_(255).sub_(0.1307).div_(0.3081)
            optimizer.zero_grad()
            value = loss(module(images), y[rows])
            value.backward()
            optimizer.step()
            total += value.item() * len(rows)
        seconds.append(time.perf_counter() - began)
        losses.append(total / len(x))
    answer({"seconds": seconds, "losses": losses})


if __name__ == "__main__":
    main()
