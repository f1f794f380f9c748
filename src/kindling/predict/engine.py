"""The forward pass: packed rows in, float32 arrays out, in batches of one fixed size.

Also decides between bfloat16 and float32, and predicts plain Python lists. Knows torch and numpy; Spark is in
`batch.py`.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from kindling.errors import ConfigError, DataError, ModelError
from kindling.predict.stages import BATCH_NUMBERS, ROWS, TwoStages, in_stages
from kindling.prepare import ImageStep, Preparation
from kindling.signature import Signature

if TYPE_CHECKING:
    from kindling.model import Model

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
        self.batch_size = batch_size or net_batch(signature, module)
        self.module = in_stages(
            inference_copy(module, self.dtype), signature, self.batch_size, ghost=lambda: _ghost(module)
        )
        self._heap, self._warm = _Heap(), False

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, shape (rows, ...), for packed arrays of any number of rows (also none).

        Floating-point outputs come as float32, others in their own dtype.

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
                    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    results[name] = _apart((rows, *tensor.shape[1:]), str(kind).removeprefix("torch."))
                torch.from_numpy(results[name])[start : start + count].copy_(tensor[:count])
        return results

    def _forward(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        # What a first pass leaves behind (oneDNN's kernels) must not lie between the large tensors of all others.
        memory, self._warm = (self._heap.used() if self._warm else contextlib.nullcontext()), True
        with torch.inference_mode(), memory:
            batch = {
                name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.preparation.batch(arrays, targets=False).items()
            }
            return self.signature.call(self.module, batch)


def _apart(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array in Arrow's memory. Results outlive forward passes: amid the memory of activations they would break it
    up, and the next pass would need new memory (see `keep_freed_memory`)."""
    buffer = pa.allocate_buffer(math.prod(shape) * np.dtype(dtype).itemsize)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    if len(array) == rows:
        return array
    whole = np.zeros((rows, *array.shape[1:]), array.dtype)
    whole[: len(array)] = array
    whole[len(array) :] = array[:1] if len(array) else 0
    return whole


def net_batch(signature: Signature, module: nn.Module | None = None) -> int:
    """Rows per forward pass that suit the net: few where one row is large (a photo), many where it is small.

    A batch's largest tensor should stay near the caches, and small beside the weights, which workers share while each
    has activations of its own. With `module` every layer's output is looked at (a pass without numbers, on the meta
    device), else only what goes in. A net that can run its wide front on fewer rows (see `stages`) gets 16 or more.

    >>> from kindling.signature import TensorSpec
    >>> net_batch(Signature({"image": TensorSpec(("N", 3, 224, 224))}, {}))
    16
    >>> net_batch(Signature({"x": TensorSpec(("N", 20))}, {}))
    1024
    """
    inputs = [math.prod(_sizes(spec.shape)) for spec in signature.inputs.values()]
    largest = max([*inputs, *(_activations(module, signature) if module is not None else [])], default=1)
    # Without a look inside, count on layers that are several times as wide as the input.
    wanted = BATCH_NUMBERS // max(largest if module is not None else 6 * largest, 1)
    rows = 1 << max(0, min(10, wanted.bit_length() - 1))
    if module is None or rows >= ROWS:
        return rows
    staged = in_stages(module, signature, ROWS, ghost=lambda: _ghost(module))
    return ROWS if isinstance(staged, TwoStages) else rows


def _sizes(shape: Sequence[int | str]) -> list[int]:
    return [size if isinstance(size, int) else 64 for size in shape[1:]]


def _activations(module: nn.Module, signature: Signature) -> list[int]:
    """Numbers in each layer's output for one row; empty where the net does not run without numbers."""
    seen: list[int] = []

    def note(_layer: nn.Module, _inputs: object, output: object) -> None:
        seen.extend(
            t.numel() for t in (output if isinstance(output, tuple | list) else [output]) if isinstance(t, Tensor)
        )

    try:
        with torch.inference_mode():
            ghost = _ghost(module)
            for part in ghost.modules():
                if not any(True for _ in part.children()):
                    part.register_forward_hook(note)
            ghost(
                *(
                    torch.empty((1, *_sizes(spec.shape)), dtype=getattr(torch, spec.dtype), device="meta")
                    for spec in signature.inputs.values()
                )
            )
    except Exception:  # data-dependent nets cannot run so; what was seen until then still bounds the batch
        pass
    return seen


