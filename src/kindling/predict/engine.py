"""The forward pass: packed rows in, float32 arrays out, in batches of one fixed size.

Also decides between bfloat16 and float32, and predicts plain Python lists. Knows torch and numpy; Spark is in
`batch.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, ModelError
from kindling.prepare import Preparation
from kindling.signature import Signature

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEAN_COSINE, LOW_COSINE = 0.9999, 0.9998
"""What bfloat16 features must exceed against float32: the mean, and the first percentile, over the sample's rows."""


class Engine:
    """A module ready to run on packed rows.

    Every forward pass has exactly `batch_size` rows, the last one padded with copies of its first row, so that a row's
    result does not depend, to the bit, on how many others came along.

    Args:
        module: left as it is; the engine works on a structural copy in inference mode that shares its tensors where
            dtype and memory layout allow.
        precision: `"fp32"` or `"bf16"`.
        batch_size: rows per forward pass; None takes `net_batch`'s.

    Raises: ConfigError, for an unknown precision or a batch size below 1.

    >>> from kindling.prepare import ArrayStep
    >>> from kindling.signature import TensorSpec
    >>> double = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(double.weight, 2.0)
    >>> signature = Signature({"x": TensorSpec(("N", 1))}, {"y": TensorSpec(("N", 1))})
    >>> engine = Engine(double, signature, Preparation((ArrayStep("x", "x", (1,)),)), batch_size=4)
    >>> engine.run({"x": np.float32([[1], [2], [3]])})["y"].ravel()
    array([2., 4., 6.], dtype=float32)
    """

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        preparation: Preparation,
        *,
        precision: str = "fp32",
        batch_size: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError("precision", precision, "is not a precision the engine has", "Use 'fp32' or 'bf16'")
        if batch_size is not None and batch_size < 1:
            raise ConfigError("batch_size", batch_size, "leaves no row in a batch", "Use 1 or more")
        self.signature = signature
        self.preparation = preparation
        self.dtype = PRECISIONS[precision]
        self.batch_size = batch_size or net_batch(signature)
        self.module = inference_copy(module, self.dtype)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32, shape (rows, ...), for packed arrays of any number of rows (also none).

        Raises: ModelError, when an output does not have one entry per row.
        """
        rows = len(next(iter(arrays.values())))
        results: dict[str, np.ndarray] = {}
        # A pass over no rows at all still tells the outputs' shapes: run one batch of zeros.
        for start in range(0, max(rows, 1), self.batch_size):
            part = {name: array[start : start + self.batch_size] for name, array in arrays.items()}
            count = min(rows - start, self.batch_size)
            for name, tensor in self._forward(
                {name: _padded(array, self.batch_size) for name, array in part.items()}
            ).items():
                if tensor.dim() < 1 or tensor.shape[0] != self.batch_size:
                    raise ModelError(
                        f"output {name!r} has shape {tuple(tensor.shape)} for {self.batch_size} rows; "
                        "its first axis must be the rows'."
                    )
                if name not in results:
                    results[name] = np.empty((rows, *tensor.shape[1:]), np.float32)
                torch.from_numpy(results[name])[start : start + count].copy_(tensor[:count])
        return results

    def _forward(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        with torch.inference_mode():
            batch = {
                name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.preparation.batch(arrays, targets=False).items()
            }
            return self.signature.call(self.module, batch)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    if len(array) == rows:
        return array
    whole = np.zeros((rows, *array.shape[1:]), array.dtype)
    whole[: len(array)] = array
    whole[len(array) :] = array[:1] if len(array) else 0
    return whole


def net_batch(signature: Signature) -> int:
    """Rows per forward pass that suit the net: few where one row is large (a photo), many where it is small.

    >>> from kindling.signature import TensorSpec
    >>> net_batch(Signature({"image": TensorSpec(("N", 3, 224, 224))}, {}))
    16
    >>> net_batch(Signature({"x": TensorSpec(("N", 20))}, {}))
    1024
    """
    shapes = [[size if isinstance(size, int) else 64 for size in spec.shape[1:]] for spec in signature.inputs.values()]
    numbers = sum(math.prod(shape) for shape in shapes)
    # 16 photos of 224 x 224 x 3 keep a net's activations near the caches; measured best for VGG16 and SqueezeNet alike.
    wanted = 16 * 3 * 224 * 224 // max(numbers, 1)
    return 1 << max(3, min(10, wanted.bit_length() - 1))


def inference_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A structural copy in inference mode, its floating-point tensors in `dtype`, convolution weights channels last.

    Tensors that already fit are shared with `module`, so a module opened from a shipped file costs no memory.
    """
    keep = {
        id(t)
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase)
        for t in _own_tensors(part)
    }
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in _own_tensors(part):
            if id(tensor) not in memo:
                value = tensor.detach()
                if value.is_floating_point():
                    value = value.to(torch.float32 if id(tensor) in keep else dtype)
                    if value.dim() == 4:
                        value = value.contiguous(memory_format=torch.channels_last)
                memo[id(tensor)] = (
                    nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                )
    return copy.deepcopy(module, memo).eval()


