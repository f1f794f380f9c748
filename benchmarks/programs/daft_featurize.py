"""Daft: paths -> download -> a class in two processes of one thread each (Pillow, float32 torch) -> Parquet."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.programs import answer, spec, wait_for_go


def featurize(asked: Mapping[str, Any], count: int) -> float:
    """Photos to Parquet; seconds from the first call to the closed files."""
    import daft
    from daft.functions import download

    from benchmarks.programs.daft_model import featurizer

    shutil.rmtree(asked["out"], ignore_errors=True)
    began = time.perf_counter()
    photos = daft.from_pydict({"path": asked["paths"][:count]})
    photos = photos.with_column("content", download(photos["path"]))
    model = featurizer(asked)
    photos = photos.with_column("features", model.features(photos["content"])).exclude("content")
    photos.write_parquet(asked["out"])
    return time.perf_counter() - began


def main() -> None:
    """Spec: as the plain script's, and actors. Answers seconds (warm: after a small pass) and a small pass's."""
    os.environ.update(DO_NOT_TRACK="true", SCARF_NO_ANALYTICS="true", DAFT_PROGRESS_BAR="0")
    asked = spec()
    small = min(2 * asked["batch"], len(asked["paths"]) // 2)
    featurize(asked, small)
    wait_for_go()
    small_seconds = featurize(asked, small)
    seconds = featurize(asked, len(asked["paths"]))
    answer({"seconds": seconds, "images": len(asked["paths"]), "small_seconds": small_seconds, "small_images": small})


if __name__ == "__main__":
    main()
