"""The whole job in one call: photos in, a new head trained on a net's features, a report and a model out.

Written in the library's public names only, as a user would: read it as the longest example. The command line is in
`cli.py`. Each photo goes through the net once, whatever is done with its features afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import kindling as kd
from kindling.console import Clock, say

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What came out."""

    model: kd.Model
    """Net, head, preparation and labels: takes photos."""
    train: kd.Report
    valid: kd.Report | None
    """None where validation's share is 0."""
    test: kd.Report
    precision: str
    """Of the features."""
    broken: int
    """Photos that could not be read and were left out."""
    examples: tuple[tuple[str, str], ...]
    """The first of them: path and reason."""

    def to_json(self) -> dict[str, Any]:
        sides = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            "accuracy": {side: report.accuracy for side, report in sides.items() if report is not None},
            "rows": {side: report.rows for side, report in sides.items() if report is not None},
            "precision": self.precision,
            "broken": self.broken,
            "examples": [{"path": path, "why": why} for path, why in self.examples],
            "labels": list(self.model.labels or ()),
            "history": list(self.model.history),
            "report": self.test.to_json(),
        }

    def __str__(self) -> str:
        lines = [f"{'':8}{'photos':>8}{'accuracy':>10}{'loss':>9}"]
        for side, report in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            if report is not None:
                loss = "" if report.loss is None else f"{report.loss:9.4f}"
                lines.append(f"{side:8}{report.rows:8,}{report.accuracy:10.4f}{loss}")
        if self.broken:
            lines.append(f"{self.broken} photos could not be read and were left out:")
            lines += [f"  {path}: {why}" for path, why in self.examples]
        return "\n".join(lines)


def transfer(
    photos: DataFrame,
    net: kd.Model,
    *,
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    features: str | None = None,
    precision: str = "auto",
    epochs: int = 20,
    batch_size: int = 32,
    optimizer: Callable[..., Any] | None = None,
    strategy: Any = None,
    workers: int | None = None,
    seed: int = 0,
    clock: Clock | None = None,
) -> Transferred:
    """Train a new head for `photos` on what `net`, cut and left as it is, says about them.

    The head sees features of mean 0 and deviation 1; that is folded into its weights when they are trained.

    Args:
        photos: path, label, content, as `kindling.read.images` gives them.
        net: cut where its features are best, `kindling.load("vgg16", weights=...).until("fc2")`; where it ends in
            feature maps (N, C, H, W), their mean over H and W is used.
        shares: of train, valid and test rows, the middle one may be 0; a row's side depends on its path and the seed.
        features: folder that keeps the features as Parquet; None keeps them in Spark's memory and disk while it runs.
        clock: is told the phases.
        The rest is handed to `Model.featurize` and `Model.fit`.
    Raises: DataError, where no photo can be read or a share is left without rows; ModelError, where the net gives
        several outputs or rows of unknown size; whatever `featurize` and `fit` raise.
    """
    from torch import nn

    if len(shares) != 3 or not shares[0] or not shares[2]:
        raise kd.errors.ConfigError("shares", tuple(shares), "leaves nothing to train or to test on", "Give all three")
    clock = clock or Clock(quiet=True)
    trunk = _flat(net)
    size = int(next(iter(trunk.signature.outputs.values())).shape[1])
    with clock.phase("featurise"):
        chosen = None if features else trunk.precision(photos, precision).name
        frame = trunk.featurize(photos, out=features, on_error="keep", precision=chosen or precision)
        chosen = chosen or kd.provenance(str(features))["precision"]["name"]
        say(f"features in {chosen}")
        cached = None if features else frame.cache()
        rows = frame.count()
        good = frame.where("error is null").drop("error")
        broken = rows - good.count()
        bad = frame.where("error is not null").select("path", "error").orderBy("path").limit(5).collect()
        if rows == broken:
            raise kd.errors.DataError(f"none of the {rows} photos could be read.")
    with clock.phase("split"):
        parts = kd.split(good, *shares, seed=seed)
        counts = [part.count() for part in parts]
        for side, share, count in zip(("train", "valid", "test"), shares, counts, strict=True):
            if share and not count:
                raise kd.errors.DataError(
                    f"the {side} share, {share} of {rows - broken} photos, is empty. Add photos or change the shares."
                )
        labels = kd.labels(good)
        unseen = sorted(set(labels) - set(kd.labels(parts[0])))
        if unseen:
            names = ", ".join(unseen[:5])
            say(
                f"{len(unseen)} of the {len(labels)} labels have no photo in the train share ({names}): theirs can "
                "only be got wrong. Add photos, or take another seed."
            )
        sizes = " + ".join(f"{count:,}" for count in counts)
        say(f"{sizes} photos to train, validate and test on; {len(labels)} labels")
    with clock.phase("train"):
        with seeded(seed):
            standardise, classes = _standardising(*kd.read.moments(parts[0])), nn.Linear(size, len(labels))
        layers = OrderedDict(standardise=standardise, classes=classes)
        head = kd.Model.of(nn.Sequential(layers), shape=(size,), labels=labels).freeze(until="standardise")
        head = head.fit(
            parts[0],
            validation=parts[1] if counts[1] else None,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            strategy=strategy,
            workers=workers,
            seed=seed,
            frozen_precision="fp32",
        )
        trained = cast("nn.Linear", head.module.get_submodule("classes"))
        head = dataclasses.replace(head, module=_folded(standardise, trained), frozen=frozenset())
    with clock.phase("evaluate"):
        train, valid, test = (head.evaluate(part) if count else None for part, count in zip(parts, counts, strict=True))
    if cached is not None:
        cached.unpersist()
    model = trunk.freeze().then(head.module, labels=labels, name="classifier")
    assert train is not None
    assert test is not None
    about = {"precision": chosen, "broken": broken}
    model = dataclasses.replace(model, history=(*model.history, {**head.history[-1], "features": about}))
    return Transferred(
        model=model,
        train=train,
        valid=valid,
        test=test,
        precision=chosen,
        broken=broken,
        examples=tuple((row["path"], row["error"]) for row in bad),
    )