def _ghost(module: nn.Module) -> nn.Module:
    """A copy in inference mode whose tensors have shapes and no numbers; in float32 also where weights came in bf16."""

    def shape_of(_part: nn.Module, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype)

    return _copy(module, shape_of)


def inference_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A structural copy in inference mode, its floating-point tensors in `dtype`, convolution weights channels last.

    Tensors that already fit are shared with `module`, so a module opened from a shipped file costs no memory.
    """

    def convert(part: nn.Module, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        normalises = isinstance(part, nn.modules.batchnorm._NormBase)
        value = tensor.to(torch.float32 if normalises else dtype)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value

    return _copy(module, convert)


def _copy(module: nn.Module, convert: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A structural copy in inference mode whose parameters and buffers are made by `convert(their layer, tensor)`."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if id(tensor) not in memo:
                value = convert(part, tensor.detach())
                memo[id(tensor)] = (
                    nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                )
    return copy.deepcopy(module, memo).eval()


def keep_freed_memory() -> None:
    """Let glibc keep what a forward pass frees for the next one, instead of fetching zeroed pages from the kernel anew.

    A net's activations are the same size in every batch: fetching them each time costs VGG16 a fifth of its time. For
    workers only. What is allocated between the passes (photos, Arrow's buffers) comes from elsewhere: it would lie amid
    the free memory, and the next pass would not find room for its large tensors and take more.
    """
    global _libc
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_FROM)
        _libc = libc
    except (AttributeError, OSError, TypeError):
        return  # not glibc


class _Heap:
    """Where the large tensors of a forward pass come from, in a process that called `keep_freed_memory`.

    A heap breaks up in time: a small block that stays amid the free ones, and a large tensor finds no room any more. So
    the process is weighed now and then, and gives back what is free when it has grown.
    """

    def __init__(self) -> None:
        self._weighed = 0.0
        self._lowest = 0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Large tensors made inside take memory that was freed before."""
        if _libc is None:
            yield
            return
        _libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        try:
            yield
        finally:
            _libc.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_FROM)
            if time.monotonic() > self._weighed + _WEIGH_EVERY_S:
                self._weigh(_libc)
                self._weighed = time.monotonic()

    def _weigh(self, libc: ctypes.CDLL) -> None:
        now = _anonymous_bytes()
        if self._lowest and now > self._lowest + _GROWTH:
            libc.malloc_trim(0)
            self._lowest = 0  # learned anew after the next pass, which takes what it needs
        else:
            self._lowest = min(self._lowest or now, now)


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs; 0 where that cannot be told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


_libc: ctypes.CDLL | None = None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OWN_PAGES_FROM = 128 << 10
"""glibc's own default: larger blocks get pages of their own, which go back to the kernel."""
_WEIGH_EVERY_S = 0.25
_GROWTH = 48 << 20


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


# ---------------------------------------------------------------------------------------------------------- answers


def top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best classes of each row and their probabilities, best first; of equal scores the first class.

    Args:
        scores: logits, shape (N, classes), or (N,) or (N, 1) for two classes told apart by the sign.
    Returns: classes int64 and probabilities float32, each of shape (N, min(k, classes)).

    >>> classes, probabilities = top_k(np.float32([[0, 2, 1], [5, 5, 5]]), 2)
    >>> classes.tolist(), probabilities.round(3).tolist()
    ([[1, 2], [0, 1]], [[0.665..., 0.245...], [0.333..., 0.333...]])
    """
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        column = scores.reshape(-1, 1)
        scores = np.concatenate([np.zeros_like(column), column], axis=1)
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    shifted = scores - np.maximum(scores.max(axis=1, keepdims=True, initial=-np.inf), np.finfo(np.float64).min)
    weights = np.exp(shifted)
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    classes = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return classes, np.take_along_axis(shares, classes, axis=1).astype(np.float32)


def check_classifier(model: Model) -> None:
    """Raises: ModelError, when the first output is not one score for each of the model's labels."""
    name, spec = next(iter(model.signature.outputs.items()))
    labels, row = len(model.labels or ()), spec.shape[1:]
    if row != (labels,) and not (labels == 2 and row in ((), (1,))):
        raise ModelError(
            f"output {name!r} of model {model.name!r} gives {'x'.join(map(str, row)) or 'one number'} for a row, "
            f"not one score for each of {labels} labels."
        )


