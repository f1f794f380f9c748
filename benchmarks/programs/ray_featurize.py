"""Ray Data: binary files -> a pool of two one-thread actors (Pillow, float32 torch) -> Parquet, as its guide shows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.programs import answer, spec, wait_for_go


class Featurizer:
    """One actor: prepares photos and runs the net, with one thread."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        import torch

        from benchmarks.programs.torch_nets import build

        torch.set_num_threads(1)
        self.step = asked["step"]
        self.module = build(asked["net"], until=asked["until"], ceil_mode=asked["ceil_mode"], weights=asked["weights"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from benchmarks.programs.pillow_prepare import prepare

        images = torch.from_numpy(np.stack([prepare(data, self.step) for data in batch["bytes"]]))
        with torch.no_grad():
            return {"path": batch["path"], "features": self.module(images).numpy()}


def featurize(asked: Mapping[str, Any], count: int) -> float:
    """Photos to Parquet; seconds from the first call to the closed files."""
    import ray

    shutil.rmtree(asked["out"], ignore_errors=True)
    began = time.perf_counter()
    photos = ray.data.read_binary_files(asked["paths"][:count], include_paths=True)
    features = photos.map_batches(
        Featurizer,
        fn_constructor_args=(asked,),
        batch_size=asked["batch"],
        compute=ray.data.ActorPoolStrategy(size=asked["actors"]),
        num_cpus=1,
    )
    features.write_parquet(asked["out"])
    return time.perf_counter() - began


def main() -> None:
    """Spec: as the plain script's, and actors. Answers seconds (warm: after a small pass) and a small pass's."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"
    )
    asked = spec()
    import ray
    import ray.data

    # Reading tasks want slots of their own, or they wait for the actors' for ever. The cores stay as many.
    ray.init(num_cpus=2 * asked["actors"], include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    small = min(2 * asked["batch"], len(asked["paths"]) // 2)
    featurize(asked, small)
    wait_for_go()
    small_seconds = featurize(asked, small)
    seconds = featurize(asked, len(asked["paths"]))
    answer({"seconds": seconds, "images": len(asked["paths"]), "small_seconds": small_seconds, "small_images": small})
    ray.shutdown()


if __name__ == "__main__":
    main()
