"""Every layer that is read, against Keras itself on the same weights and the same random rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kindling.formats.keras import read
from kindling.formats.models import Imported
from kindling.graph import from_json, to_json

Make = Callable[[Any], Any]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def chain(k: Any, row: tuple[int, ...], *layers: Any) -> Any:
    return k.Sequential([k.Input(row), *layers])


def pictures(k: Any) -> Any:
    """Convolutions with every padding, stride and group."""
    L, x = k.layers, k.Input((9, 12, 3))
    outs = [
        L.Conv2D(4, 3, padding="same", strides=2, activation="relu")(x),
        L.Conv2D(4, (2, 3), padding="same")(x),
        L.Conv2D(6, 3, groups=3, dilation_rate=2, use_bias=False)(x),
        L.Conv2D(4, 4, padding="same", dilation_rate=2)(x),
        L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", strides=2, activation="tanh")(x),
        L.SeparableConv2D(5, 3, padding="same", depth_multiplier=2)(x),
        L.SeparableConv2D(5, (3, 2), strides=2)(x),
        L.Conv2DTranspose(4, 3, strides=2, padding="same")(x),
        L.Conv2DTranspose(4, 3, strides=2)(x),
        L.Conv2DTranspose(4, 4, strides=2, padding="same")(x),
        L.Conv2DTranspose(4, 2, strides=3)(x),
    ]
    return k.Model(x, [L.Flatten()(out) for out in outs])


def pools(k: Any) -> Any:
    L, x = k.layers, k.Input((9, 12, 3))
    outs = [
        L.MaxPooling2D(2)(x),
        L.MaxPooling2D(3, strides=2, padding="same")(x),
        L.MaxPooling2D(3, strides=1, padding="same")(x),
        L.AveragePooling2D((2, 3), strides=2)(x),
        L.AveragePooling2D(3, strides=(2, 1), padding="same")(x),  # the same on both sides: else Keras on torch errs
        L.AveragePooling2D(3, strides=1, padding="same")(x),
        L.ZeroPadding2D(((1, 2), (0, 3)))(x),
        L.Cropping2D(((1, 2), (0, 3)))(x),
        L.UpSampling2D((2, 3))(x),
        L.UpSampling2D(2, interpolation="bilinear")(x),
        L.GlobalAveragePooling2D()(x),
        L.GlobalMaxPooling2D(keepdims=True)(x),
        L.Permute((3, 1, 2))(x),
        L.Reshape((4, -1, 9))(x),
        L.Dense(4)(x),
        L.Softmax()(x),
        L.Softmax(axis=1)(x),
        L.SpatialDropout2D(0.5)(x),
    ]
    return k.Model(x, outs)


def norms(k: Any) -> Any:
    L, x = k.layers, k.Input((5, 4, 6))
    data = np.random.default_rng(0).normal(2, 3, (50, 5, 4, 6))
    normal = L.Normalization()
    normal.adapt(data)
    inverse = L.Normalization(mean=[1.0] * 6, variance=[4.0] * 6, invert=True)
    outs = [
        L.BatchNormalization()(x),
        L.BatchNormalization(scale=False, epsilon=1e-2)(x),
        L.BatchNormalization(center=False, scale=False)(x),
        L.BatchNormalization(axis=1)(x),
        L.LayerNormalization()(x),
        L.LayerNormalization(axis=[2, 3], center=False)(x),
        L.GroupNormalization(3)(x),
        L.UnitNormalization()(x),
        L.Rescaling(0.5, offset=-1)(x),
        L.PReLU()(x),
        L.PReLU(shared_axes=[1, 2])(x),
        normal(x),
        inverse(x),
    ]
    return k.Model(x, outs)


def activations(k: Any) -> Any:
    L, x = k.layers, k.Input((11,))
    names = (
        "relu relu6 leaky_relu elu selu celu softplus softsign sigmoid tanh silu gelu hard_sigmoid hard_silu hard_tanh "
        "hard_shrink soft_shrink tanh_shrink log_sigmoid log_softmax softmax exponential linear mish sparse_plus "
        "sparse_sigmoid squareplus"
    )
    outs = [L.Activation(name)(x) for name in names.split()]
    outs += [
        L.ReLU(max_value=1.5, negative_slope=0.2, threshold=0.3)(x),
        L.ReLU(negative_slope=0.2)(x),
        L.LeakyReLU(0.05)(x),
        L.LeakyReLU()(x),
        L.ELU(0.7)(x),
        L.Dense(3, activation="hard_sigmoid")(x),
        L.GaussianNoise(1.0)(x),
        L.GaussianDropout(0.5)(x),
        L.AlphaDropout(0.5)(x),
        L.Dropout(0.5)(x),
        L.ActivityRegularization(0.1)(x),
    ]
    return k.Model(x, outs)


def merges(k: Any) -> Any:
    L, x, y, v = k.layers, k.Input((4, 6)), k.Input((4, 6)), k.Input((6,))
    a, b = L.Conv1D(6, 1)(x), L.Conv1D(6, 1)(y)
    outs = [
        L.Add()([a, b, x]),
        L.Subtract()([a, b]),
        L.Multiply()([a, y]),
        L.Average()([a, b, x]),
        L.Maximum()([a, b]),
        L.Minimum()([a, b]),
        L.Concatenate()([a, x]),
        L.Concatenate(axis=1)([a, b]),
        L.Dot(axes=2)([x, y]),
        L.Dot(axes=(1, 1))([x, y]),
        L.Dot(axes=(2, 1), normalize=True)([x, v]),
        L.Dot(axes=1)([v, v * 2.0]),
        L.RepeatVector(3)(v),
        (a + b) * 0.5 - 1.0,
        1.0 - a / 2.0,
    ]
    return k.Model([x, y, v], outs)


def sequences(k: Any) -> Any:
    L, x = k.layers, k.Input((7, 5))
    state = L.Dense(4)(L.GlobalMaxPooling1D()(x))
    encoded = L.LSTM(4, return_state=True)(x)
    outs = [
        L.LSTM(4)(x),
        L.LSTM(4, return_sequences=True, go_backwards=True)(x),
        L.LSTM(4, activation="relu", recurrent_activation="hard_sigmoid", use_bias=False)(x),
        L.LSTM(4, return_sequences=True)(x, initial_state=encoded[1:]),
        *encoded,
        L.GRU(4, return_sequences=True)(x),
        L.GRU(4, reset_after=False)(x),
        L.GRU(4)(x, initial_state=state),
        L.SimpleRNN(4)(x),
        L.SimpleRNN(4, activation="relu")(x),
        L.Bidirectional(L.LSTM(3, return_sequences=True))(x),
        L.Bidirectional(L.GRU(3), merge_mode="sum")(x),
        L.Bidirectional(L.SimpleRNN(3), merge_mode="ave")(x),
        L.Bidirectional(L.LSTM(3), merge_mode="mul", backward_layer=L.LSTM(3, go_backwards=True))(x),
        L.TimeDistributed(L.Dense(3, activation="relu"))(x),
        L.Conv1D(4, 3, padding="causal", dilation_rate=2)(x),
        L.Conv1D(4, 3, strides=2, padding="same")(x),
        L.Conv1DTranspose(4, 3, strides=2, padding="same")(x),
        L.SeparableConv1D(4, 3)(x),
        L.MaxPooling1D(2, padding="same")(x),
        L.AveragePooling1D(3, strides=2, padding="same")(x),
        L.ZeroPadding1D((1, 2))(x),
        L.Cropping1D((1, 2))(x),
        L.UpSampling1D(2)(x),
        L.GlobalAveragePooling1D()(x),
        L.MultiHeadAttention(2, 3)(x, x),
        L.MultiHeadAttention(2, 3, value_dim=4, output_shape=6, use_bias=False)(x, L.Conv1D(8, 2)(x)),
        L.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True),
    ]
    return k.Model(x, outs)


def masks(k: Any) -> Any:
    L, x, words = k.layers, k.Input((7, 2)), k.Input((7,), dtype="int32")
    seen = L.Masking(0.0)(x)
    embedded = L.Embedding(4, 3, mask_zero=True)(words)
    outs = [
        L.LSTM(4)(seen),
        L.LSTM(4, return_sequences=True)(L.Dropout(0.5)(seen)),
        L.GRU(3)(L.LSTM(4, return_sequences=True)(seen)),
        L.GRU(4)(embedded),
        L.SimpleRNN(4, return_sequences=True)(embedded),
        L.Bidirectional(L.LSTM(3, return_sequences=True))(embedded),
        L.GlobalAveragePooling1D()(embedded),
        L.Dense(3)(L.GRU(4, go_backwards=True)(embedded)),
    ]
    return k.Model([x, words], outs)


def volumes(k: Any) -> Any:
    L, x = k.layers, k.Input((5, 6, 4, 2))
    outs = [
        L.Conv3D(3, 2, strides=2, padding="same")(x),
        L.MaxPooling3D(2, padding="same")(x),
        L.AveragePooling3D(2)(x),
        L.GlobalAveragePooling3D()(x),
        L.ZeroPadding3D(1)(x),
        L.Cropping3D(1)(x),
        L.UpSampling3D(2)(x),
        L.BatchNormalization()(x),
        L.TimeDistributed(L.Conv2D(3, 3, padding="same"))(x),
        L.TimeDistributed(L.Flatten())(x),
    ]
    return k.Model(x, outs)


def nested(k: Any) -> Any:
    """Models in models, one of them and one layer called twice."""
    L = k.layers
    inner_in = k.Input((8, 8, 3))
    h = L.BatchNormalization(name="norm")(L.Conv2D(4, 3, padding="same", name="conv")(inner_in))
    inner = k.Model(inner_in, [h, L.GlobalMaxPooling2D()(h)], name="trunk")
    head = k.Sequential([k.Input((4,)), L.Dense(5), L.BatchNormalization(), L.Dense(4, activation="tanh")], name="head")
    steps = k.Sequential([k.Input((4,)), L.Dense(5, activation="relu"), L.BatchNormalization()], name="steps")
    x, y = k.Input((8, 8, 3), name="left"), k.Input((8, 8, 3), name="right")
    shared = L.Dense(4, name="shared dense 1")
    (a, p), (b, q) = inner(x), inner(y)
    total = head(shared(p)) + head(shared(q))
    return k.Model(
        [x, y], [L.Concatenate()([a, b]), total, L.TimeDistributed(steps)(L.Reshape((16, 4))(L.MaxPooling2D(2)(a)))]
    )


def first(k: Any) -> Any:
    """Channels in front, as Theano had them and torch has them."""
    L, x = k.layers, k.Input((3, 8, 6))
    h = L.Conv2D(4, 3, strides=2, padding="same", data_format="channels_first")(x)
    h = L.MaxPooling2D(2, data_format="channels_first")(L.BatchNormalization(axis=1)(h))
    return k.Model(
        x, [L.GlobalAveragePooling2D(data_format="channels_first")(h), L.Flatten(data_format="channels_first")(h)]
    )


ZOO: dict[str, Make] = {
    make.__name__: make
    for make in (activations, first, masks, merges, nested, norms, pictures, pools, sequences, volumes)
}


def shaken(model: Any, seed: int = 0) -> Any:
    """Weights that no initialiser makes: batch statistics and biases included."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.dtype.startswith("float"):
            value = rng.normal(0, 0.5, variable.shape)
            variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return model


