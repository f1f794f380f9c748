"""The class that Daft runs in its processes; in a module of its own, so that those can import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import daft
import numpy as np
import torch
from daft import DataType, Series

from benchmarks.programs.pillow_prepare import prepare
from benchmarks.programs.torch_nets import build


class Featurizer:
    """One process: prepares photos and runs the net, with one thread."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        self.step = asked["step"]
        self.module = build(asked["net"], until=asked["until"], ceil_mode=asked["ceil_mode"], weights=asked["weights"])

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=32)
    def features(self, content: Series) -> Series:
        """One list of features for each photo."""
        import pyarrow as pa

        images = torch.from_numpy(np.stack([prepare(data, self.step) for data in content.to_pylist()]))
        with torch.no_grad():
            features = self.module(images).numpy()
        return Series.from_arrow(
            pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]).cast(
                pa.list_(pa.float32())
            )
        )


def featurizer(asked: Mapping[str, Any]) -> Any:
    """The class as Daft wants it: in as many processes as there are actors."""
    return daft.cls(Featurizer, use_process=True, max_concurrency=asked["actors"])(dict(asked))
