"""LeNet on MNIST by parameter averaging on two workers: test accuracy, and how long it took. A round is a seed."""

from __future__ import annotations

import statistics
import time
from functools import partial

from benchmarks import inputs
from benchmarks.harness import Bench, Case, Target


def run(bench: Bench) -> None:
    import torch

    import kindling as kd

    files = inputs.mnist(tiny=bench.preset == "tiny")
    spark = bench.session()
    train = kd.read.idx(str(files["train_images"]), str(files["train_labels"]), spark=spark)
    test = kd.read.idx(str(files["test_images"]), str(files["test_labels"]), spark=spark)
    for number in range(bench.rounds):
        torch.manual_seed(bench.seed + number)
        model = kd.load("lenet").with_labels([str(digit) for digit in range(10)])
        began = time.perf_counter()
        model = model.fit(
            train,
            epochs=bench["epochs"],
            batch_size=bench["batch_size"],
            optimizer=partial(torch.optim.SGD, lr=bench["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4),
            strategy=kd.ParameterAveraging(every=5),
            workers=2,
            seed=bench.seed + number,
            progress=False,
        )
        seconds = time.perf_counter() - began
        report = model.evaluate(test)
        epochs = model.history[-1]["epochs"]
        bench.record("test accuracy", 100 * report.accuracy, "%", round=number, loss=report.loss, epochs=epochs)
        bench.record("fit, from the call to the model", seconds, "s", round=number)
        bench.record(
            "rows per second", statistics.median(epoch["rows_per_s"] for epoch in epochs), "rows/s", round=number
        )
    bench.value("lowest test accuracy, %", min(figure for _, figure in bench.figures["test accuracy"]))
    bench.value("median test accuracy, %", bench.median("test accuracy"))


CASE = Case(
    name="mnist_lenet",
    what="LeNet on MNIST by parameter averaging on 2 workers: test accuracy after at most 5 epochs.",
    run=run,
    presets={
        "tiny": {"epochs": 1, "batch_size": 16, "lr": 0.02},
        "full": {"epochs": 5, "batch_size": 32, "lr": 0.02},
    },
    targets=(Target(value="lowest test accuracy, %", at_least=99.0),),
)
