"""The main job in Python: a net's features, a new head trained on Spark, one model that takes photos.

Run: python examples/transfer_photos.py PHOTOS NET LAYER OUT [WEIGHTS]
For example: python examples/transfer_photos.py caltech256/ vgg16 fc2 model vgg16.safetensors
"""

import sys
from functools import partial

import torch
from torch import nn

import kindling as kd


def main(photos: str, net: str, layer: str, out: str, weights: str | None = None) -> float:
    kd.spark()
    rows = kd.read.images(photos)
    labels = kd.labels(rows)
    train, valid, test = kd.split(rows, 0.7, 0.15, 0.15)

    trunk = kd.load(net, weights=weights).until(layer)
    ((_, size),) = (spec.shape for spec in trunk.signature.outputs.values())
    model = trunk.freeze().then(nn.Linear(size, len(labels)), labels=labels)
    model = model.fit(
        train,
        validation=valid,
        epochs=10,
        strategy=kd.ParameterAveraging(every=5),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    )
    report = model.evaluate(test)
    print(report)
    model.save(out)
    return report.accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
