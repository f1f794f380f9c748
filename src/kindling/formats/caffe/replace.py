"""SparkNet's `replaceDataLayers`: a net that takes its rows from the caller in place of databases."""

from __future__ import annotations

from pathlib import Path

from kindling.errors import FormatError
from kindling.formats.caffe.data import PARAMETERS
from kindling.formats.caffe.schema import Message
from kindling.formats.caffe.upgrade import upgrade


def replace_data_layers(
    net: Message | str | Path, train_batch: int, test_batch: int, channels: int, height: int, width: int
) -> Message:
    """The net with a MemoryData layer for each phase in place of its data layers.

    The blobs keep their names, and what the old layer of a phase did to its pictures (`transform_param`) stays.

    Args:
        net: a NetParameter message, or the path of a `.prototxt`; it is left as it is.
        train_batch, test_batch: rows in a batch, by phase.
        channels, height, width: of one picture.
    Raises: FormatError, when the net has no data layer, or the sizes are no sizes.

    >>> from kindling.formats.caffe.prototxt import parse
    >>> old = parse('layer { name: "d" type: "Data" top: "data" top: "label" } layer { name: "r" type: "ReLU" }')
    >>> new = replace_data_layers(old, 64, 100, 1, 28, 28)
    >>> [layer.get("type") for layer in new.all("layer")], new.all("layer")[0].get("memory_data_param").get("height")
    (['MemoryData', 'MemoryData', 'ReLU'], 28)
    """
    from kindling.formats.caffe import read_message

    sizes = (train_batch, test_batch, channels, height, width)
    if any(not isinstance(size, int) or not 0 < size < 2**31 for size in sizes):
        raise FormatError(f"batches and sizes {sizes} are not all positive whole numbers.")
    message = net.copy() if isinstance(net, Message) else read_message(net)
    spec = upgrade(message)
    data = [layer for layer in spec.layers if layer.get("type") in PARAMETERS]
    if not data and not spec.inputs:
        raise FormatError("the net has no data layer to replace.")
    tops = data[0].all("top") if data else [name for name, _ in spec.inputs]
    made = Message("NetParameter")
    made.put("name", spec.name)
    for phase, batch in (("TRAIN", train_batch), ("TEST", test_batch)):
        layer = Message("LayerParameter")
        layer.put("name", data[0].get("name") if data else "data")
        layer.put("type", "MemoryData")
        layer.put("top", *(list(tops[:2]) if len(tops) > 1 else [*tops, "label"]))
        rule = Message("NetStateRule")
        rule.put("phase", phase)
        layer.put("include", rule)
        settings = Message("MemoryDataParameter")
        for name, size in zip(
            ("batch_size", "channels", "height", "width"), (batch, channels, height, width), strict=True
        ):
            settings.put(name, size)
        layer.put("memory_data_param", settings)
        for old in data:
            phases = {each.get("phase") for each in old.all("include") if each.has("phase")}
            if old.has("transform_param") and (not phases or phase in phases):
                layer.put("transform_param", old.get("transform_param"))
                break
        made.add("layer", layer)
    replaced = {id(old) for old in data}
    for layer in spec.layers:
        if id(layer) not in replaced:
            made.add("layer", layer)
    return made
