"""A module's architecture as JSON: an fx graph over a closed list of layers, functions and tensor methods.

`to_json` writes it, `from_json` builds a module from it on the meta device, without memory for weights and without
running anything that the file brings: every name is looked up in the lists below, every identifier is checked before
fx writes its `forward`. Weights are in `bundle.py`; tracing modules into graphs is in `surgery.py`. Knows torch only.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import keyword
import math
import operator
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from kindling.errors import FormatError, ModelError, did_you_mean

FORMAT = 1
"""Version of the JSON; a reader refuses others."""

NOTES = "kindling"
"""Key of a GraphModule's `meta` under which surgery keeps what it knows of names; it travels with the graph."""

MAX_NODES = 50_000
MAX_DEPTH = 16
MAX_PARTS = 32
_INT_LIMIT = 2**53
_LOOP_LIMIT = 4096  # arguments that make a constructor loop: layers of an LSTM, axes of a shape
_ARGUMENT_DEPTH = 8  # lists inside lists: the bodies of ONNX's loops

Foreign = Callable[[str, nn.Module], Mapping[str, Any]]
"""Describes a layer that is on no list as JSON, or raises ModelError."""
FromForeign = Callable[[str, Mapping[str, Any]], nn.Module]
"""Builds such a layer again, or raises FormatError."""

# ------------------------------------------------------------------------------------------------- what is allowed

_LAYERS = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle
CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d
ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineSimilarity CrossMapLRN2d Dropout Dropout1d Dropout2d Dropout3d
ELU Embedding EmbeddingBag FeatureAlphaDropout Flatten Fold GELU GLU GRU GRUCell GroupNorm Hardshrink Hardsigmoid
Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LPPool3d LSTM LSTMCell
LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d
MaxUnpool2d MaxUnpool3d Mish MultiheadAttention PReLU PairwiseDistance PixelShuffle PixelUnshuffle RMSNorm RNN RNNCell
RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
TransformerEncoderLayer Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
""".split()

_OPERATORS = """
abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imul invert ior ipow isub itruediv le lt matmul mod mul ne
neg not_ or_ pos pow sub truediv xor
""".split()

_TORCH = """
_assert abs acos add addbmm addcdiv addcmul addmm addmv adjoint all amax amin aminmax angle any arange argmax argmin
argsort asin atan atan2 baddbmm bernoulli bilinear bincount bmm broadcast_tensors broadcast_to bucketize cat cdist ceil
celu chunk clamp clamp_max clamp_min clone column_stack concat concatenate conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad
detach diag diag_embed diagonal diff div dot dropout dsplit dstack einsum embedding empty_like eq erf erfc erfinv exp
exp2 expm1 eye flatten flip fliplr flipud floor floor_divide fmod frac full full_like gather ge greater greater_equal
group_norm gt hsplit hstack hypot index_select inner instance_norm inverse isclose isfinite isinf isnan kron layer_norm
le lerp less less_equal lgamma linspace log log10 log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not
logical_or logical_xor logit logsumexp lt masked_fill masked_select matmul max maximum mean median meshgrid min minimum
mm movedim moveaxis mul multiply mv nan_to_num nanmean nansum narrow ne neg negative nonzero norm not_equal numel
ones ones_like outer permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod quantile rad2deg rand
rand_like randn randn_like ravel reciprocal relu relu_ remainder repeat_interleave reshape roll rot90 round rsqrt rsub
scatter scatter_add searchsorted select selu sigmoid sign sin sinc sinh softmax sort split split_with_sizes sqrt square
squeeze stack std std_mean sub subtract sum swapaxes swapdims t take take_along_dim tan tanh tensor_split tensordot
threshold tile topk transpose trapezoid tril triu true_divide trunc unbind unflatten unsqueeze var var_mean vdot
vsplit vstack where xlogy zeros zeros_like
""".split()

_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy
binary_cross_entropy_with_logits celu channel_shuffle conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d cosine_similarity cross_entropy dropout dropout1d dropout2d dropout3d elu elu_ embedding embedding_bag
feature_alpha_dropout fold gelu glu grid_sample group_norm gumbel_softmax hardshrink hardsigmoid hardswish hardtanh
hardtanh_ huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu leaky_relu_ linear
local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d max_unpool1d
max_unpool2d max_unpool3d mish mse_loss nll_loss normalize one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle
prelu relu relu6 relu_ rms_norm rrelu scaled_dot_product_attention selu sigmoid silu smooth_l1_loss softmax softmin
softplus softshrink softsign tanh tanhshrink threshold unfold
""".split()

