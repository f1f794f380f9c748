"""Both ends of a net whose system keeps channels last: the steps that make its rows, and its outputs with their labels.

Keras's and TensorFlow's readers use it. None of their formats states how pixels were scaled: without `scale` or `image`
the net takes ready arrays, and the model's source says what to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kindling.errors import ConfigError
from kindling.formats.assemble import Wire, valid_name
from kindling.formats.channels import Flow, Mover
from kindling.formats.files import file_digest
from kindling.formats.models import Imported
from kindling.prepare import ArrayStep, ImageStep, LabelStep, Preparation, Step


def open_input(
    mover: Mover,
    wanted: str,
    row: Sequence[int],
    *,
    whole: bool,
    channels_last: bool,
    scale: float | None,
    image: Mapping[str, Any] | None,
    stated: Mapping[str, Any] | None = None,
) -> tuple[Flow, Step]:
    """An input of the net, and the step that makes its rows.

    Args:
        row: shape of one row, as the other system has it; pictures of 1 or 3 channels are taken channels first.
        whole: whether it holds whole numbers.
        stated: fields of the ImageStep that the file states; without them, `scale` or `image` ask for one.
    Raises: ConfigError, for pictures that are none, and fields that an ImageStep does not have.
    """
    sizes = tuple(row)
    moved = len(sizes) == 3 and channels_last and sizes[-1] in (1, 3) and not whole
    shown = (sizes[-1], *sizes[:-1]) if moved else sizes
    name = valid_name(wanted)
    dtype = "int64" if whole else "float32"
    flow = Flow(mover.net.input(name, shown, dtype), moved)
    if scale is None and image is None and stated is None:
        return flow, ArrayStep(name, name, shown, dtype)
    if whole or len(shown) != 3 or shown[0] not in (1, 3):
        field, value = ("scale", scale) if image is None else ("image", dict(image))
        raise ConfigError(
            field, value, f"has no place: {wanted!r} takes no pictures but rows of {sizes}", "Leave it out"
        )
    fields: dict[str, Any] = {"size": shown[1:], "channels": "RGB" if shown[0] == 3 else "L", **(stated or {})}
    if shown[0] == 1:
        fields["raw_shape"] = shown[1:]
    if scale is not None:
        fields["scale"] = float(scale)
    try:
        return flow, ImageStep(name, **{**fields, **(image or {})})
    except TypeError as error:
        raise ConfigError("image", dict(image or {}), f"names no field of an ImageStep ({error})", "See it") from error


def imported(
    path: Path,
    mover: Mover,
    outputs: Mapping[str, Flow],
    steps: Sequence[Step],
    *,
    labels: Sequence[str] | None,
    keep_activation: bool,
    binary: bool,
    system: str,
    about: Mapping[str, Any],
    digest: Path | None = None,
) -> Imported:
    """The finished model.

    Args:
        outputs: by the names they had.
        keep_activation: keep a last softmax; else it is left to prediction, and `labels` name the classes.
        binary: whether the sigmoid of one unit is a score of two classes.
        digest: the file whose sha256 is kept, where that is not `path`.
    """
    flows = list(outputs.values())
    about = dict(about)
    names: tuple[str, ...] | None = None
    if len(flows) == 1 and flows[0].scores is not None and not keep_activation:
        single = flows[0].row == (1,)
        if not single or binary or labels is not None:
            count = 2 if single else flows[0].row[0]
            names = tuple(str(label) for label in labels or range(count))
            if len(names) != count or len(set(names)) != count:
                raise ConfigError(
                    "labels", f"{len(names)} names", f"does not name {count} classes", "Give each one name"
                )
            about["scores"] = "before the last activation, which prediction applies; keep_activation=True keeps it"
    elif labels is not None and not keep_activation:
        raise ConfigError(
            "labels", f"{len(labels)} names", "have no place: no single softmax is last", "Leave them out"
        )
    named: dict[str, Wire] = {}
    for wanted, flow in outputs.items():
        name, count = valid_name(wanted), 1
        while name in named:
            count += 1
            name = f"{valid_name(wanted)}_{count}"
        named[name] = flow.scores if names is not None and flow.scores is not None else mover.last(flow)
    module, signature = mover.net.finish(named)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    bare = [
        step.name for step in steps if isinstance(step, ArrayStep) and len(step.shape) == 3 and step.shape[0] in (1, 3)
    ]
    stated = "as scale= and image= say, or the file"
    if bare:
        stated = f"the file states none: give scale= (a factor on pixels 0..255) for photos as {bare[0]!r}"
    elif not any(isinstance(step, ImageStep) for step in steps):
        stated = "none is stated: inputs are taken as they are"
    return Imported(
        module=module,
        signature=signature,
        preparation=Preparation(tuple(steps), () if names is None else (LabelStep("target", "label", names),)),
        labels=names,
        name=path.stem,
        source={
            "file": path.name,
            "sha256": file_digest(digest or path),
            "format": system,
            "preparation": stated,
            **about,
        },
    )
