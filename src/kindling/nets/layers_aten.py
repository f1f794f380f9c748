"""A layer that is one of torch's own operators by name: what `torch.export` writes its graphs in.

Only operators of a closed list can be named: functions of tensors that read no file, write no memory of others and run
no code. The reader of such graphs is `kindling.formats.pt2`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kindling import graph
from kindling.errors import FormatError

_NAMES = frozenset(
    """
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _adaptive_avg_pool2d _adaptive_avg_pool3d _cdist_forward
_log_softmax _native_batch_norm_legit_no_training
_pdist_forward _safe_softmax _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view abs acos acosh
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
add addbmm addcdiv addcmul addmm addmv alias all alpha_dropout amax amin aminmax any arange argmax argmin argsort asin
asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat cdist ceil celu
chunk clamp clamp_max clamp_min clone col2im concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution copysign cos cosh cosine_similarity cross cummax cummin cumprod cumsum
detach diag diag_embed diagonal diff div dot dropout einsum elu embedding embedding_bag empty empty_like eq erf erfc
erfinv exp exp2 expand expand_as expm1 eye feature_dropout fill flatten flip floor floor_divide fmax fmin fmod frac full
full_like gather ge gelu glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gt hardshrink hardsigmoid
hardswish hardtanh hypot im2col index index_add index_select inner instance_norm is_nonzero isfinite isinf isnan
layer_norm le leaky_relu lerp lgamma lift_fresh_copy linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid
log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lstm lt masked_fill masked_select
matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median meshgrid
min minimum mish mm movedim mse_loss mul multiply mv nan_to_num narrow native_batch_norm native_dropout
native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero norm one_hot ones ones_like
outer pad permute pixel_shuffle pixel_unshuffle pow prelu prod quantile rand rand_like randn randn_like reciprocal
reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub
scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce select select_scatter selu sigmoid sign
silu sin sinh slice slice_scatter softmax softplus softshrink softsign sort split split_with_sizes sqrt square squeeze
stack std std_mean sub sum sym_numel sym_size t take take_along_dim tan tanh tensor_split threshold tile to topk
transpose tril triu true_divide trunc type_as unbind unflatten unfold unsafe_split unsqueeze upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var
var_mean view view_as where xlogy zeros zeros_like
""".split()
)


def operator_of(op: str) -> Any:
    """The operator `"name.overload"` of ATen.

    Raises: FormatError, for one that is not on the list, or that this torch has not.

    >>> operator_of("relu.default")(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    name, _, overload = op.partition(".")
    if name not in _NAMES or not (overload.replace("_", "").isalnum() and not overload.startswith("_")):
        raise FormatError(f"operator {op[:80]!r} is not on kindling's list.")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or overload not in packet.overloads():
        raise FormatError(f"this version of torch has no operator {op[:80]!r}.")
    return getattr(packet, overload)


def allowed(name: str) -> bool:
    """Whether an operator may be named."""
    return name in _NAMES


@graph.allow
class AtenOp(nn.Module):
    """One operator of ATen with everything that is fixed.

    Args:
        op: name and overload.
        arguments: each a pair: `("x", k)` is argument k of `forward`, `("at", k)` the device where it is;
            `("v", value)` a plain value; `("l", items)` a list; `("d", name)` a dtype; `("m", name)` a memory format.
        named: pairs of a keyword and such an argument.
    Raises: FormatError, for an operator that is not on the list.

    >>> AtenOp("add.Tensor", (("x", 0), ("v", 1)))(torch.tensor([1.0])).item()
    2.0
    """

    def __init__(self, op: str, arguments: tuple[Any, ...], named: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.op, self.arguments, self.named = op, arguments, named
        operator_of(op)

    def forward(self, *inputs: Any) -> Any:
        args = [_value(argument, inputs) for argument in self.arguments]
        return operator_of(self.op)(*args, **{name: _value(argument, inputs) for name, argument in self.named})

    @property
    def kind(self) -> str:
        """What the layer is called in summaries."""
        return self.op.partition(".")[0]

    def extra_repr(self) -> str:
        return self.op


def _value(argument: Any, inputs: tuple[Any, ...]) -> Any:
    kind, what = argument
    if kind == "x":
        return inputs[what]
    if kind == "at":
        return inputs[what].device
    if kind == "v":
        return what
    if kind == "l":
        return [_value(part, inputs) for part in what]
    if kind == "d":
        return graph.dtype_named(what)
    if kind == "m":
        return {"channels_last": torch.channels_last, "contiguous_format": torch.contiguous_format}.get(
            what, torch.preserve_format
        )
    raise FormatError(f"an operator's argument is of kind {kind!r}, which is not on kindling's list.")
