"""What Caffe's messages may hold: names, numbers and types of their fields, for the text and the binary reader alike.

The facts are those of Caffe's `caffe.proto` (BVLC, 2-clause BSD), with the two fields in which NVIDIA's Caffe keeps
half-precision weights. `Message` is what both readers make; upgrades of old spellings are in `upgrade.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kindling.errors import FormatError

# name=number:type[*][=default]; "*" for repeated fields. Fields below zero are those of Intel's Caffe, in text only.
_MESSAGES = """
BlobShape: dim=1:int*
BlobProto: shape=7:BlobShape data=5:float* diff=6:float* double_data=8:double* double_diff=9:double* num=1:int=0
    channels=2:int=0 height=3:int=0 width=4:int=0 raw_data_type=10:int raw_data=12:bytes
BlobProtoVector: blobs=1:BlobProto*
FillerParameter: type=1:str=constant value=2:float=0 min=3:float=0 max=4:float=1 mean=5:float=0 std=6:float=1
    sparse=7:int=-1 variance_norm=8:FillerParameter.VarianceNorm=FAN_IN
NetParameter: name=1:str input=3:str* input_shape=8:BlobShape* input_dim=4:int* force_backward=5:bool=false
    state=6:NetState debug_info=7:bool=false layer=100:LayerParameter* layers=2:V1LayerParameter*
    engine=-1:Engine
SolverParameter: net=24:str net_param=25:NetParameter train_net=1:str test_net=2:str*
    train_net_param=21:NetParameter test_net_param=22:NetParameter* train_state=26:NetState
    test_state=27:NetState* test_iter=3:int* test_interval=4:int=0 test_compute_loss=19:bool=false
    test_initialization=32:bool=true base_lr=5:float display=6:int average_loss=33:int=1 max_iter=7:int
    iter_size=36:int=1 lr_policy=8:str gamma=9:float power=10:float momentum=11:float weight_decay=12:float
    regularization_type=29:str=L2 stepsize=13:int stepvalue=34:int* clip_gradients=35:float=-1 snapshot=14:int=0
    snapshot_prefix=15:str snapshot_diff=16:bool=false
    snapshot_format=37:SolverParameter.SnapshotFormat=BINARYPROTO solver_mode=17:SolverParameter.SolverMode=GPU
    device_id=18:int=0 random_seed=20:int=-1 type=40:str=SGD delta=31:float=1e-8 momentum2=39:float=0.999
    rms_decay=38:float=0.99 debug_info=23:bool=false snapshot_after_train=28:bool=true
    solver_type=30:SolverParameter.SolverType=SGD layer_wise_reduce=41:bool=true weights=42:str*
    warmup_iter=-1:int=0 warmup_start_lr=-2:float=0
NetState: phase=1:Phase=TEST level=2:int=0 stage=3:str*
NetStateRule: phase=1:Phase min_level=2:int max_level=3:int stage=4:str* not_stage=5:str*
ParamSpec: name=1:str share_mode=2:ParamSpec.DimCheckMode lr_mult=3:float=1.0 decay_mult=4:float=1.0
LayerParameter: name=1:str type=2:str bottom=3:str* top=4:str* phase=10:Phase loss_weight=5:float*
    param=6:ParamSpec* blobs=7:BlobProto* propagate_down=11:bool* include=8:NetStateRule*
    exclude=9:NetStateRule* transform_param=100:TransformationParameter loss_param=101:LossParameter
    accuracy_param=102:AccuracyParameter argmax_param=103:ArgMaxParameter
    batch_norm_param=139:BatchNormParameter bias_param=141:BiasParameter clip_param=148:ClipParameter
    concat_param=104:ConcatParameter contrastive_loss_param=105:ContrastiveLossParameter
    convolution_param=106:ConvolutionParameter crop_param=144:CropParameter data_param=107:DataParameter
    dropout_param=108:DropoutParameter dummy_data_param=109:DummyDataParameter
    eltwise_param=110:EltwiseParameter elu_param=140:ELUParameter embed_param=137:EmbedParameter
    exp_param=111:ExpParameter flatten_param=135:FlattenParameter hdf5_data_param=112:HDF5DataParameter
    hdf5_output_param=113:HDF5OutputParameter hinge_loss_param=114:HingeLossParameter
    image_data_param=115:ImageDataParameter infogain_loss_param=116:InfogainLossParameter
    inner_product_param=117:InnerProductParameter input_param=143:InputParameter log_param=134:LogParameter
    lrn_param=118:LRNParameter memory_data_param=119:MemoryDataParameter mvn_param=120:MVNParameter
    parameter_param=145:ParameterParameter pooling_param=121:PoolingParameter power_param=122:PowerParameter
    prelu_param=131:PReLUParameter python_param=130:PythonParameter recurrent_param=146:RecurrentParameter
    reduction_param=136:ReductionParameter relu_param=123:ReLUParameter reshape_param=133:ReshapeParameter
    scale_param=142:ScaleParameter sigmoid_param=124:SigmoidParameter softmax_param=125:SoftmaxParameter
    spp_param=132:SPPParameter slice_param=126:SliceParameter swish_param=147:SwishParameter
    tanh_param=127:TanHParameter threshold_param=128:ThresholdParameter tile_param=138:TileParameter
    window_data_param=129:WindowDataParameter
