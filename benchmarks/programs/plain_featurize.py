"""The plain script: photos through a net into Parquet with PyTorch's defaults. DataLoader, Pillow, float32, NCHW."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.programs import answer, spec, wait_for_go
from benchmarks.programs.pillow_prepare import prepare
from benchmarks.programs.torch_nets import build


class Photos(Dataset[tuple[torch.Tensor, str]]):
    """Prepared photos and their paths."""

    def __init__(self, paths: Sequence[str], step: Mapping[str, Any]) -> None:
        self.paths, self.step = paths, step

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.paths[index]
        return torch.from_numpy(prepare(Path(path).read_bytes(), self.step)), path


def featurize(
    module: torch.nn.Module, paths: Sequence[str], step: Mapping[str, Any], batch: int, loaders: int, out: str
) -> None:
    """All photos to one Parquet file of (path, features)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"path": pa.string(), "features": pa.list_(pa.float32())})
    with pq.ParquetWriter(out, schema) as writer, torch.no_grad():
        for images, names in DataLoader(Photos(paths, step), batch_size=batch, num_workers=loaders):
            features = module(images).numpy()
            lists = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
            writer.write_table(pa.table([pa.array(names), lists.cast(pa.list_(pa.float32()))], schema=schema))


def main() -> None:
    """Spec: net, until, ceil_mode, weights, step, paths, batch, loaders, out.

    Answers the seconds of the whole pass, warm (the net is built, one batch has run), and cold.
    """
    began = time.perf_counter()
    asked = spec()
    module = build(asked["net"], until=asked["until"], ceil_mode=asked["ceil_mode"], weights=asked["weights"])
    featurize(module, asked["paths"][: asked["batch"]], asked["step"], asked["batch"], asked["loaders"], asked["out"])
    wait_for_go()
    start = time.perf_counter()
    featurize(module, asked["paths"], asked["step"], asked["batch"], asked["loaders"], asked["out"])
    ended = time.perf_counter()
    answer(
        {
            "seconds": ended - start,
            "cold_seconds": ended - began,
            "images": len(asked["paths"]),
            "threads": torch.get_num_threads(),
        }
    )


if __name__ == "__main__":
    main()