METHODS = frozenset(
    """
abs add add_ addcdiv addcmul addmm all amax amin any argmax argmin argsort atan2 baddbmm bfloat16 bitwise_and
bitwise_not bitwise_or bmm bool ceil chunk clamp clamp_ clamp_max clamp_min clone contiguous cos cosh cpu cross cummax
cumprod cumsum detach diag diagonal diff dim div div_ dot double eq erf exp exp_ expand expand_as expm1 fill_ flatten
flip float floor floor_divide floor_divide_ fmod gather ge gt half hypot index_select int inverse is_floating_point
isfinite isinf isnan le lerp log log10 log1p log2 log_softmax logical_and logical_not logical_or logical_xor logsumexp
long lt masked_fill masked_fill_ masked_select matmul max maximum mean median min minimum mm movedim mul mul_ mv
nan_to_num narrow ndimension ne neg new_full new_ones new_zeros nonzero norm numel outer permute pow prod reciprocal
relu relu_ remainder repeat repeat_interleave reshape reshape_as roll round rsqrt scatter scatter_add select short
sigmoid sigmoid_ sign sin size softmax sort split split_with_sizes sqrt square squeeze std sub sub_ sum swapaxes t take
tan tanh tanh_ tensor_split tile to topk transpose tril triu true_divide trunc type_as unbind unflatten unfold
unsqueeze var view view_as where zero_
""".split()
)
"""Tensor methods that a graph may call; none of them reads files, runs a callable or leaves the tensor world."""

ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "imag", "is_cuda", "mH", "mT", "ndim", "real", "shape"})
"""Tensor attributes that a graph may read."""

_DTYPES = {
    name: getattr(torch, name)
    for name in """bfloat16 bool complex64 complex128 float16 float32 float64 int8 int16 int32 int64 uint8""".split()
}
_MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("channels_last", "channels_last_3d", "contiguous_format", "preserve_format")
}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for prefix, home, names in (
        ("operator", operator, _OPERATORS),
        ("functional", functional, _FUNCTIONAL),
        ("torch", torch, _TORCH),
    ):
        # What an older torch lacks is left out: a graph that needs it is then refused by name.
        found |= {f"{prefix}.{name}": getattr(home, name) for name in names if hasattr(home, name)}
    return found


FUNCTIONS: Mapping[str, Callable[..., Any]] = _functions()
"""Name in the JSON -> function that a graph may call; `getattr` is handled apart."""
_FUNCTION_NAMES = {function: name for name, function in reversed(list(FUNCTIONS.items()))}
LAYERS: Mapping[str, type[nn.Module]] = {name: getattr(nn, name) for name in _LAYERS if hasattr(nn, name)}
"""Name in the JSON -> torch layer."""

_OWN: dict[str, type[nn.Module]] = {}
_OWN_HOMES = ("kindling.nets", "kindling.surgery")
M = TypeVar("M", bound=type[nn.Module])


def allow(cls: M) -> M:
    """Class decorator for kindling's own layers: graphs may hold them, and tracing does not look inside.

    Each constructor argument must be a JSON value, annotated, and kept as the attribute of the same name. The class
    must live in a package that `from_json` looks into: `kindling.nets` or `kindling.surgery`.

    Raises: ModelError, for a class defined elsewhere: bundles bring other people's classes back only by
        `load(..., classes=[...])`.
    """
    if not f"{cls.__module__}.".startswith(tuple(f"{home}." for home in _OWN_HOMES)):
        raise ModelError(
            f"{cls.__qualname__} is not one of kindling's own layers. Name it in load(..., classes=[...])."
        )
    _OWN[f"kindling.{cls.__name__}"] = cls
    return cls


def dtype_named(name: str) -> torch.dtype:
    """A dtype that graphs may hold, by name.

    Raises: FormatError, for any other.
    """
    if name not in _DTYPES:
        raise FormatError(f"there is no dtype {name[:40]!r} that a graph may hold.")
    dtype: torch.dtype = _DTYPES[name]
    return dtype


def is_own_layer(module: nn.Module) -> bool:
    """Whether `allow` was said of this module's class; tracers keep such a module whole."""
    return type(module) in _OWN.values()


# ------------------------------------------------------------------------------------------------------- the module


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, persistent or not; tied and shared ones under each of their names."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def tied_names(module: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same tensor object, for every tensor that has several names."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in named_tensors(module).items()
        if first.setdefault(id(tensor), name) != name
    }