TransformationParameter: scale=1:float=1 mirror=2:bool=false crop_size=3:uint=0 mean_file=4:str
    mean_value=5:float* force_color=6:bool=false force_gray=7:bool=false
LossParameter: ignore_label=1:int normalization=3:LossParameter.NormalizationMode=VALID normalize=2:bool
AccuracyParameter: top_k=1:uint=1 axis=2:int=1 ignore_label=3:int
ArgMaxParameter: out_max_val=1:bool=false top_k=2:uint=1 axis=3:int
ClipParameter: min=1:float max=2:float
ConcatParameter: axis=2:int=1 concat_dim=1:uint=1
BatchNormParameter: use_global_stats=1:bool moving_average_fraction=2:float=.999 eps=3:float=1e-5
BiasParameter: axis=1:int=1 num_axes=2:int=1 filler=3:FillerParameter
ContrastiveLossParameter: margin=1:float=1.0 legacy_version=2:bool=false
ConvolutionParameter: num_output=1:uint bias_term=2:bool=true pad=3:uint* kernel_size=4:uint* stride=6:uint*
    dilation=18:uint* pad_h=9:uint=0 pad_w=10:uint=0 kernel_h=11:uint kernel_w=12:uint stride_h=13:uint
    stride_w=14:uint group=5:uint=1 weight_filler=7:FillerParameter bias_filler=8:FillerParameter
    engine=15:Engine=DEFAULT axis=16:int=1 force_nd_im2col=17:bool=false
CropParameter: axis=1:int=2 offset=2:uint*
DataParameter: shuffle=-1:bool=false
    source=1:str batch_size=4:uint rand_skip=7:uint=0 backend=8:DataParameter.DB=LEVELDB
    scale=2:float=1 mean_file=3:str crop_size=5:uint=0 mirror=6:bool=false force_encoded_color=9:bool=false
    prefetch=10:uint=4
DropoutParameter: dropout_ratio=1:float=0.5
DummyDataParameter: data_filler=1:FillerParameter* shape=6:BlobShape* num=2:uint* channels=3:uint*
    height=4:uint* width=5:uint*
EltwiseParameter: operation=1:EltwiseParameter.EltwiseOp=SUM coeff=2:float* stable_prod_grad=3:bool=true
ELUParameter: alpha=1:float=1
EmbedParameter: num_output=1:uint input_dim=2:uint bias_term=3:bool=true weight_filler=4:FillerParameter
    bias_filler=5:FillerParameter
ExpParameter: base=1:float=-1.0 scale=2:float=1.0 shift=3:float=0.0
FlattenParameter: axis=1:int=1 end_axis=2:int=-1
HDF5DataParameter: source=1:str batch_size=2:uint shuffle=3:bool=false
HDF5OutputParameter: file_name=1:str
HingeLossParameter: norm=1:HingeLossParameter.Norm=L1
ImageDataParameter: source=1:str batch_size=4:uint=1 rand_skip=7:uint=0 shuffle=8:bool=false new_height=9:uint=0
    new_width=10:uint=0 is_color=11:bool=true scale=2:float=1 mean_file=3:str crop_size=5:uint=0
    mirror=6:bool=false root_folder=12:str=
