"""A net's layers to one torch graph, with everything that belongs around it: inputs, losses, metrics, preparation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from kindling.errors import FormatError, KindlingError, did_you_mean
from kindling.formats.caffe import losses
from kindling.formats.caffe.data import PARAMETERS, Prepared, Source, prepare, read_mean, sources_of
from kindling.formats.caffe.emit import MAX_NODES, MAX_ROW, Emitter
from kindling.formats.caffe.layers import LAYERS, CustomLayer, Site, custom, registered
from kindling.formats.caffe.schema import Message, where
from kindling.formats.caffe.select import State, select
from kindling.formats.caffe.upgrade import Spec
from kindling.formats.caffe.weights import Report, put_weights, stored_blobs
from kindling.formats.caffe.wire import Blob
from kindling.formats.models import Imported, Training
from kindling.nets.layers_caffe import CaffeMeanImage
from kindling.prepare import Preparation
from kindling.signature import Signature, TensorSpec

LOSSES = (
    "SoftmaxWithLoss", "SigmoidCrossEntropyLoss", "EuclideanLoss", "HingeLoss", "ContrastiveLoss",
    "MultinomialLogisticLoss", "InfogainLoss",
)  # fmt: skip
MAX_PARAMETERS = 2**29
MAX_GAINS = 2**24
_Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the caller says beside the files."""

    phase: str = "TEST"
    level: int = 0
    stages: tuple[str, ...] = ()
    input_shape: _Shape | Mapping[str, _Shape] | None = None
    mean: Any = None
    scale: float | None = None
    image: Mapping[str, Any] | None = None
    layers: Mapping[str, CustomLayer] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    partial: bool = False
    seed: int | None = None
    max_parameters: int = MAX_PARAMETERS


@dataclass(slots=True)
class _Objective:
    """A loss or metric layer."""

    layer: Message
    module: nn.Module
    blobs: tuple[fx.Node | str, ...]
    """Nodes of the net, or names of targets."""
    weight: float


def build(
    spec: Spec,
    stored: list[Message],
    weights_name: str,
    wishes: Wishes,
    folder: Path,
    source: Mapping[str, Any],
) -> Imported:
    """The whole model.

    Args:
        spec: the net, with the layers of every phase.
        stored: layers with blobs, by name; the net's own if empty.
        weights_name: what to call the file they came from.
        wishes: see `kindling.formats.caffe.read`.
        folder: where mean files may lie.
        source: where it all came from.
    Raises: FormatError.
    """
    return _Builder(spec, stored, weights_name, wishes, folder).imported(source)