def _own_tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)


# ------------------------------------------------------------------------------------------------------ precision


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Which precision a net runs in, and why."""

    name: str
    """`"fp32"` or `"bf16"`."""
    reason: str
    cosines: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Output -> mean and first percentile of the cosines between bfloat16 and float32 features of the sample's rows."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """bfloat16 against float32 on some rows; comparisons of several tasks are put together with `decide`."""

    cosines: Mapping[str, Sequence[float]]
    seconds: tuple[float, float]
    """Time of one warm batch in float32 and in bfloat16."""
    failure: str | None = None


@cache
def hardware_bf16() -> str | None:
    """The instruction set that multiplies bfloat16 in this processor's hardware, or None.

    Without one, torch computes bfloat16 by way of float32, slower than float32 itself.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = {flag for line in lines for flag in line.split(":", 1)[-1].split()}
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), None)


def compare(
    module: nn.Module,
    signature: Signature,
    preparation: Preparation,
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int | None = None,
) -> Comparison:
    """Run both precisions over packed rows; a net that fails in bfloat16 is reported, not raised."""
    outputs, seconds = [], []
    for name in PRECISIONS:
        try:
            engine = Engine(module, signature, preparation, precision=name, batch_size=batch_size)
            one = {key: array[: engine.batch_size] for key, array in arrays.items()}
            rows = len(next(iter(arrays.values())))
            if rows <= engine.batch_size:
                engine.run(one)
            outputs.append(engine.run(arrays))
            began = time.perf_counter()
            engine.run(one)
            seconds.append(time.perf_counter() - began)
        except RuntimeError as error:
            if name == "fp32":
                raise
            return Comparison(cosines={}, seconds=(seconds[0], 0.0), failure=str(error).splitlines()[0])
    exact, short = outputs
    return Comparison(
        cosines={name: row_cosines(exact[name], short[name]).tolist() for name in exact},
        seconds=(seconds[0], seconds[1]),
    )


def row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`, float64; two rows of zeros count as 1, one as 0.

    >>> row_cosines(np.float32([[1, 0], [0, 0]]), np.float32([[1, 1], [0, 0]])).round(4)
    array([0.7071, 1.    ])
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1.0, norms))


def decide(hardware: str | None, comparisons: Iterable[Comparison]) -> Precision:
    """The precision from what the workers measured.

    >>> print(decide("avx512_bf16", [Comparison(cosines={"y": [0.99999, 0.99998]}, seconds=(0.2, 0.1))]))
    bf16: avx512_bf16; 2 rows agree with fp32 (cosine mean 0.999985, 1st percentile 0.999980), 2.0 x as fast
    """
    if hardware is None:
        return Precision(name="fp32", reason="the processor has no bfloat16 arithmetic")
    parts = list(comparisons)
    failure = next((part.failure for part in parts if part.failure), None)
    if failure is not None:
        return Precision(name="fp32", reason=f"the net does not run in bf16: {failure}")
    names = list(dict.fromkeys(name for part in parts for name in part.cosines))
    rows = {name: np.concatenate([np.asarray(part.cosines.get(name, ())) for part in parts]) for name in names}
    if not rows or not all(map(len, rows.values())):
        return Precision(name="fp32", reason="no usable row to try bf16 on")
    cosines = {name: (float(np.mean(values)), float(np.percentile(values, 1))) for name, values in rows.items()}
    mean, low = (min(pair[i] for pair in cosines.values()) for i in (0, 1))
    count = len(next(iter(rows.values())))
    figures = f"cosine mean {mean:.6f}, 1st percentile {low:.6f}"
    ratio = sum(part.seconds[0] for part in parts) / max(sum(part.seconds[1] for part in parts), 1e-9)
    if not (mean > MEAN_COSINE and low > LOW_COSINE):  # also when one is not a number
        return Precision(name="fp32", reason=f"bf16 strays from fp32 on {count} rows ({figures})", cosines=cosines)
    if ratio < 0.9:
        return Precision(
            name="fp32", reason=f"bf16 runs at {ratio:.2f} x the speed of fp32 here ({hardware})", cosines=cosines
        )
    reason = f"{hardware}; {count} rows agree with fp32 ({figures}), {ratio:.1f} x as fast"
    return Precision(name="bf16", reason=reason, cosines=cosines)


def pick_precision(
    module: nn.Module,
    signature: Signature,
    preparation: Preparation,
    sample_arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int | None = None,
) -> Precision:
    """bf16 where this processor has it in hardware and the sample's outputs agree with fp32; else fp32, and why."""
    hardware = hardware_bf16()
    if hardware is None:
        return decide(None, ())
    return decide(hardware, [compare(module, signature, preparation, sample_arrays, batch_size=batch_size)])