InfogainLossParameter: source=1:str axis=2:int=1
InnerProductParameter: num_output=1:uint bias_term=2:bool=true weight_filler=3:FillerParameter
    bias_filler=4:FillerParameter axis=5:int=1 transpose=6:bool=false
InputParameter: shape=1:BlobShape*
LogParameter: base=1:float=-1.0 scale=2:float=1.0 shift=3:float=0.0
LRNParameter: local_size=1:uint=5 alpha=2:float=1. beta=3:float=0.75
    norm_region=4:LRNParameter.NormRegion=ACROSS_CHANNELS k=5:float=1. engine=6:Engine=DEFAULT
MemoryDataParameter: batch_size=1:uint channels=2:uint height=3:uint width=4:uint
MVNParameter: normalize_variance=1:bool=true across_channels=2:bool=false eps=3:float=1e-9
ParameterParameter: shape=1:BlobShape
PoolingParameter: pool=1:PoolingParameter.PoolMethod=MAX pad=4:uint=0 pad_h=9:uint=0 pad_w=10:uint=0
    kernel_size=2:uint kernel_h=5:uint kernel_w=6:uint stride=3:uint=1 stride_h=7:uint stride_w=8:uint
    engine=11:Engine=DEFAULT global_pooling=12:bool=false
    round_mode=13:PoolingParameter.RoundMode=CEIL
PowerParameter: power=1:float=1.0 scale=2:float=1.0 shift=3:float=0.0
PythonParameter: module=1:str layer=2:str param_str=3:str= share_in_parallel=4:bool=false
RecurrentParameter: num_output=1:uint=0 weight_filler=2:FillerParameter bias_filler=3:FillerParameter
    debug_info=4:bool=false expose_hidden=5:bool=false
ReductionParameter: operation=1:ReductionParameter.ReductionOp=SUM axis=2:int=0 coeff=3:float=1.0
ReLUParameter: negative_slope=1:float=0 engine=2:Engine=DEFAULT
ReshapeParameter: shape=1:BlobShape axis=2:int=0 num_axes=3:int=-1
ScaleParameter: axis=1:int=1 num_axes=2:int=1 filler=3:FillerParameter bias_term=4:bool=false
    bias_filler=5:FillerParameter
SigmoidParameter: engine=1:Engine=DEFAULT
SliceParameter: axis=3:int=1 slice_point=2:uint* slice_dim=1:uint=1
SoftmaxParameter: engine=1:Engine=DEFAULT axis=2:int=1
SwishParameter: beta=1:float=1
TanHParameter: engine=1:Engine=DEFAULT
TileParameter: axis=1:int=1 tiles=2:int
ThresholdParameter: threshold=1:float=0
WindowDataParameter: source=1:str scale=2:float=1 mean_file=3:str batch_size=4:uint crop_size=5:uint=0
    mirror=6:bool=false fg_threshold=7:float=0.5 bg_threshold=8:float=0.5 fg_fraction=9:float=0.25
    context_pad=10:uint=0 crop_mode=11:str=warp cache_images=12:bool=false root_folder=13:str=
SPPParameter: pyramid_height=1:uint pool=2:SPPParameter.PoolMethod=MAX engine=6:Engine=DEFAULT
V1LayerParameter: bottom=2:str* top=3:str* name=4:str include=32:NetStateRule* exclude=33:NetStateRule*
    type=5:V1LayerParameter.LayerType blobs=6:BlobProto* param=1001:str*
    blob_share_mode=1002:V1LayerParameter.DimCheckMode* blobs_lr=7:float* weight_decay=8:float*
    loss_weight=35:float* accuracy_param=27:AccuracyParameter argmax_param=23:ArgMaxParameter
    concat_param=9:ConcatParameter contrastive_loss_param=40:ContrastiveLossParameter
    convolution_param=10:ConvolutionParameter data_param=11:DataParameter dropout_param=12:DropoutParameter
    dummy_data_param=26:DummyDataParameter eltwise_param=24:EltwiseParameter exp_param=41:ExpParameter
    hdf5_data_param=13:HDF5DataParameter hdf5_output_param=14:HDF5OutputParameter
    hinge_loss_param=29:HingeLossParameter image_data_param=15:ImageDataParameter
    infogain_loss_param=16:InfogainLossParameter inner_product_param=17:InnerProductParameter
    lrn_param=18:LRNParameter memory_data_param=22:MemoryDataParameter mvn_param=34:MVNParameter
    pooling_param=19:PoolingParameter power_param=21:PowerParameter relu_param=30:ReLUParameter
    sigmoid_param=38:SigmoidParameter softmax_param=39:SoftmaxParameter slice_param=31:SliceParameter
    tanh_param=37:TanHParameter threshold_param=25:ThresholdParameter window_data_param=20:WindowDataParameter
    transform_param=36:TransformationParameter loss_param=42:LossParameter layer=1:V0LayerParameter