def assign_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of a module's own, without copying; what is tied stays tied. Changes `module`.

    Args:
        tensors: one for each first name of the module (see `tied_names`), same shape; the dtype may differ.
    """
    made: dict[int, Tensor] = {}
    for name, old in list(named_tensors(module).items()):
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        is_parameter = leaf in holder._parameters
        if id(old) not in made:
            new = tensors[name].detach()
            # A map of a file is read-only to nobody: parameters that are trained are copied on their first write.
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        slot: dict[str, Any] = holder._parameters if is_parameter else holder._buffers
        slot[leaf] = made[id(old)]


def traced(module: nn.Module, inputs: int | None = None) -> fx.GraphModule:
    """The module as a graph; `inputs` is how many tensors its forward is given, where that is not plain.

    Raises: ModelError, when it cannot be traced.
    """
    if isinstance(module, fx.GraphModule):
        return module
    from kindling import surgery

    graph_module: fx.GraphModule | None = surgery.trace(module, inputs)
    if graph_module is None:
        raise ModelError(f"{type(module).__name__} cannot be traced into a graph: its forward depends on its data.")
    return graph_module


# -------------------------------------------------------------------------------------------------------- writing


def to_json(module: nn.Module, *, inputs: int | None = None, foreign: Foreign | None = None) -> dict[str, Any]:
    """The architecture of a module as plain JSON values; only what its graph uses is kept.

    Args:
        module: a traced module, or one that `surgery.trace` can trace.
        inputs: how many tensors `forward` is given; None means those without a default value.
        foreign: describes layers that are on no list; None refuses them.
    Returns: a dict of lists, texts, numbers. Weights are not in it, but the names, shapes and dtypes of tensors that
        belong to no layer are.
    Raises: ModelError, naming the first layer or function that is on no list.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    >>> data = to_json(net)
    >>> data["layers"][0]
    {'path': '0', 'type': 'Linear', 'args': {'in_features': 4, 'out_features': 3}}
    >>> {name: tuple(tensor.shape) for name, tensor in named_tensors(from_json(data)).items()}
    {'0.weight': (3, 4), '0.bias': (3,)}
    """
    whole = traced(module, inputs)
    if type(whole.graph._codegen) is not fx.graph.CodeGen:
        raise ModelError(
            "a graph with its own calling convention (torch.export's) cannot be stored. Trace the module itself."
        )
    data: dict[str, Any] = {"format": FORMAT, "layers": [], "shared": {}, "tensors": [], "nodes": []}
    data["notes"] = _notes(whole.meta.get(NOTES, {}))
    layers: dict[int, str] = {}
    paths: set[str] = set()
    for node in whole.graph.nodes:
        if node.op != "call_module" or node.target in paths:
            continue
        path = str(node.target)
        paths.add(path)
        layer = whole.get_submodule(path)
        if id(layer) in layers:
            data["shared"][path] = layers[id(layer)]
            continue
        layers[id(layer)] = path
        data["layers"].append(_layer_to_json(path, layer, foreign))
    for node in whole.graph.nodes:
        if node.op != "get_attr" or node.target in paths:
            continue
        path = str(node.target)
        paths.add(path)
        if not _inside(path, layers.values(), data["shared"]):
            data["tensors"].append(_tensor_to_json(path, whole))
    for node in whole.graph.nodes:
        data["nodes"].append(_node_to_json(node))
    return _closed(data, whole, foreign)


def _closed(data: dict[str, Any], whole: fx.GraphModule, foreign: Foreign | None) -> dict[str, Any]:
    """Add what is said about tensors, and check that reading gives the same tensors back."""
    stand_ins = (lambda path, _: whole.get_submodule(path)) if foreign is not None else None
    try:
        again = from_json({**data, "tied": {}, "fixed": []}, foreign=stand_ins)
    except FormatError as error:
        raise ModelError(f"{type(whole).__name__} cannot be stored as a graph: {error}") from error
    found, own = named_tensors(again), named_tensors(whole)
    for name, tensor in found.items():
        real = own.get(name)
        if real is None or real.shape != tensor.shape or real.dtype != tensor.dtype:
            seen = "nothing" if real is None else f"{real.dtype} of shape {tuple(real.shape)}"
            raise ModelError(
                f"tensor {name!r} is {seen}, but its layer's arguments make it {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}. Was the layer changed after it was made?"
            )
    for entry in data["layers"]:
        path = entry["path"]
        extra = {n for n in named_tensors(whole.get_submodule(path)) if f"{path}.{n}" not in found}
        if extra:
            kind = entry.get("type")
            raise ModelError(f"layer {path!r} ({kind}) has tensors of its own that no {kind} has: {sorted(extra)}.")
    tied = tied_names(whole)
    first = {name: tied.get(name, name) for name in found}
    kept: dict[str, str] = {}  # the first of the names that are kept
    data["tied"] = {n: kept[f] for n, f in first.items() if kept.setdefault(f, n) != n and not _same(again, n, kept[f])}
    data["fixed"] = [n for n in found if isinstance(own[n], nn.Parameter) and not own[n].requires_grad]
    return data


def _same(module: nn.Module, one: str, other: str) -> bool:
    found = named_tensors(module)
    return found[one] is found[other]


def _inside(path: str, layers: typing.Collection[str], shared: Mapping[str, str]) -> bool:
    return any(path.startswith(f"{layer}.") for layer in (*layers, *shared))


def _layer_to_json(path: str, layer: nn.Module, foreign: Foreign | None) -> dict[str, Any]:
    name = type_name(layer)
    if name is None:
        if foreign is not None:
            return {"path": path, "foreign": dict(foreign(path, layer))}
        raise ModelError(
            f"layer {path!r} is a {type(layer).__module__}.{type(layer).__qualname__}, which a graph cannot hold."
            f"{did_you_mean(type(layer).__name__, LAYERS)}"
        )
    for part_name, part in layer.named_modules():
        where = f"{path}.{part_name}" if part_name else path
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            raise ModelError(f"layer {where!r} has hooks, which are code and cannot be stored. Remove them first.")
        if "forward" in vars(part):
            raise ModelError(f"layer {where!r} had its forward replaced, which is code and cannot be stored.")
    entry: dict[str, Any] = {"path": path, "type": name, "args": layer_args(layer)}
    floats = {tensor.dtype for tensor in named_tensors(layer).values() if tensor.is_floating_point()} or {torch.float32}
    if len(floats) > 1:
        raise ModelError(
            f"layer {path!r} mixes {', '.join(sorted(map(str, floats)))}. Convert it to one dtype: layer.float()."
        )
    if (dtype := floats.pop()) != torch.float32:
        entry["dtype"] = str(dtype).removeprefix("torch.")
    return entry


def type_name(layer: nn.Module) -> str | None:
    """The layer's name in the JSON, or None for a layer that is on no list."""
    cls = type(layer)
    for table in (LAYERS, _OWN):
        for name, known in table.items():
            if cls is known:
                return name
    return None