def _standardising(mean: np.ndarray, deviation: np.ndarray) -> nn.BatchNorm1d:
    """A layer that brings each feature to mean 0 and deviation 1; one that never changes is only moved to 0."""
    import torch

    layer = torch.nn.BatchNorm1d(len(mean), eps=1e-30, affine=False)  # features may be tiny, and still differ
    steady = deviation <= 1e-6 * deviation.max()
    layer.running_mean = torch.tensor(mean, dtype=torch.float32)
    layer.running_var = torch.tensor(np.where(steady, 1.0, deviation) ** 2, dtype=torch.float32)
    return layer


def _folded(standardise: nn.BatchNorm1d, classes: nn.Linear) -> nn.Linear:
    """One linear layer that does the same as both."""
    import torch

    assert standardise.running_mean is not None
    assert standardise.running_var is not None
    weight = classes.weight.detach().double() * torch.rsqrt(standardise.running_var.double() + standardise.eps)
    bias = classes.bias.detach().double() - weight @ standardise.running_mean.double()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer.eval()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New layers made inside have the same random weights each time; torch's own generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _flat(net: kd.Model) -> kd.Model:
    """The net with one vector per photo as its output."""
    from torch import nn

    if len(net.signature.outputs) != 1:
        raise kd.errors.ModelError(
            f"a head needs one output, the net has {len(net.signature.outputs)}: {list(net.signature.outputs)}."
        )
    (spec,) = net.signature.outputs.values()
    if len(spec.shape) == 4:
        return net.then({"pool": nn.AdaptiveAvgPool2d(1), "flatten_features": nn.Flatten()})
    if len(spec.shape) == 2:
        return net
    raise kd.errors.ModelError(
        f"a head needs vectors (N, C) or maps (N, C, H, W), the net gives {spec.shape}. Cut it elsewhere."
    )