def predict_list(
    model: Model, items: Sequence[Any], *, top_k: int = 5, precision: str = "fp32", on_error: str = "keep"
) -> list[dict[str, Any]]:
    """The model's answers for plain Python things, in this process, without Spark.

    Args:
        items: for a model of one input, image file contents (bytes), paths, PIL images or uint8 arrays (RGB); numbers,
            lists or arrays for other inputs. For any model, dicts of the columns it reads.
        on_error: as in `predict` over a DataFrame; `"fail"` raises DataError at the first broken item.
    Returns: one dict per item: `prediction`, `probability`, `top_k` (a list of dicts with `label` and `probability`)
        and `error`, None for good items; without labels `prediction` is an array, or a dict of them by output.

    >>> from kindling.model import Model
    >>> net = nn.Linear(2, 2)
    >>> _ = net.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    >>> model = Model.of(net, column="x", shape=(2,), labels=["left", "right"])
    >>> answer, broken = predict_list(model, [[0.0, 3.0], [1.0]], top_k=1)
    >>> answer["prediction"], round(answer["probability"], 3), broken["error"]
    ('right', 0.953, "column 'x' holds 1 numbers, not 2")
    """
    if top_k < 1:
        raise ConfigError("top_k", top_k, "leaves no answer", "Use 1 or more")
    if on_error not in ("keep", "drop", "fail"):
        raise ConfigError("on_error", on_error, "is unknown", "Use 'keep', 'drop' or 'fail'")
    if precision == "auto":
        precision = "fp32"  # what is tried out on a DataFrame's first rows would cost more here than it saves
    if model.labels is not None:
        check_classifier(model)
    if not items:
        return []
    arrays, errors = _pack_items(model.preparation, items)
    if errors and on_error == "fail":
        row, why = min(errors.items())
        raise DataError(f"item {row} cannot be used: {why}.")
    size = min(net_batch(model.signature, model.module), 1 << (len(items) - 1).bit_length())
    results = Engine(model.module, model.signature, model.preparation, precision=precision, batch_size=size).run(arrays)
    answers = iter(_answers(model, results, top_k))
    nothing = dict.fromkeys(("prediction", "probability", "top_k") if model.labels is not None else ("prediction",))
    whole = [
        {**nothing, "error": errors[row]} if row in errors else {**next(answers), "error": None}
        for row in range(len(items))
    ]
    return whole if on_error == "keep" else [answer for answer in whole if answer["error"] is None]


def _answers(model: Model, results: Mapping[str, np.ndarray], k: int) -> list[dict[str, Any]]:
    first = next(iter(results.values()))
    labels = model.labels
    if labels is None:
        return [
            {"prediction": first[row] if len(results) == 1 else {name: value[row] for name, value in results.items()}}
            for row in range(len(first))
        ]
    return [
        {
            "prediction": labels[classes[0]],
            "probability": float(shares[0]),
            "top_k": [
                {"label": labels[c], "probability": float(share)} for c, share in zip(classes, shares, strict=True)
            ],
        }
        for classes, shares in zip(*top_k(first, k), strict=True)
    ]


def _pack_items(preparation: Preparation, items: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    step = preparation.inputs[0]
    if not all(isinstance(item, Mapping) for item in items):
        if len(preparation.inputs) != 1:
            names = ", ".join(preparation.columns(targets=False))
            raise DataError(f"the model reads several columns ({names}): give each item as a dict of them.")
        if isinstance(step, ImageStep):
            return _decoded(step, [item[step.column] if isinstance(item, Mapping) else item for item in items])
        items = [item if isinstance(item, Mapping) else {step.column: item} for item in items]
    elif isinstance(step, ImageStep) and len(preparation.inputs) == 1:
        return _decoded(step, [item.get(step.column) for item in items])
    columns = {
        name: pa.array([_plain(item.get(name)) for item in items]) for name in preparation.columns(targets=False)
    }
    packed = preparation.pack(pa.RecordBatch.from_pydict(columns), targets=False)
    return dict(packed.arrays), dict(packed.errors)


def _decoded(step: ImageStep, items: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    good, errors = [], {}
    for row, item in enumerate(items):
        try:
            good.append(step.decode_one(item))
        except DataError as error:
            errors[row] = str(error)
    return {step.name: np.stack(good) if good else np.empty((0, *step.shape), np.uint8)}, errors


def _plain(value: Any) -> Any:
    """What Arrow takes: arrays and tensors as flat lists."""
    return np.asarray(value).ravel().tolist() if hasattr(value, "__array__") else value
