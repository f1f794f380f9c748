"""Operators on signals: Fourier transforms, windows, the mel scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import axis_of, checked, dtype_of, op, whole


def _dft(x: Tensor, length: int | None, axis: int, inverse: int, onesided: int) -> Tensor:
    kind = x.dtype
    x = x.double()  # what cancels is then zero to the last bit of the result
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else torch.complex(x[..., 0], x[..., 0] * 0)
    along = axis_of(axis, x.dim())
    if inverse and onesided:
        count = length if length is not None else 2 * (signal.shape[along] - 1)
        real: Tensor = torch.fft.irfft(signal, count, along)
        return real.unsqueeze(-1).to(kind)
    found = torch.fft.ifft(signal, length, along) if inverse else torch.fft.fft(signal, length, along)
    if onesided:
        found = found.narrow(along, 0, found.shape[along] // 2 + 1)
    return torch.view_as_real(found).to(kind)


@op("DFT")
def dft_17(x: Tensor, length: Tensor | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    """Real signals have a last axis of 1, complex ones of 2."""
    return _dft(x, None if length is None else whole(length), axis, inverse, onesided)


@op("DFT", since=20)
def dft(
    x: Tensor, length: Tensor | None = None, axis: Tensor | int | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    along = -2 if axis is None else whole(axis)
    return _dft(x, None if length is None else whole(length), along, inverse, onesided)


@op("STFT")
def stft(
    signal: Tensor,
    frame_step: Tensor,
    window: Tensor | None = None,
    frame_length: Tensor | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Shape (rows, frames, frequencies, 2)."""
    step = whole(frame_step)
    length = whole(frame_length) if frame_length is not None else (window.shape[0] if window is not None else 0)
    if length < 1 or step < 1:
        raise ValueError("a transform of frames without a length")
    frames = signal.unfold(1, length, step).transpose(2, 3)  # (rows, frames, length, 1 or 2)
    if window is not None:
        frames = frames * window.reshape(-1, 1)
    return _dft(frames, length, 2, 0, onesided if signal.shape[-1] == 1 else 0)


def _cosines(size: Tensor, output_datatype: int, periodic: int, terms: tuple[float, ...]) -> Tensor:
    count = whole(size)
    checked([count])
    at = torch.arange(count, dtype=torch.float64, device="cpu")
    angle = 2 * math.pi * at / max(count if periodic else count - 1, 1)
    out = torch.zeros_like(at)
    for k, factor in enumerate(terms):
        out = out + factor * torch.cos(k * angle)
    return out.to(dtype_of(output_datatype))


@op("HannWindow")
def hann(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, output_datatype, periodic, (0.5, -0.5))


@op("HammingWindow")
def hamming(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, output_datatype, periodic, (25 / 46, -21 / 46))


@op("BlackmanWindow")
def blackman(size: Tensor, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, output_datatype, periodic, (0.42, -0.5, 0.08))


@op("MelWeightMatrix")
def mel(
    bins: Tensor, dft_length: Tensor, sample_rate: Tensor, low: Tensor, high: Tensor, *, output_datatype: int = 1
) -> Tensor:
    """Triangles over the frequencies of a transform, evenly spread on the mel scale."""
    count, length, rate = whole(bins), whole(dft_length), whole(sample_rate)
    if not 0 < count < 2**20 or not 0 < length < 2**24:
        raise ValueError(f"a mel matrix of {count} bins over {length} samples")

    def to_mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    first, last = to_mel(float(low)), to_mel(float(high))
    edges = [first + (last - first) * k / (count + 2) for k in range(count + 2)]
    places = [math.floor((length + 1) * (700 * (10 ** (edge / 2595) - 1)) / rate) for edge in edges]
    out = torch.zeros(length // 2 + 1, count, dtype=torch.float64)
    rows = torch.arange(length // 2 + 1, dtype=torch.float64)
    for k in range(count):
        left, centre, right = places[k : k + 3]
        if centre == left:
            if centre < len(out):
                out[centre, k] = 1
        else:
            rising = (rows >= left) & (rows <= centre)
            out[rising, k] = (rows[rising] - left) / (centre - left)
        if right > centre:
            falling = (rows >= centre) & (rows < right)
            out[falling, k] = (right - rows[falling]) / (right - centre)
    return out.to(dtype_of(output_datatype))