def rows(made: Imported, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for spec in made.signature.inputs.values():
        shape = (count, *(int(size) for size in spec.shape[1:]))
        if spec.dtype == "int64":
            found.append(torch.randint(0, 4, shape, generator=generator))
            continue
        x = torch.randn(shape, generator=generator)
        if x.dim() == 3:
            x[1, 3:] = 0  # steps that a mask may take out
        found.append(x)
    return found


def agree(model: Any, made: Imported) -> None:
    """Both give the same, and the graph can be stored."""
    given = rows(made)
    moved = [x.permute(0, 2, 3, 1) if x.dim() == 4 and x.shape[1] == 3 and not _first(model) else x for x in given]
    expected = model.predict([x.numpy() for x in moved] if len(moved) > 1 else moved[0].numpy(), verbose=0)
    with torch.inference_mode():
        found = made.module(*given)
        again = from_json(to_json(made.module))
    assert sum(1 for _ in again.graph.nodes) == sum(1 for _ in made.module.graph.nodes)  # type: ignore[union-attr]
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, list) else [expected]
    assert len(found) == len(expected)
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert tuple(ours.shape) == theirs.shape, place
        assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * max(np.abs(theirs).max(), 1e-3), place


def _first(model: Any) -> bool:
    return "channels_first" in model.to_json()


@pytest.mark.parametrize("name", ZOO)
def test_a_zoo_of_layers_equals_keras(keras: Any, name: str, tmp_path: Path) -> None:
    model = shaken(ZOO[name](keras))
    model.save(tmp_path / "net.keras")
    agree(model, read(tmp_path / "net.keras", keep_activation=True))
    model.save(tmp_path / "net.h5")
    agree(model, read(tmp_path / "net.h5", keep_activation=True))
