"""What the benchmarks read: real photos where the data folder has them, else generated ones; arrays; IDX files.

Everything is made once and kept under the system's temporary folder (`kindling-benchmarks`), under names that tell
what it is. Generated photos stand in for speed only: their statistics (edges, gradients, noise at several scales)
and size on disk are those of photos, their classes mean little.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import REPOSITORY, BenchmarkError

CALTECH_TAR = "caltech101/caltech101_max80.tar"
SQUEEZENET = "squeezenet_v1.1_keras/squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
SQUEEZENET_PROTOTXT = "squeezenet_v1.0_caffe/SqueezeNet_deploy.prototxt"
SQUEEZENET_CAFFE = "squeezenet_v1.0_caffe/SqueezeNet_v1.0_decompressed.caffemodel"
MOBILENET = "mobilenet_tflite/mobilenet_v2_1.0_224_dequantized.npz"


def data_folder() -> Path | None:
    """The folder of real data, or None: KINDLING_DATA, else `../shared/data` beside the repository."""
    named = os.environ.get("KINDLING_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def real(name: str) -> Path | None:
    """A file of the data folder, or None where it is absent."""
    folder = data_folder()
    return folder / name if folder is not None and (folder / name).exists() else None


def need(name: str) -> Path:
    """A file of the data folder.

    Raises: BenchmarkError, where it is absent.
    """
    path = real(name)
    if path is None:
        raise BenchmarkError(f"{name} is missing: set KINDLING_DATA to the folder that holds it.")
    return path


def cache() -> Path:
    """Where made inputs are kept between runs."""
    folder = Path(tempfile.gettempdir()) / "kindling-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def caltech101(*, without: Sequence[str] = ("Faces_easy",)) -> Path:
    """The photos of Caltech-101 as CLASS/image_0001.jpg, unpacked once, without the classes named.

    `Faces` and `Faces_easy` are the same photographs cropped differently: one experiment may hold only one of them.
    """
    folder = cache() / ("caltech101-without-" + "-".join(without) if without else "caltech101")
    if not folder.exists():
        building = Path(tempfile.mkdtemp(dir=cache()))
        with tarfile.open(need(CALTECH_TAR)) as tar:
            for member in tar:
                parts = Path(member.name).parts
                if member.isfile() and len(parts) >= 2 and parts[-2] not in without:
                    target = building / parts[-2] / parts[-1]
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
        _publish(building, folder)
    return folder


def photo(seed: int, *, size: tuple[int, int] = (500, 375), tint: int = 0) -> bytes:
    """A JPEG of the size (width, height) with structure at every scale; each seed gives another one.

    >>> photo(1) == photo(1), photo(1) == photo(2), photo(3)[:2]
    (True, False, b'\\xff\\xd8')
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    width, height = size
    picture = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((3, 60.0), (8, 40.0), (24, 24.0), (80, 14.0)):
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
        picture += weight * np.stack([np.asarray(layer) for layer in layers], axis=2)
    picture += rng.normal(scale=4.0, size=picture.shape)
    picture += 110 + 50 * np.roll(np.array([1.0, -0.3, -0.7]), tint)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.uniform(0, 1, 4) * (width, height, width / 3, height / 3)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def generated_photos(classes: int, per_class: int) -> Path:
    """A folder of generated photos, CLASS/NUMBER.jpg; the classes differ in tint."""
    folder = cache() / f"photos-{classes}x{per_class}"
    if not folder.exists():
        building = Path(tempfile.mkdtemp(dir=cache()))
        for label in range(classes):
            home = building / f"class_{label:03d}"
            home.mkdir()
            for number in range(per_class):
                (home / f"{number:05d}.jpg").write_bytes(photo(label * per_class + number, tint=label))
        _publish(building, folder)
    return folder


