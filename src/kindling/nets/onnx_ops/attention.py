"""Operators of transformers: attention, rotary embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kindling.nets.onnx_ops.registry import dtype_of, op


@op("RotaryEmbedding")
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of numbers of each head turned by an angle that its place gives."""
    heads = x
    if x.dim() == 3:
        if not num_heads:
            raise ValueError("a rotary embedding without a number of heads")
        heads = x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)
    turn = rotary_embedding_dim or heads.shape[-1]
    half = turn // 2
    cos = (cos[positions] if positions is not None else cos)[..., :half].unsqueeze(1)
    sin = (sin[positions] if positions is not None else sin)[..., :half].unsqueeze(1)
    part, rest = heads[..., :turn], heads[..., turn:]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    if interleaved:
        turned = torch.stack((real, imaginary), -1).flatten(-2)
    else:
        turned = torch.cat((real, imaginary), -1)
    out = torch.cat((turned, rest), -1)
    return out.transpose(1, 2).reshape(x.shape) if x.dim() == 3 else out


@op("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad: Tensor | None = None,
    *,
    is_causal: int = 0,
    left_window_size: int = -1,
    right_window_size: int = -1,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Any:
    """Softmax of queries times keys, times values; heads that share keys, a past, masks, a soft cap.

    Returns: the result, keys and values with the past, and the products at the stage `qk_matmul_output_mode` names.
    """
    flat = q.dim() == 3
    if flat:
        if not q_num_heads or not kv_num_heads:
            raise ValueError("an attention over three axes without numbers of heads")
        q = q.reshape(q.shape[0], q.shape[1], q_num_heads, -1).transpose(1, 2)
        k = k.reshape(k.shape[0], k.shape[1], kv_num_heads, -1).transpose(1, 2)
        v = v.reshape(v.shape[0], v.shape[1], kv_num_heads, -1).transpose(1, 2)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    whole_k, whole_v = k, v
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    products = torch.matmul(q * root, (k * root).transpose(2, 3))
    stages = [products]
    if softcap:
        products = softcap * torch.tanh(products / softcap)
    stages.append(products)
    offset: Tensor | int = past
    if past_key is None and nonpad is not None:
        offset = nonpad.reshape(-1, 1, 1, 1) - q.shape[2]
    bias = _bias(q, k, mask, is_causal, (left_window_size, right_window_size), offset, nonpad)
    biased = products if bias is None else products + bias
    stages.append(biased)
    weights = torch.softmax(biased if softmax_precision is None else biased.to(dtype_of(softmax_precision)), -1)
    if bias is not None:  # a query that may look nowhere sees nothing
        weights = weights.masked_fill(torch.isneginf(bias.amax(-1, keepdim=True)), 0)
    weights = weights.to(q.dtype)
    stages.append(weights)
    out = torch.matmul(weights, v)
    if flat:
        out = out.transpose(1, 2).flatten(2)
    return out, whole_k, whole_v, stages[qk_matmul_output_mode]


def _bias(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: int,
    window: tuple[int, int],
    offset: Tensor | int,
    nonpad: Tensor | None,
) -> Tensor | None:
    """What is added to the products: minus infinity where a query may not look."""
    rows, columns = q.shape[2], k.shape[2]
    parts: list[Tensor] = []

    def hide(allowed: Tensor) -> None:
        none = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device)
        parts.append(none.masked_fill(~allowed, -math.inf))

    if mask is not None:
        missing = columns - mask.shape[-1]
        if mask.dtype == torch.bool:
            hide(torch.nn.functional.pad(mask, (0, missing)))
        else:
            parts.append(torch.nn.functional.pad(mask, (0, missing), value=-math.inf))
    ahead = torch.arange(columns, device=q.device) - (torch.arange(rows, device=q.device).unsqueeze(1) + offset)
    left, right = window
    if causal:
        hide(ahead <= 0)
    if left >= 0:
        hide(ahead >= -left)
    if right >= 0:
        hide(ahead <= right)
    if nonpad is not None:
        hide(torch.arange(columns, device=q.device) < nonpad.reshape(-1, 1, 1, 1))
    return sum(parts[1:], parts[0]) if parts else None