V0LayerParameter: name=1:str type=2:str num_output=3:uint biasterm=4:bool=true weight_filler=5:FillerParameter
    bias_filler=6:FillerParameter pad=7:uint=0 kernelsize=8:uint group=9:uint=1 stride=10:uint=1
    pool=11:V0LayerParameter.PoolMethod=MAX dropout_ratio=12:float=0.5 local_size=13:uint=5 alpha=14:float=1.
    beta=15:float=0.75 k=22:float=1. source=16:str scale=17:float=1 meanfile=18:str batchsize=19:uint
    cropsize=20:uint=0 mirror=21:bool=false blobs=50:BlobProto* blobs_lr=51:float* weight_decay=52:float*
    rand_skip=53:uint=0 det_fg_threshold=54:float=0.5 det_bg_threshold=55:float=0.5
    det_fg_fraction=56:float=0.25 det_context_pad=58:uint=0 det_crop_mode=59:str=warp new_num=60:int=0
    new_channels=61:int=0 new_height=62:int=0 new_width=63:int=0 shuffle_images=64:bool=false
    concat_dim=65:uint=1 hdf5_output_param=1001:HDF5OutputParameter
PReLUParameter: filler=1:FillerParameter channel_shared=2:bool=false
"""
_ENUMS = """
FillerParameter.VarianceNorm: FAN_IN=0 FAN_OUT=1 AVERAGE=2
SolverParameter.SnapshotFormat: HDF5=0 BINARYPROTO=1
SolverParameter.SolverMode: CPU=0 GPU=1
SolverParameter.SolverType: SGD=0 NESTEROV=1 ADAGRAD=2 RMSPROP=3 ADADELTA=4 ADAM=5
Phase: TRAIN=0 TEST=1
ParamSpec.DimCheckMode: STRICT=0 PERMISSIVE=1
LossParameter.NormalizationMode: FULL=0 VALID=1 BATCH_SIZE=2 NONE=3
DataParameter.DB: LEVELDB=0 LMDB=1
EltwiseParameter.EltwiseOp: PROD=0 SUM=1 MAX=2
HingeLossParameter.Norm: L1=1 L2=2
LRNParameter.NormRegion: ACROSS_CHANNELS=0 WITHIN_CHANNEL=1
PoolingParameter.PoolMethod: MAX=0 AVE=1 STOCHASTIC=2
PoolingParameter.RoundMode: CEIL=0 FLOOR=1
ReductionParameter.ReductionOp: SUM=1 ASUM=2 SUMSQ=3 MEAN=4
SPPParameter.PoolMethod: MAX=0 AVE=1 STOCHASTIC=2
V1LayerParameter.LayerType: NONE=0 ABSVAL=35 ACCURACY=1 ARGMAX=30 BNLL=2 CONCAT=3 CONTRASTIVE_LOSS=37 CONVOLUTION=4
    DATA=5 DECONVOLUTION=39 DROPOUT=6 DUMMY_DATA=32 EUCLIDEAN_LOSS=7 ELTWISE=25 EXP=38 FLATTEN=8 HDF5_DATA=9
    HDF5_OUTPUT=10 HINGE_LOSS=28 IM2COL=11 IMAGE_DATA=12 INFOGAIN_LOSS=13 INNER_PRODUCT=14 LRN=15 MEMORY_DATA=29
    MULTINOMIAL_LOGISTIC_LOSS=16 MVN=34 POOLING=17 POWER=26 RELU=18 SIGMOID=19 SIGMOID_CROSS_ENTROPY_LOSS=27
    SILENCE=36 SOFTMAX=20 SOFTMAX_LOSS=21 SPLIT=22 SLICE=33 TANH=23 WINDOW_DATA=24 THRESHOLD=31