def distinct_photos(count: int, *, generated: bool = False) -> tuple[list[str], str]:
    """Paths of `count` distinct photos and what they are: Caltech-101 where it is there, else generated.

    Raises: BenchmarkError, when there are fewer.
    """
    if real(CALTECH_TAR) is not None and not generated:
        paths = sorted(str(path) for path in caltech101().rglob("*.jpg"))
        # Every class takes part: photos of one class have like sizes.
        order = np.random.default_rng(0).permutation(len(paths))[:count]
        paths, what = [paths[i] for i in order], "caltech101"
    else:
        paths, what = (
            sorted(str(path) for path in generated_photos(8, -(-count // 8)).rglob("*.jpg"))[:count],
            "generated",
        )
    if len(paths) < count:
        raise BenchmarkError(f"{count} photos were asked for, {what} has {len(paths)}.")
    return paths, what


def linked(paths: Sequence[str], into: Path) -> Path:
    """A folder CLASS/NAME of hard links (copies across file systems) to exactly these photos."""
    for number, path in enumerate(paths):
        source = Path(path)
        target = into / source.parent.name / f"{number:06d}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copy(source, target)
    return into


def head_table(rows: int, features: int, classes: int) -> tuple[Path, Path]:
    """A Parquet folder (features array<float>, label string) and a .npz of the same arrays, made once.

    Shaped like VGG16's fc2 of Caltech-256: non-negative, three in four zero, with a linear signal for the labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = cache() / f"head-{rows}x{features}x{classes}"
    if not folder.exists():
        building = Path(tempfile.mkdtemp(dir=cache()))
        rng = np.random.default_rng(7)
        centres = rng.standard_normal((classes, features), dtype=np.float32)
        y = rng.integers(0, classes, rows)
        x = rng.standard_normal((rows, features), dtype=np.float32)
        x += 0.25 * centres[y]
        x -= 0.7
        np.maximum(x, 0, out=x)
        np.savez(building / "arrays.npz", x=x, y=y)
        (building / "table").mkdir()
        parts = 8
        for part in range(parts):
            piece = slice(part * rows // parts, (part + 1) * rows // parts)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(x[piece].reshape(-1)), features).cast(
                pa.list_(pa.float32())
            )
            labels = pa.array([f"class_{label:03d}" for label in y[piece]])
            table = pa.table({"features": lists, "label": labels})
            pq.write_table(table, building / "table" / f"part-{part:05d}.parquet", compression="snappy")
        _publish(building, folder)
    return folder / "table", folder / "arrays.npz"


def mnist(*, tiny: bool) -> dict[str, Path]:
    """The four IDX files of MNIST; for `tiny`, enlarged digits of scikit-learn in the same format."""
    names = {
        "train_images": "train-images-idx3-ubyte.gz",
        "train_labels": "train-labels-idx1-ubyte.gz",
        "test_images": "t10k-images-idx3-ubyte.gz",
        "test_labels": "t10k-labels-idx1-ubyte.gz",
    }
    if not tiny:
        return {key: need(f"mnist/{name}") for key, name in names.items()}
    folder = cache() / "digits-idx"
    if not folder.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.kron(digits.images[:, :, :] * (255 / 16), np.ones((1, 3, 3))).astype(np.uint8)
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        building = Path(tempfile.mkdtemp(dir=cache()))
        for side, part in (("train", slice(0, 300)), ("test", slice(300, 400))):
            _write_idx(building / names[f"{side}_images"], images[part])
            _write_idx(building / names[f"{side}_labels"], digits.target[part].astype(np.uint8))
        _publish(building, folder)
    return {key: folder / name for key, name in names.items()}


def mnist_arrays(train: int, test: int, *, tiny: bool) -> Path:
    """A .npz of the first rows of MNIST: train_x (n, 784) float32 in [0, 1], train_y int64, test_x, test_y."""
    folder = cache() / f"{'digits' if tiny else 'mnist'}-arrays-{train}x{test}"
    if not folder.exists():
        files = mnist(tiny=tiny)
        building = Path(tempfile.mkdtemp(dir=cache()))
        arrays = {}
        for side, rows in (("train", train), ("test", test)):
            pixels = read_idx(files[f"{side}_images"])[:rows]
            arrays[f"{side}_x"] = (pixels.reshape(len(pixels), -1) / 255).astype(np.float32)
            arrays[f"{side}_y"] = read_idx(files[f"{side}_labels"])[:rows].astype(np.int64)
        np.savez(building / "arrays.npz", **arrays)
        _publish(building, folder)
    return folder / "arrays.npz"


def mnist_table(rows: int, *, tiny: bool) -> Path:
    """A Parquet folder of the first rows of MNIST's training set: features array<float> in [0, 1], label string."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = cache() / f"{'digits' if tiny else 'mnist'}-table-{rows}"
    if not folder.exists():
        with np.load(mnist_arrays(rows, 1, tiny=tiny)) as arrays:
            x, y = arrays["train_x"], arrays["train_y"]
        building = Path(tempfile.mkdtemp(dir=cache()))
        parts = 4
        for part in range(parts):
            piece = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
            flat = pa.array(x[piece].reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, x.shape[1]).cast(pa.list_(pa.float32()))
            table = pa.table({"features": lists, "label": pa.array([str(label) for label in y[piece]])})
            pq.write_table(table, building / f"part-{part:05d}.parquet", compression="snappy")
        _publish(building, folder)
    return folder


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes as an array."""
    data = gzip.decompress(path.read_bytes())
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def _publish(building: Path, folder: Path) -> None:
    """Give a finished folder its name; another process may have been first, which is as good."""
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(building, ignore_errors=True)