def layer_args(layer: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a listed layer, read from its attributes; those at their default are left out.

    Raises: ModelError, when an argument cannot be told.

    >>> layer_args(nn.Conv2d(3, 8, 3, padding="same", bias=False))
    {'in_channels': 3, 'out_channels': 8, 'kernel_size': [3, 3], 'stride': [1, 1], 'padding': 'same',
     'dilation': [1, 1], 'bias': False}
    """
    cls: Any = type(layer)
    known = _parameters(cls)
    found: dict[str, Any] = {}
    for name, parameter in known.items():
        value = _jsonable(_attribute(layer, name), type(layer).__name__, name)
        if parameter.default is inspect.Parameter.empty or value != _jsonable(parameter.default, "", name):
            found[name] = value
    return found


def _attribute(layer: nn.Module, name: str) -> Any:
    if isinstance(layer, nn.TransformerEncoderLayer):
        return _encoder_layer_attribute(layer, name)
    if name == "bias" and isinstance(getattr(layer, "bias", None), Tensor | None):
        if isinstance(layer, nn.MultiheadAttention):
            return layer.in_proj_bias is not None
        # Without `affine` there is no bias to tell by, and the default means the same.
        absent = not getattr(layer, "affine", getattr(layer, "elementwise_affine", True))
        return absent or layer.bias is not None
    if isinstance(layer, nn.MultiheadAttention) and name == "add_bias_kv":
        return layer.bias_k is not None
    if isinstance(layer, nn.PairwiseDistance) and name == "p":
        return layer.norm
    if isinstance(layer, nn.PReLU) and name == "init":
        return 0.25  # only the start of its weights
    if not hasattr(layer, name):
        raise ModelError(f"a {type(layer).__name__} does not say what its argument {name!r} was.")
    return getattr(layer, name)


def _encoder_layer_attribute(layer: nn.TransformerEncoderLayer, name: str) -> Any:
    if name == "activation":
        for text, function in (("relu", functional.relu), ("gelu", functional.gelu)):
            if layer.activation is function:
                return text
        raise ModelError("a TransformerEncoderLayer with an activation other than relu or gelu cannot be stored.")
    values = {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "norm_first": layer.norm_first,
        "bias": layer.linear1.bias is not None,
    }
    return values[name]


def _jsonable(value: Any, owner: str, name: str) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(part, owner, name) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and not owner:
        return "relu"  # a function as a default stands in TransformerEncoderLayer alone
    raise ModelError(f"argument {name!r} of a {owner} is {value!r}, which JSON cannot hold.")


@cache
def _parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Constructor parameters that a file may give, by name."""
    if cls is nn.Identity:
        return {}
    if issubclass(cls, nn.RNNBase):
        # Their own constructors take *args; the base's names them. `mode` follows from the class, RNN adds one.
        known = {k: v for k, v in inspect.signature(nn.RNNBase.__init__).parameters.items() if k != "mode"}
        if cls is not nn.LSTM:
            known.pop("proj_size", None)
        if cls is nn.RNN:
            kind = inspect.Parameter.KEYWORD_ONLY
            known["nonlinearity"] = inspect.Parameter("nonlinearity", kind, default="tanh", annotation=str)
    else:
        known = dict(inspect.signature(cls.__init__).parameters)
    if cls is nn.Hardtanh:
        known = {k: v for k, v in known.items() if k not in ("min_value", "max_value")}  # deprecated twins
    if issubclass(cls, nn.EmbeddingBag | nn.Embedding):
        known = {k: v for k, v in known.items() if not k.startswith("_")}
    return {
        name: parameter
        for name, parameter in known.items()
        if name not in ("self", "device", "dtype")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    home = nn.RNNBase if issubclass(cls, nn.RNNBase) else cls
    try:
        hints = typing.get_type_hints(home.__init__)
    except (NameError, TypeError):
        hints = {}
    if cls is nn.TransformerEncoderLayer:
        hints["activation"] = str
    if cls is nn.MultiheadAttention:
        hints |= dict.fromkeys(("embed_dim", "num_heads"), int) | dict.fromkeys(("kdim", "vdim"), int | None)
        hints |= dict.fromkeys(("bias", "add_bias_kv", "add_zero_attn", "batch_first"), bool) | {"dropout": float}
    return hints


def _tensor_to_json(path: str, whole: fx.GraphModule) -> dict[str, Any]:
    owner, _, leaf = path.rpartition(".")
    try:
        holder = whole.get_submodule(owner)
        value = getattr(holder, leaf)
    except AttributeError as error:
        raise ModelError(f"the graph reads {path!r}, which the module does not have.") from error
    if not isinstance(value, Tensor):
        raise ModelError(f"the graph reads {path!r}, a {type(value).__name__}; only tensors can be stored.")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or value.layout != torch.strided:
        raise ModelError(f"tensor {path!r} is {value.dtype} ({value.layout}), which cannot be stored.")
    is_parameter = isinstance(value, nn.Parameter)
    return {"path": path, "kind": "parameter" if is_parameter else "buffer", "dtype": dtype, "shape": list(value.shape)}


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    where = f"{node.op} {node.name!r}"
    if node.op == "call_function":
        target = "getattr" if node.target is getattr else _FUNCTION_NAMES.get(_hashable(node.target))
        if target is None:
            home = getattr(node.target, "__module__", None) or ""
            name = getattr(node.target, "__name__", repr(node.target))
            raise ModelError(f"{node.name!r} calls {home}.{name}, which a graph cannot hold.")
        if target == "getattr" and (len(node.args) != 2 or node.args[1] not in ATTRIBUTES):
            raise ModelError(f"{node.name!r} reads attribute {node.args[1:]!r}, which a graph cannot hold.")
    else:
        target = str(node.target)
        if node.op == "call_method" and target not in METHODS:
            raise ModelError(f"{node.name!r} calls tensor method {target!r}, which a graph cannot hold.")
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        data["args"] = [_pack(value, where) for value in node.args]
    if node.kwargs:
        data["kwargs"] = {key: _pack(value, where) for key, value in node.kwargs.items()}
    return data


def _hashable(target: Any) -> Any:
    try:
        hash(target)
    except TypeError:
        return None
    return target


def _pack(value: Any, where: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, slice):
        return {"slice": [_pack(part, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(part, where) for part in value]}
    if isinstance(value, list):
        return [_pack(part, where) for part in value]
    if isinstance(value, Mapping):
        return {"dict": [[_pack(key, where), _pack(part, where)] for key, part in value.items()]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind, table in (("dtype", _DTYPES), ("memory_format", _MEMORY_FORMATS)):
        for name, known in table.items():
            if value is known:
                return {kind: name}
    if value == torch.device("cpu"):
        return {"device": "cpu"}
    raise ModelError(f"{where} has argument {value!r} ({type(value).__name__}), which a graph cannot hold.")


# -------------------------------------------------------------------------------------------------------- reading


def from_json(data: Any, *, foreign: FromForeign | None = None) -> fx.GraphModule:
    """Build a module from `to_json`'s output, on the meta device: shapes and dtypes, no memory.

    Nothing in `data` is trusted: names are looked up in closed lists, arguments are checked against the constructors'
    annotations, identifiers are checked before fx writes `forward` from them. Put weights in with `assign_tensors`.

    Args:
        foreign: builds the layers that `to_json` described by its own `foreign`; None refuses them.
    Raises: FormatError, for anything that `to_json` would not have written.
    """
    top = _record(data, "graph", {"format", "layers", "shared", "tensors", "nodes", "notes", "tied", "fixed"})
    if top["format"] != FORMAT:
        raise FormatError(f"the graph has format {top['format']!r}; this version of kindling reads format {FORMAT}.")
    root = nn.Module()
    layers: dict[str, nn.Module] = {}
    for entry in _list(top["layers"], "layers"):
        path, layer = _layer_from_json(entry, foreign)
        _add(root, path, layer, layers)
    for path, first in _dict(top["shared"], "shared").items():
        if not isinstance(first, str) or first not in layers:
            raise FormatError(f"shared layer {path!r} names {first!r}, which is no layer before it.")
        _add(root, path, layers[first], layers)
    tensors = {path: value for path, value in map(_tensor_from_json, _list(top["tensors"], "tensors"))}
    for path, value in tensors.items():
        _add(root, path, value, layers)
    graph = _graph_from_json(_list(top["nodes"], "nodes"), root, layers)
    try:
        graph.lint()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = fx.GraphModule(root, graph)
    except Exception as error:  # fx raises what it likes; the file is at fault
        raise FormatError(f"the graph cannot be built: {type(error).__name__}: {_first_line(error)}") from error
    if used := [path for path in (*layers, *tensors) if not _has(module, path)]:
        raise FormatError(f"{used[0]!r} is used by no node of the graph.")
    module.meta[NOTES] = _notes(top["notes"])
    _tie(module, _dict(top["tied"], "tied"))
    _fix(module, _list(top["fixed"], "fixed"))
    return module


def _record(value: Any, what: str, keys: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {_seen(value)}, not an object.")
    unknown, missing = value.keys() - keys - optional, keys - value.keys()
    if unknown or missing:
        name, say = (min(map(str, unknown)), "has unknown") if unknown else (min(missing), "lacks")
        raise FormatError(f"{what} {say} key {name[:80]!r}.")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what} is {_seen(value)}, not a list.")
    if len(value) > MAX_NODES:
        raise FormatError(f"{what} has {len(value)} entries; more than {MAX_NODES} are refused.")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FormatError(f"{what} is {_seen(value)}, not an object.")
    if len(value) > MAX_NODES:
        raise FormatError(f"{what} has {len(value)} entries; more than {MAX_NODES} are refused.")
    return value


def _seen(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | type(None)) else ""
    return f"{type(value).__name__} {text[:80]}".strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


_PART = re.compile(r"[A-Za-z0-9_]{1,200}\Z")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}\Z")
# Names that fx's generated code uses for itself.
_RESERVED = frozenset(
    {"self", "torch", "inf", "nan", "NoneType", "device", "fx_pytree", "pytree", "operator", "_operator"}
)
_MODULE_NAMES = frozenset(dir(nn.Module()))
_GRAPH_MODULE_NAMES = frozenset(dir(fx.GraphModule)) | _MODULE_NAMES


def _path(value: Any, what: str) -> list[str]:
    parts = value.split(".") if isinstance(value, str) and len(value) < 2000 else []
    if not parts or len(parts) > MAX_PARTS or not all(_PART.match(part) for part in parts):
        raise FormatError(f"{what} {_seen(value)} is no path of a layer.")
    if parts[0] in _GRAPH_MODULE_NAMES or any(part in _MODULE_NAMES for part in parts):
        raise FormatError(f"{what} {value!r} would replace a part of torch's own modules.")
    return parts


def _identifier(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.match(value) or keyword.iskeyword(value) or value in _RESERVED:
        raise FormatError(f"{what} {_seen(value)} is no name that a graph may hold.")
    if value.startswith("__") and value.endswith("__"):
        raise FormatError(f"{what} {value!r} is no name that a graph may hold.")
    return value


def _add(root: nn.Module, path: str, thing: nn.Module | Tensor, layers: dict[str, nn.Module]) -> None:
    """Hang a layer or a tensor under the root; nothing hangs below a layer, nothing is replaced."""
    *owners, leaf = _path(path, "layer" if isinstance(thing, nn.Module) else "tensor")
    holder = root
    for depth, part in enumerate(owners):
        if ".".join(owners[: depth + 1]) in layers:
            raise FormatError(f"{path!r} lies inside layer {'.'.join(owners[: depth + 1])!r}.")
        below = holder._modules.get(part)
        if below is None:
            if part in holder._parameters or part in holder._buffers:
                raise FormatError(f"{path!r} lies inside a tensor.")
            below = nn.Module()
            holder.add_module(part, below)
        holder = below
    if leaf in holder._modules or leaf in holder._parameters or leaf in holder._buffers:
        raise FormatError(f"{path!r} is there twice.")
    if isinstance(thing, nn.Module):
        holder.add_module(leaf, thing)
        layers[path] = thing
    elif isinstance(thing, nn.Parameter):
        holder.register_parameter(leaf, thing)
    else:
        holder.register_buffer(leaf, thing)


def _has(module: nn.Module, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    try:
        getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return False
    return True


def _layer_from_json(entry: Any, foreign: FromForeign | None) -> tuple[str, nn.Module]:
    if isinstance(entry, dict) and "foreign" in entry:
        record = _record(entry, "layer", {"path", "foreign"})
        _path(record["path"], "layer")
        if foreign is None:
            raise FormatError(f"layer {record['path']!r} is of a class that is not on kindling's list.")
        return record["path"], foreign(record["path"], record["foreign"])
    record = _record(entry, "layer", {"path", "type", "args"}, frozenset({"dtype"}))
    path = ".".join(_path(record["path"], "layer"))
    layer = build_layer(record["type"], record["args"], f"layer {path!r}")
    if "dtype" in record:
        dtype = _DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
        if dtype is None or not dtype.is_floating_point:
            raise FormatError(f"layer {path!r} has dtype {_seen(record['dtype'])}, no floating-point dtype.")
        layer = layer.to(dtype)
    return path, layer


def _class(name: Any, where: str) -> type[nn.Module]:
    cls = LAYERS.get(name) if isinstance(name, str) else None
    if cls is None and isinstance(name, str) and name.startswith("kindling."):
        for home in _OWN_HOMES:
            importlib.import_module(home)
        cls = _OWN.get(name)
    if cls is None:
        near = did_you_mean(name, LAYERS) if isinstance(name, str) and len(name) < 80 else ""
        raise FormatError(f"{where} is of type {_seen(name)}, which is not on kindling's list.{near}")
    return cls


def build_layer(name: Any, args: Any, where: str = "layer") -> nn.Module:
    """A listed layer from its JSON, on the meta device.

    Raises: FormatError, for types that are not listed and arguments that do not fit.
    """
    cls: Any = _class(name, where)
    known, hints = _parameters(cls), _hints(cls)
    values: dict[str, Any] = {}
    for key, value in _dict(args, f"args of {where}").items():
        if key not in known:
            raise FormatError(f"{where} ({name}) has no argument {key[:80]!r}.{did_you_mean(key[:80], known)}")
        values[key] = _argument(value, f"argument {key!r} of {where} ({name})")
        if not fits(values[key], hints.get(key, Any)):
            raise FormatError(f"argument {key!r} of {where} ({name}) is {_seen(value)}, which does not fit.")
    if values.get("num_layers", 0) > _LOOP_LIMIT:
        raise FormatError(
            f"argument 'num_layers' of {where} ({name}) is {values['num_layers']}: more than {_LOOP_LIMIT}."
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer: nn.Module = cls(**values)
            return layer
    except Exception as error:  # torch's constructors raise what they like; the file is at fault
        raise FormatError(f"{where} ({name}) cannot be made: {type(error).__name__}: {_first_line(error)}") from error


def _argument(value: Any, what: str, depth: int = 0) -> Any:
    if isinstance(value, list) and depth < _ARGUMENT_DEPTH and len(value) <= _LOOP_LIMIT:
        return tuple(_argument(part, what, depth + 1) for part in value)
    if isinstance(value, dict) and value.keys() == {"float"} and value["float"] in _FLOATS:
        return _FLOATS[value["float"]]
    if isinstance(value, str) and len(value) > 200:
        raise FormatError(f"{what} is a text of {len(value)} characters.")
    if isinstance(value, int) and abs(value) > _INT_LIMIT:
        raise FormatError(f"{what} is a whole number beyond 2**53.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"{what} is {_seen(value)}, which no layer takes.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a type annotation; annotations that say nothing about plain values accept it."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (tuple, list) or hint in (tuple, list, torch.Size):
        if not isinstance(value, tuple):
            return False
        parts = typing.get_args(hint)
        if not parts:
            return True
        if origin is list or parts[-1] is Ellipsis:
            return all(fits(part, parts[0]) for part in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return hint is Any or not isinstance(hint, type)


def _tensor_from_json(entry: Any) -> tuple[str, Tensor]:
    record = _record(entry, "tensor", {"path", "kind", "dtype", "shape"})
    path = ".".join(_path(record["path"], "tensor"))
    dtype = _DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"tensor {path!r} has dtype {_seen(record['dtype'])}, which is not on kindling's list.")
    shape = _list(record["shape"], f"shape of tensor {path!r}")
    if len(shape) > 64 or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _INT_LIMIT for n in shape
    ):
        raise FormatError(f"tensor {path!r} has no shape of sizes.")
    try:
        value = torch.empty(shape, dtype=dtype, device="meta")
    except (RuntimeError, OverflowError) as error:
        raise FormatError(f"tensor {path!r} cannot be made: {_first_line(error)}") from error
    if record["kind"] == "parameter":
        return path, nn.Parameter(value, requires_grad=dtype.is_floating_point or dtype.is_complex)
    if record["kind"] != "buffer":
        raise FormatError(f"tensor {path!r} is of kind {_seen(record['kind'])}: neither 'parameter' nor 'buffer'.")
    return path, value


def _graph_from_json(entries: list[Any], root: nn.Module, layers: Mapping[str, nn.Module]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    inputs: set[str] = set()
    for entry in entries:
        record = _record(entry, "node", {"name", "op", "target"}, frozenset({"args", "kwargs"}))
        name = _identifier(record["name"], "node")
        where = f"node {name!r}"
        if name in nodes or (nodes and next(reversed(nodes.values())).op == "output"):
            raise FormatError(f"{where} comes twice or after the output.")
        op, target = record["op"], _target(record["op"], record["target"], where, root, layers)
        args = tuple(_unpack(value, nodes, where) for value in _list(record.get("args", []), f"args of {where}"))
        kwargs = {
            _identifier(key, f"keyword of {where}"): _unpack(value, nodes, where)
            for key, value in _dict(record.get("kwargs", {}), f"kwargs of {where}").items()
        }
        if op == "placeholder":
            if target in inputs or kwargs or len(args) > 1 or any(_holds_node(value) for value in args):
                raise FormatError(f"{where} is no input that a graph may have.")
            inputs.add(target)
        if op == "output" and (len(args) != 1 or kwargs):
            raise FormatError(f"{where} is no output that a graph may have.")
        if op == "get_attr" and (args or kwargs):
            raise FormatError(f"{where} reads a tensor and takes no arguments.")
        if target is getattr and (
            len(args) != 2 or kwargs or not isinstance(args[0], fx.Node) or not _is_attribute(args[1])
        ):
            raise FormatError(
                f"{where} reads {_seen(args[1] if len(args) > 1 else None)}, which is not on kindling's list."
            )
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise FormatError(f"{where} has a name that Python or fx keeps for itself.")
        nodes[name] = node
    if not nodes or next(reversed(nodes.values())).op != "output" or not inputs:
        raise FormatError("the graph has no input or no output.")
    # An input whose Python name differs from its node's must not hide another node.
    if hidden := [n.name for n in nodes.values() if n.op == "placeholder" and n.name != n.target and n.target in nodes]:
        raise FormatError(f"node {hidden[0]!r} has the name of another node.")
    return graph


def _is_attribute(value: Any) -> bool:
    return isinstance(value, str) and value in ATTRIBUTES


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []

    def keep(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, keep)
    return bool(found)


def _target(op: Any, target: Any, where: str, root: nn.Module, layers: Mapping[str, nn.Module]) -> Any:
    if not isinstance(target, str):
        raise FormatError(f"{where} has target {_seen(target)}, not a name.")
    if op == "placeholder":
        if target in dir(builtins) and target not in _INPUT_BUILTINS:
            raise FormatError(f"{where} is an input called {target!r}, which Python keeps for itself.")
        return _identifier(target, f"input of {where}")
    if op == "output" and target == "output":
        return target
    if op == "call_module" and target in layers:
        return target
    if op == "get_attr":
        _path(target, f"target of {where}")
        owner, _, leaf = target.rpartition(".")
        try:
            holder = root.get_submodule(owner)
        except AttributeError:
            holder = root
        if (leaf in holder._parameters or leaf in holder._buffers) and _has(root, target):
            return target
    if op == "call_function":
        found = getattr if target == "getattr" else FUNCTIONS.get(target)
        if found is not None:
            return found
    if op == "call_method" and target in METHODS:
        return target
    if op not in ("placeholder", "output", "call_module", "get_attr", "call_function", "call_method"):
        raise FormatError(f"{where} has operation {_seen(op)}, which is not on kindling's list.")
    raise FormatError(f"{where} has target {target[:80]!r}, which is not on kindling's list or not in the graph.")


_INPUT_BUILTINS = frozenset(
    {"input", "id", "hash", "filter", "format", "iter", "map", "max", "min", "range", "sum", "type"}
)


def _unpack(value: Any, nodes: Mapping[str, fx.Node], where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} has arguments nested deeper than {MAX_DEPTH}.")
    if isinstance(value, list):
        return [_unpack(part, nodes, where, depth + 1) for part in value]
    if not isinstance(value, dict):
        return _scalar(value, where)
    if len(value) != 1:
        raise FormatError(f"{where} has an argument of {len(value)} keys; each has one, its kind.")
    ((kind, body),) = value.items()
    if kind == "node" and isinstance(body, str) and body in nodes:
        return nodes[body]
    if kind in ("tuple", "slice") and isinstance(body, list):
        parts = tuple(_unpack(part, nodes, where, depth + 1) for part in body)
        if kind == "tuple":
            return parts
        if len(parts) == 3:
            return slice(*parts)
    if kind == "dict" and isinstance(body, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        keys = [_scalar(pair[0], where) for pair in body]
        return {key: _unpack(pair[1], nodes, where, depth + 1) for key, pair in zip(keys, body, strict=True)}
    for name, table in (("dtype", _DTYPES), ("memory_format", _MEMORY_FORMATS), ("float", _FLOATS)):
        if kind == name and isinstance(body, str) and body in table:
            return table[body]
    if kind == "ellipsis" and body is True:
        return Ellipsis
    if kind == "device" and body == "cpu":
        return torch.device("cpu")
    raise FormatError(
        f"{where} has argument {kind[:40]!r}: {_seen(body)}, which is not on kindling's list or not before it."
    )


def _scalar(value: Any, where: str) -> Any:
    if isinstance(value, str) and len(value) > 2000:
        raise FormatError(f"{where} has a text of {len(value)} characters as argument.")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise FormatError(f"{where} has a whole number beyond 64 bits as argument.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FormatError(f"{where} has argument {_seen(value)}, which is not on kindling's list.")


def _notes(value: Any) -> dict[str, dict[str, str]]:
    """Names of names: two levels of objects with texts at the end."""
    notes = {kind: dict(_dict(names, "notes")) for kind, names in _dict(value, "notes").items()}
    for names in notes.values():
        for key, name in names.items():
            if not isinstance(name, str) or max(len(key), len(name)) > 2000:
                raise FormatError(f"notes hold {_seen(name)} for {key[:80]!r}, not a name.")
    return notes


def _tie(module: nn.Module, tied: Mapping[str, Any]) -> None:
    found = named_tensors(module)
    for name, first in tied.items():
        one, other = found.get(name), found.get(first) if isinstance(first, str) else None
        if one is None or other is None or first in tied:
            raise FormatError(f"tensor {name[:80]!r} is tied to {_seen(first)}; one of them is not there.")
        if one.shape != other.shape or one.dtype != other.dtype or type(one) is not type(other):
            raise FormatError(f"tensors {name!r} and {first!r} are tied, but differ in shape, dtype or kind.")
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        slot: dict[str, Any] = holder._parameters if leaf in holder._parameters else holder._buffers
        slot[leaf] = other


def _fix(module: nn.Module, fixed: list[Any]) -> None:
    found = named_tensors(module)
    for name in fixed:
        parameter = found.get(name) if isinstance(name, str) else None
        if not isinstance(parameter, nn.Parameter):
            raise FormatError(f"{_seen(name)} is no parameter of the graph.")
        parameter.requires_grad_(False)