V1LayerParameter.DimCheckMode: STRICT=0 PERMISSIVE=1
V0LayerParameter.PoolMethod: MAX=0 AVE=1 STOCHASTIC=2
"""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message."""

    name: str
    number: int
    type: str
    """`int`, `uint`, `float`, `double`, `bool`, `str`, `bytes`, `Engine`, or the name of an enum or a message."""
    repeated: bool
    default: Any


@cache
def enums() -> dict[str, dict[str, int]]:
    """Enum -> name -> number."""
    found: dict[str, dict[str, int]] = {}
    for name, words in _entries(_ENUMS):
        found[name] = {word.partition("=")[0]: int(word.partition("=")[2]) for word in words}
    return found


@cache
def messages() -> dict[str, dict[str, Field]]:
    """Message -> field name -> field."""
    found: dict[str, dict[str, Field]] = {}
    for name, words in _entries(_MESSAGES):
        found[name] = {}
        for word in words:
            key, _, rest = word.partition("=")
            number, _, kind = rest.partition(":")
            kind, _, default = kind.partition("=")
            repeated = kind.endswith("*")
            kind = kind.removesuffix("*")
            found[name][key] = Field(key, int(number), kind, repeated, _default(kind, default))
    return found


@cache
def by_number(message: str) -> dict[int, Field]:
    """Field number -> field."""
    return {entry.number: entry for entry in messages()[message].values()}


def _entries(table: str) -> Iterator[tuple[str, list[str]]]:
    lines = table.strip().replace("\n    ", " ").splitlines()
    for line in lines:
        name, _, rest = line.partition(": ")
        yield name, rest.split()


def _default(kind: str, text: str) -> Any:
    if kind == "bool":
        return text == "true"
    if kind in ("int", "uint"):
        return int(text or 0)
    if kind in ("float", "double"):
        return float(text or 0)
    if kind == "bytes":
        return b""
    return text if kind in ("str", "Engine") or text else None


@dataclass(slots=True)
class Message:
    """Values by field name, in the order they came, with the lines they stood on.

    >>> rule = Message("NetStateRule", 3)
    >>> rule.add("stage", "deploy", 4)
    >>> rule.all("stage"), rule.get("min_level"), rule.has("phase"), rule.line_of("stage")
    (['deploy'], 0, False, 4)
    """

    type: str
    line: int = 0
    """Where it begins in the text; 0 in binary files."""
    values: dict[str, list[Any]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Any, line: int = 0) -> None:
        """Append a value."""
        self.values.setdefault(name, []).append(value)
        self.lines.setdefault(name, line)

    def put(self, name: str, *values: Any) -> None:
        """Put values in place of those a field has."""
        self.values[name] = list(values)

    def has(self, name: str) -> bool:
        """Whether the field was given."""
        return bool(self.values.get(name))

    def get(self, name: str) -> Any:
        """The value of a field given once (protobuf: the last one counts), or its default; messages are made empty."""
        given = self.values.get(name)
        if given:
            return given[-1]
        known = messages().get(self.type, {}).get(name)
        if known is not None and known.type in messages():
            return Message(known.type, self.line)
        return known.default if known is not None else None

    def all(self, name: str) -> list[Any]:
        """Every value of a repeated field."""
        return self.values.get(name, [])

    def copy(self) -> Message:
        """The same message, whose parts may be changed."""
        return Message(
            self.type,
            self.line,
            {
                name: [value.copy() if isinstance(value, Message) else value for value in values]
                for name, values in self.values.items()
            },
            dict(self.lines),
        )

    def line_of(self, name: str) -> int:
        """The line of a field, or of the message."""
        return self.lines.get(name, 0) or self.line


def where(line: int) -> str:
    """`" (line 12)"`, or nothing for binary files."""
    return f" (line {line})" if line else ""


def merge(into: Message, other: Message) -> None:
    """Protobuf's rule for a message field given twice: the second is laid over the first."""
    if into.type != other.type:
        raise FormatError(f"{into.type} and {other.type} cannot be merged.")
    for name, values in other.values.items():
        known = messages().get(into.type, {}).get(name)
        old = into.values.get(name)
        if known is not None and known.repeated and old:
            old.extend(values)
        elif known is not None and known.type in messages() and old:
            for value in values:
                merge(old[-1], value)
        else:
            into.values[name] = list(values)
        into.lines.setdefault(name, other.lines.get(name, 0))