class _Builder:
    def __init__(self, spec: Spec, stored: list[Message], weights_name: str, wishes: Wishes, folder: Path) -> None:
        self.spec, self.wishes, self.folder, self.weights_name = spec, wishes, folder, weights_name
        state = State(phase=wishes.phase, level=wishes.level, stages=wishes.stages)
        if wishes.phase not in ("TRAIN", "TEST"):
            raise FormatError(f"there is no phase {wishes.phase!r}. Use 'TRAIN' or 'TEST'.")
        self.layers = select(spec.layers, state)
        self.known = {**LAYERS}
        self.custom = {**registered(), **wishes.layers}
        self.blobs = stored_blobs(stored or spec.layers, weights_name)
        self.to = Emitter(spec.what)
        self.nodes: dict[str, fx.Node] = {}
        """Blob name -> the node that holds it now."""
        self.unread: dict[str, fx.Node] = {}
        self.targets: dict[str, Source] = {}
        self.losses: list[_Objective] = []
        self.metrics: list[_Objective] = []
        self.prepared: dict[str, Prepared] = {}
        self.inputs: dict[str, str] = {}
        """Input blob -> name of its placeholder."""
        self.batch = 1

    # Who reads what

    def _is_data(self, layer: Message) -> bool:
        return layer.get("type") in PARAMETERS and layer.get("type") not in self.custom

    def _role(self, layer: Message) -> str:
        kind = layer.get("type")
        if kind in self.custom:
            return "layer"
        if kind in LOSSES:
            return "loss"
        if kind == "Accuracy":
            return "metric"
        if kind in ("Silence", "HDF5Output"):
            return "sink"
        return "data" if kind in PARAMETERS else "layer"

    def _readers(self) -> tuple[dict[int, dict[str, list[int]]], dict[str, list[tuple[int, int]]]]:
        """Layer number -> top -> numbers of the layers that read it; input -> (layer, place) of its readers."""
        readers: dict[int, dict[str, list[int]]] = {}
        of_inputs: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in self.spec.inputs}
        writer: dict[str, int] = {}
        for number, layer in enumerate(self.layers):
            for place, bottom in enumerate(layer.all("bottom")):
                if bottom in writer:
                    readers[writer[bottom]].setdefault(bottom, []).append(number)
                elif bottom in of_inputs:
                    of_inputs[bottom].append((number, place))
            readers[number] = {}
            for top in layer.all("top"):
                if self._is_data(layer):
                    of_inputs.setdefault(top, [])
                    writer.pop(top, None)
                else:
                    writer[top] = number
        return readers, of_inputs

    # The walk

    def run(self) -> None:
        """Every layer, in order."""
        if len(self.layers) > MAX_NODES:  # before the first is built
            raise FormatError(f"{self.spec.what} has more than {MAX_NODES:,} layers.")
        readers, of_inputs = self._readers()
        self.of_inputs = of_inputs
        for name, shape in self.spec.inputs:
            self._input(Source(name=name, layer=None, shape=shape))
        kept = {id(layer) for layer in self.layers}
        others = {
            layer.get("name"): layer
            for layer in self.spec.layers
            if layer.get("type") == "BatchNorm" and id(layer) not in kept
        }
        for number, layer in enumerate(self.layers):
            try:
                self._one(layer, readers[number], others)
            except KindlingError:
                raise
            except Exception as error:  # torch says in many ways that sizes do not fit
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
                shapes = [self.to.shape(self.nodes[name]) for name in layer.all("bottom") if name in self.nodes]
                raise self.to.error(layer, f"cannot take {str(shapes)[1:-1][:200] or 'this'}: {first}") from error

    def _one(self, layer: Message, readers: Mapping[str, list[int]], others: Mapping[str, Message]) -> None:
        role = self._role(layer)
        if role == "data":
            for source in sources_of(layer):
                self._input(source)
            return
        for bottom in layer.all("bottom"):
            if bottom not in self.nodes and bottom not in self.targets:
                raise self.to.error(layer, f"reads the blob {bottom[:80]!r}, which {self._nobody(bottom)}")
        if role == "loss":
            self._loss(layer)
        elif role == "metric":
            self._metric(layer)
        elif role == "sink":
            for bottom in layer.all("bottom"):
                self.unread.pop(bottom, None)
        else:
            self._layer(layer, readers, others)

    def _nobody(self, blob: str) -> str:
        """Why there is no blob of that name."""
        kept = {id(layer) for layer in self.layers}
        for layer in self.spec.layers:
            if blob in layer.all("top") and id(layer) not in kept:
                return (
                    f"layer {layer.get('name')!r}{where(layer.line)} writes in another phase or stage than "
                    f"{self.wishes.phase} {list(self.wishes.stages)}; give phase= or stages="
                )
        return f"no layer before it writes.{did_you_mean(blob[:80], self.nodes)}".rstrip(".?")

    def _layer(self, layer: Message, readers: Mapping[str, list[int]], others: Mapping[str, Message]) -> None:
        kind = str(layer.get("type"))
        for bottom in layer.all("bottom"):
            if bottom not in self.nodes:
                self._promote(bottom)
        bottoms = tuple(self.nodes[bottom] for bottom in layer.all("bottom"))
        make = self.custom.get(kind)
        if make is None and kind not in self.known:
            near = get_close_matches(kind, [*self.known, *self.custom, *LOSSES, *PARAMETERS], n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise FormatError(
                f"{self.to.error(layer, 'is not known to kindling')}{meant} Give layers={{{kind!r}: function}}, where "
                "function(site) makes the torch module of one layer."
            )
        tops = layer.all("top")
        follower = None
        if len(tops) == 1 and len(readers.get(tops[0], ())) == 1:
            follower = self.layers[readers[tops[0]][0]]
        site = Site(
            to=self.to,
            layer=layer,
            bottoms=bottoms,
            phase=self.wishes.phase,
            other=others.get(layer.get("name")),
            follower=follower,
            shares=follower is not None and any(spec.get("name") for spec in follower.all("param")),
            batch=self.batch,
        )
        site.need(bool(bottoms) or kind in self.custom or kind == "Parameter", "has no bottom")
        with torch.device("meta"):
            made = custom(site, make) if make is not None else self.known[kind](site)
        site.need(len(made) == len(tops), f"has {len(tops)} tops where it gives {len(made)}")
        for bottom in layer.all("bottom"):
            self.unread.pop(bottom, None)
        for top, node in zip(tops, made, strict=True):
            self.nodes[top] = node
            self.unread[top] = node
            self.targets.pop(top, None)
        weights = layer.all("loss_weight")
        for place, top in enumerate(tops[: len(weights)]):
            if weights[place]:
                self.losses.append(_Objective(layer, losses.SumLoss(), (self.nodes[top],), weights[place]))

    # Inputs

    def _input(self, source: Source) -> None:
        readers = [(self._role(self.layers[number]), place) for number, place in self.of_inputs.get(source.name, [])]
        labels = all(role == "sink" or (role in ("loss", "metric") and place > 0) for role, place in readers)
        if labels and (source.is_label or readers):
            self.targets[source.name] = source
            return
        self._place(source)

    def _promote(self, name: str) -> None:
        """A label that a layer of the net reads is an input after all."""
        self._place(self.targets.pop(name))

    def _place(self, source: Source) -> None:
        mean, missing = self._mean(source)
        shape = self._shape(source, mean)
        if not source.is_label:
            self.batch = shape[0] if shape else 1
        row = shape[1:]
        if source.name not in self.inputs:
            node = self.to.input(source.name, shape)
            self.inputs[source.name] = node.name
        else:
            raise FormatError(f"{self.spec.what}: two inputs are called {source.name!r}.")
        prepared = prepare(source, row, mean, missing, self.wishes.image, self.wishes.scale)
        self.prepared[source.name] = replace(prepared, step=replace(prepared.step, name=node.name))  # type: ignore[type-var]
        self.nodes[source.name] = node
        if prepared.mean is not None:
            with torch.device("meta"):
                layer = CaffeMeanImage(row, prepared.scale)
            self.nodes[source.name] = self.to.module(f"{source.name}_mean", layer, node, alias=False)

    def _mean(self, source: Source) -> tuple[Any, str | None]:
        """What to take off an input, and the name of a mean file that is not at hand."""
        mean = self.wishes.mean
        transform = source.transform
        if source.is_label:
            return None, None
        if mean is not None:
            if isinstance(mean, str | Path):
                return read_mean(mean), None
            array = np.asarray(mean, np.float32)
            if array.ndim not in (0, 1, 3) or not np.isfinite(array).all():
                raise FormatError(f"mean of shape {array.shape} is no picture (C, H, W) and no colour (C,).")
            return array, None
        named = transform.get("mean_file")
        values = transform.all("mean_value")
        if named and values:
            raise FormatError(
                f"{self.spec.what}: input {source.name!r}{where(transform.line)} has a mean file and mean values."
            )
        if named:
            # Only from beside the net: what else the file names is not ours to open.
            beside = self.folder / Path(named.replace("\\", "/")).name
            return (read_mean(beside), None) if beside.is_file() else (None, named)
        return (np.asarray(values, np.float64), None) if values else (None, None)

    def _shape(self, source: Source, mean: Any) -> tuple[int, ...]:
        wished = self.wishes.input_shape
        if isinstance(wished, Mapping):
            wished = wished.get(source.name)
        elif source.is_label:
            wished = None
        batch = source.shape[0] if source.shape else self._batch_size(source) or self.batch
        if wished is not None:
            shape: tuple[int, ...] = (batch, *(int(size) for size in wished))
        elif source.shape is not None:
            shape = tuple(source.shape)
        else:
            shape = (batch, *self._guess(source, mean))
        if not 1 <= len(shape) <= 32 or any(not 0 < size < 2**31 for size in shape) or math.prod(shape[1:]) > MAX_ROW:
            raise FormatError(f"{self.spec.what}: input {source.name!r} has the shape {str(shape)[:120]}.")
        return shape

    def _batch_size(self, source: Source) -> int:
        if source.layer is None:
            return 0
        settings = source.layer.get(PARAMETERS[source.type])
        return int(settings.get("batch_size") or 0)

    def _guess(self, source: Source, mean: Any) -> tuple[int, ...]:
        """The shape of a row of a data layer that only its database knows, as far as the files tell."""
        array = np.asarray(mean) if mean is not None else None
        crop = source.transform.get("crop_size")
        size = (crop, crop) if crop else None
        channels = 0
        if array is not None and array.ndim == 3:
            channels, size = int(array.shape[0]), size or (int(array.shape[1]), int(array.shape[2]))
        weights = self._first_weights(source.name)
        if source.type == "HDF5Data" and weights is not None and weights[0] == "InnerProduct":
            return (weights[1],)
        if source.type == "ImageData" and source.layer is not None:
            settings = source.layer.get("image_data_param")
            if settings.get("new_height") and settings.get("new_width"):
                size = size or (settings.get("new_height"), settings.get("new_width"))
            channels = channels or (3 if settings.get("is_color") else 1)
        if weights is not None and weights[0] == "Convolution":
            channels = weights[1]
        if not channels and source.is_picture:
            many = len(source.transform.all("mean_value"))
            channels = 1 if source.transform.get("force_gray") else many if many > 1 else 3
        if size is None or not channels:
            layer = source.layer
            name = f"layer {layer.get('name')!r} of type {source.type!r}{where(layer.line)}" if layer else "the net"
            raise FormatError(
                f"{self.spec.what}: {name} does not say how large {source.name!r} is, only its database does. "
                f"Give input_shape=(channels, height, width), or input_shape={{{source.name!r}: (...)}}."
            )
        return (channels, *size)

    def _first_weights(self, name: str) -> tuple[str, int] | None:
        """(type, inputs) of the first layer with stored weights that reads an input."""
        for number, _ in self.of_inputs.get(name, []):
            layer = self.layers[number]
            kind, blobs = layer.get("type"), self.blobs.get(str(layer.get("name")), [])
            if kind in ("Convolution", "InnerProduct") and blobs and len(blobs[0].shape) > 1:
                shape = blobs[0].shape
                if kind == "Convolution":
                    return kind, shape[1] * int(layer.get("convolution_param").get("group"))
                return kind, shape[-1]
        return None

    # Losses and metrics

    def _loss(self, layer: Message) -> None:
        kind, bottoms, tops = layer.get("type"), tuple(layer.all("bottom")), layer.all("top")
        least = 3 if kind == "ContrastiveLoss" else 2
        if not least <= len(bottoms) <= 3:
            raise self.to.error(layer, f"has {len(bottoms)} bottoms where it takes {least}")
        weights = layer.all("loss_weight")
        weight = float(weights[0]) if weights else 1.0
        if len(tops) > 1 and kind == "SoftmaxWithLoss":
            with torch.device("meta"):
                axis = layer.get("softmax_param").get("axis")
                node = self.to.module(str(layer.get("name")), nn.Softmax(axis), self.nodes[bottoms[0]])
            self.nodes[tops[1]] = self.unread[tops[1]] = node
        if weight:
            self.losses.append(_Objective(layer, self._loss_module(layer), self._blobs(bottoms), weight))

    def _blobs(self, names: tuple[str, ...]) -> tuple[fx.Node | str, ...]:
        return tuple(name if name in self.targets else self.nodes[name] for name in names)

    def _loss_module(self, layer: Message) -> nn.Module:
        kind, settings = layer.get("type"), layer.get("loss_param")
        ignore = settings.get("ignore_label") if settings.has("ignore_label") else None
        mode = settings.get("normalization") if settings.has("normalization") else None
        if mode is None and settings.has("normalize"):
            mode = "VALID" if settings.get("normalize") else "BATCH_SIZE"
        if kind == "SoftmaxWithLoss":
            return losses.SoftmaxLoss(layer.get("softmax_param").get("axis"), mode or "VALID", ignore)
        if kind == "SigmoidCrossEntropyLoss":
            return losses.SigmoidLoss(mode or "BATCH_SIZE", ignore)
        if kind == "EuclideanLoss":
            return losses.EuclideanLoss()
        if kind == "HingeLoss":
            return losses.HingeLoss(layer.get("hinge_loss_param").get("norm") or "L1")
        if kind == "ContrastiveLoss":
            contrastive = layer.get("contrastive_loss_param")
            return losses.ContrastiveLoss(contrastive.get("margin"), contrastive.get("legacy_version"))
        if kind == "MultinomialLogisticLoss":
            return losses.LogisticLoss()
        gains = layer.get("infogain_loss_param")
        matrix = torch.zeros(0)
        if len(layer.all("bottom")) < 3:
            beside = self.folder / Path(str(gains.get("source")).replace("\\", "/")).name
            if not gains.get("source") or not beside.is_file():
                raise self.to.error(layer, f"needs its gains beside the net, in a file named {gains.get('source')!r}")
            from kindling.formats.caffe.data import decode_blob
            from kindling.formats.caffe.wire import open_view

            blob: Blob = decode_blob(open_view(beside), str(beside))
            if blob.count > MAX_GAINS:
                raise self.to.error(layer, f"has {blob.count:,} gains")
            matrix = torch.from_numpy(blob.array()).reshape(-1)
        return losses.InfogainLoss(matrix, gains.get("axis"), mode or "VALID", ignore)

    def _metric(self, layer: Message) -> None:
        bottoms = tuple(layer.all("bottom"))
        if len(bottoms) != 2:
            raise self.to.error(layer, f"has {len(bottoms)} bottoms, not two")
        settings = layer.get("accuracy_param")
        ignore = settings.get("ignore_label") if settings.has("ignore_label") else None
        module = losses.Accuracy(settings.get("top_k"), settings.get("axis"), ignore)
        self.metrics.append(_Objective(layer, module, self._blobs(bottoms), 1.0))

    # The result

    def imported(self, source: Mapping[str, Any]) -> Imported:
        """Walk, put numbers in, and wrap."""
        from kindling.surgery.net import NOTES, merge_activations

        self.run()
        if not self.to.values:
            raise FormatError(f"{self.spec.what} has no layers and no inputs in phase {self.wishes.phase}.")
        ends = {*self.unread.values()}
        ends |= {blob for part in (*self.losses, *self.metrics) for blob in part.blobs if isinstance(blob, fx.Node)}
        nodes = [node for node in self.to.graph.nodes if node in ends and node.op != "placeholder"]
        nodes = nodes or [self.nodes[name] for name in self.inputs]
        self._check_batches()
        generator = None if self.wishes.seed is None else torch.Generator().manual_seed(self.wishes.seed)
        report = put_weights(
            self.to,
            self.blobs,
            self.weights_name,
            partial=self.wishes.partial,
            limit=self.wishes.max_parameters,
            generator=generator,
        )
        for name, prepared in self.prepared.items():
            if prepared.mean is not None:
                layer = self.to.root.get_submodule(str(self.nodes_of_mean(name)))
                assert isinstance(layer, CaffeMeanImage)
                layer.mean = torch.from_numpy(prepared.mean)
        self.to.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        module = fx.GraphModule(self.to.root, self.to.graph, "Caffe")
        module.meta[NOTES] = {
            "aliases": self.to.aliases,
            "merged": merge_activations(module, module.graph),
        }
        signature = Signature(
            inputs={node: TensorSpec(("N", *self.prepared[blob].row)) for blob, node in self.inputs.items()},
            outputs={node.name: self._spec(node) for node in nodes},
        )
        steps = tuple(self.prepared[blob].step for blob in self.inputs)
        labels = None if self.wishes.labels is None else tuple(str(label) for label in self.wishes.labels)
        return Imported(
            module=module.eval(),
            signature=signature,
            preparation=Preparation(steps),
            labels=labels,
            name=self.spec.name or "caffe",
            source={**source, **self._said(report)},
            training=self._training(report, tuple(node.name for node in nodes)),
        )

    def _check_batches(self) -> None:
        """Once more with twice the rows: Caffe's shapes hold for the batch that the file declares, ours for any.

        Raises: FormatError, naming the layer that only takes the batch of the file.
        """
        values: dict[fx.Node, Any] = {}
        for node in self.to.graph.nodes:
            args = fx.node.map_arg(node.args, values.__getitem__)
            if node.op == "placeholder":
                shape = self.to.shape(node)
                with torch.device("meta"):
                    values[node] = torch.empty((2 * shape[0], *shape[1:]) if shape else ())
                continue
            call: Any = self.to.root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            try:
                with torch.no_grad():
                    values[node] = call(*args)
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
                raise FormatError(
                    f"{self.spec.what}: layer {node.name!r} takes only the batches of {self.batch} that the file "
                    f"declares, and kindling's are of any size: {first}. Does a reshape before it name the batch?"
                ) from error

    def nodes_of_mean(self, name: str) -> str:
        """Path of the layer that takes an input's mean picture off."""
        placeholder = self.inputs[name]
        for node in self.to.graph.nodes:
            if node.op == "call_module" and any(part.name == placeholder for part in node.all_input_nodes):
                if isinstance(self.to.root.get_submodule(str(node.target)), CaffeMeanImage):
                    return str(node.target)
        raise AssertionError(name)

    def _spec(self, node: fx.Node) -> TensorSpec:
        value = self.to.values[node]
        dtype = str(value.dtype).removeprefix("torch.")
        return TensorSpec(("N", *value.shape[1:]) if value.ndim else (), dtype)

    def _said(self, report: Report) -> dict[str, Any]:
        said: dict[str, Any] = {"phase": self.wishes.phase}
        notes = {name: prepared.note for name, prepared in self.prepared.items() if prepared.note}
        if notes:
            said["preparation"] = notes
        if report.fresh and report.loaded:
            said["without_weights"] = list(report.fresh)
        elif report.fresh:
            said["weights"] = "none: they begin as the file's fillers say"
        return said

    def _training(self, report: Report, outputs: tuple[str, ...]) -> Training | None:
        if not (self.losses or self.metrics):
            return Training(multipliers=report.multipliers) if report.multipliers else None
        read = {blob for part in (*self.losses, *self.metrics) for blob in part.blobs if isinstance(blob, str)}
        targets = tuple(name for name in self.targets if name in read)

        def objective(parts: list[_Objective]) -> losses.Objective:
            terms = [
                (part.weight, part.module, tuple(b if isinstance(b, str) else b.name for b in part.blobs))
                for part in parts
            ]
            return losses.Objective(terms, outputs, targets)

        return Training(
            loss=objective(self.losses) if self.losses else None,
            metrics={str(part.layer.get("name")): objective([part]) for part in self.metrics},
            multipliers=report.multipliers,
            batch_size=self.batch,
            augment={each.step.name: each.augment for each in self.prepared.values() if each.augment},
        )
