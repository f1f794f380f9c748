"""Train a net of your own on a table of numbers: scikit-learn's digits as an array column, no pictures, no files.

Run: python examples/digits_table.py [MASTER]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import kindling as kd


def main(master: str = "local[2]") -> float:
    spark = kd.spark(master)
    digits = load_digits()
    rows = [
        (number, str(label), pixels.tolist())
        for number, (label, pixels) in enumerate(zip(digits.target, digits.data / 16, strict=True))
    ]
    table = spark.createDataFrame(rows, "id int, digit string, pixels array<double>")
    train, test = kd.split(table, 0.8, 0.2, by="id")

    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = kd.Model.of(net, column="pixels", shape=(64,), labels=kd.labels(table, "digit"), target="digit")
    model = model.fit(train, epochs=8, batch_size=16, workers=2, optimizer=lambda p: torch.optim.Adam(p, lr=3e-3))
    report = model.evaluate(test)
    print(report)
    return report.accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
