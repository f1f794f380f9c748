"""The demo: a net that learnt the handwritten digits 0-4 is given a new head for 5-9, from fifty pictures.

The same net trained from scratch on the same pictures stands beside it. Digits are easy: expect a tie in accuracy, with
a hundredth of the weights to train.

scikit-learn ships 1,797 real handwritten digits of 8 x 8 pixels, so no network is needed. Written in the library's
public names only; the command is `kindling demo`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kindling as kd
from kindling.console import Clock, say
from kindling.transfer import seeded

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SEED = 7
_MARK = ".kindling-demo"


@dataclass(frozen=True, kw_only=True)
class Demonstrated:
    """What the demo found."""

    first: kd.Report
    """LeNet on digits 0-4 that it was not trained on."""
    head: kd.Report
    """Digits 5-9: a new head on the frozen net."""
    scratch: kd.Report
    """Digits 5-9: the same net, all of it trained on the same pictures alone."""
    weights: tuple[int, int]
    """Weights that the head, and the net from scratch, had to learn."""
    labelled: int
    """Pictures of 5-9 that both learnt from."""
    answer: dict[str, Any]
    """What the reloaded model says about one file."""
    picture: Path
    folder: Path
    clock: Clock

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": {
                "0-4": self.first.accuracy,
                "5-9": self.head.accuracy,
                "5-9 from scratch": self.scratch.accuracy,
            },
            "labelled": self.labelled,
            "weights": self.weights,
            "report": self.head.to_json(),
            "picture": str(self.picture),
            "answer": self.answer,
            "model": str(self.folder / "model"),
            "seconds": self.clock.to_json(),
        }

    def __str__(self) -> str:
        return f"""{self.head}

Digits 5-9 learnt from {self.labelled} pictures, tested on {self.head.rows}:
  a new head on the frozen net that knows 0-4   {self.head.accuracy:.4f}   {self.weights[0]:7,} weights trained
  the same net, all of it from scratch          {self.scratch.accuracy:.4f}   {self.weights[1]:7,} weights trained

{self.picture} shows a {self.picture.parent.name}; the reloaded model says {self.answer["prediction"]} \
(probability {self.answer["probability"]:.3f})

{self.clock}

Try it: kindling predict {self.folder}/digits/[5-9]/000*.png --model {self.folder / "model"}"""


def write_digits(folder: Path) -> int:
    """Write scikit-learn's digits as PNG files, folder/DIGIT/NUMBER.png; returns how many.

    Raises: MissingExtraError, where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise kd.errors.MissingExtraError.of("The demo", "scikit-learn", "demo") from error
    from PIL import Image

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        # 17 levels of ink, 0..16, to 0..255
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"{number:04}.png")
    return len(digits.target)


def run(spark: SparkSession, folder: Path) -> Demonstrated:
    """The whole demo; everything it makes is put in `folder`.

    Raises: StorageError, when `folder` holds something that is not an earlier demo.
    """
    import torch
    from torch import nn

    folder = folder.resolve()
    _clear(folder)
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)
    averaging = kd.ParameterAveraging(every=5)
    clock = Clock()

    with clock.phase("write the digits as PNG files"):
        count = write_digits(folder / "digits")
        say(f"{count:,} real handwritten digits in {folder / 'digits'}")
    with clock.phase("read, split"):
        low = kd.read.images([str(folder / "digits" / str(d)) for d in range(5)], spark=spark)
        high = kd.read.images([str(folder / "digits" / str(d)) for d in range(5, 10)], spark=spark)
        train, test = kd.split(low, 0.8, 0.2, seed=SEED)

    say("LeNet learns 0-4, two workers, weights averaged every 5 steps")
    with clock.phase("train LeNet on 0-4"):
        with seeded(SEED):
            lenet = kd.load("lenet").until("fc1").then(nn.Linear(500, 5), labels=kd.labels(train), name="predictions")
        lenet = lenet.fit(train, epochs=10, batch_size=16, optimizer=sgd, strategy=averaging, workers=2, seed=SEED)
    with clock.phase("evaluate on 0-4"):
        first = lenet.evaluate(test)
        say(f"accuracy on {first.rows} other pictures of 0-4: {first.accuracy:.4f}")
    lenet.save(folder / "lenet-0-4")

    say("loaded again, cut after pool2, frozen: its features of 5-9")
    trunk = kd.load(folder / "lenet-0-4").until("flatten").freeze()
    with clock.phase("featurise 5-9 to Parquet"):
        features = trunk.featurize(high, out=str(folder / "features.parquet"))
        features.count()
    few, rest = kd.split(features, 0.06, 0.94, seed=SEED, stratify=True)
    paths = [row.path for row in few.select("path").collect()]
    labels = kd.labels(few)

    say(f"a new head learns 5-9 from {len(paths)} pictures")
    settings: dict[str, Any] = {"epochs": 30, "batch_size": 8, "strategy": averaging, "workers": 2, "seed": SEED}
    slow = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    with clock.phase("train a head on 5-9"):
        with seeded(SEED):
            head = kd.Model.of(nn.Linear(800, 5), column="features", shape=(800,), labels=labels)
        head = head.fit(few, optimizer=slow, **settings)
    with clock.phase("train the same net from scratch"):
        with seeded(SEED):
            whole = kd.load("lenet").until("fc1").then(nn.Linear(500, 5), labels=labels, name="predictions")
        whole = whole.fit(high.where(high.path.isin(paths)), optimizer=slow, **settings)
    with clock.phase("evaluate both on 5-9"):
        with_head = head.evaluate(rest)
        from_scratch = whole.evaluate(high.where(~high.path.isin(paths)))

    with clock.phase("save, reload, classify one file"):
        trunk.then(head.module, labels=labels, name="predictions").save(folder / "model")
        learnt = {path.rsplit("/", 1)[1] for path in paths}
        picture = max(file for file in (folder / "digits" / "7").glob("*.png") if file.name not in learnt)
        (answer,) = kd.load(folder / "model").predict([str(picture)])
    return Demonstrated(
        first=first,
        head=with_head,
        scratch=from_scratch,
        weights=(head.summary().trainable, whole.summary().trainable),
        labelled=len(paths),
        answer=answer,
        picture=picture,
        folder=folder,
        clock=clock,
    )


def _clear(folder: Path) -> None:
    """Make room for a new demo, over an earlier one only."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise kd.errors.StorageError(f"{folder} is not empty and holds no earlier demo. Choose another --out.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
