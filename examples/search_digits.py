"""Find settings for a net on a table of numbers: twelve trials at random, two at a time, weak ones ended early.

Run: python examples/search_digits.py [MASTER]
"""

import sys
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

import kindling as kd


def main(master: str = "local[2]", trials: int = 12) -> float:
    spark = kd.spark(master)
    digits = load_digits()
    rows = [
        (number, str(label), pixels.tolist())
        for number, (label, pixels) in enumerate(zip(digits.target, digits.data / 16, strict=True))
    ]
    table = spark.createDataFrame(rows, "id int, digit string, pixels array<double>")
    train, valid, test = kd.split(table, 0.6, 0.2, 0.2, by="id")
    labels = kd.labels(table, "digit")

    def build(params):
        net = nn.Sequential(nn.Linear(64, params["hidden"]), nn.ReLU(), nn.Linear(params["hidden"], 10))
        model = kd.Model.of(net, column="pixels", shape=(64,), labels=labels, target="digit")
        return {"model": model, "optimizer": partial(torch.optim.Adam, lr=params["lr"])}

    found = kd.search(
        build,
        train,
        {"lr": kd.space.LogUniform(1e-5, 1e-1), "hidden": kd.space.Integer(8, 128, log=True)},
        validation=valid,
        metric="accuracy",
        trials=trials,
        pruner="halving",
        epochs=9,
        batch_size=32,
    )
    print(found)
    report = found.best_model.evaluate(test)
    print(f"accuracy on rows that no trial has seen: {report.accuracy:.4f}")
    return report.accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
