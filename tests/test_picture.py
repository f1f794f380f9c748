"""Pictures hold every layer, hide none behind another, and let nothing out of the names."""

from __future__ import annotations

import builtins
import re
import sys
import xml.etree.ElementTree as ET
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kindling import picture, surgery
from kindling.errors import ConfigError, MissingExtraError, StorageError
from kindling.nets import vision
from kindling.signature import Signature, TensorSpec
from kindling.surgery.summary import table

SVG = "{http://www.w3.org/2000/svg}"


def images(classes: int = 1000, side: int = 224) -> Signature:
    return Signature({"image": TensorSpec(("N", 3, side, side))}, {"scores": TensorSpec(("N", classes))})


def meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = make()
    return module


class Skips(nn.Module):
    """Every layer reads all before it; two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 * (k + 1), 3, 1) for k in range(7))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        return found[-1] + y, found[3]


SKIPS = Signature(
    {"x": TensorSpec(("N", 3, 4, 4)), "y": TensorSpec(("N", 3, 4, 4))},
    {"sum": TensorSpec(("N", 3, 4, 4)), "third": TensorSpec(("N", 3, 4, 4))},
)
NETS: dict[str, tuple[Any, Signature]] = {
    "lenet": (vision.lenet, Signature({"image": TensorSpec(("N", 1, 28, 28))}, {"scores": TensorSpec(("N", 10))})),
    "vgg16": (vision.vgg16, images()),
    "squeezenet": (vision.squeezenet1_1, images()),
    "mobilenet": (vision.mobilenet_v2, images()),
    "skips": (Skips, SKIPS),
}


def planned(name: str, until: str | None = None) -> tuple[picture.Plan, list[picture.Box], nn.Module, Signature]:
    make, signature = NETS[name]
    module = meta(make)
    frozen = surgery.frozen_layers(module, until, signature) if until else frozenset()
    rows, ends = table(module, signature, frozen)
    items = picture.boxes(rows, ends, signature)
    return picture.plan(items, "foot"), items, module, signature


def frames(plan: picture.Plan) -> list[picture.Rect]:
    return [mark for mark in plan.marks if isinstance(mark, picture.Rect) and mark.height == picture.BOX_HEIGHT]


@pytest.mark.parametrize("name", list(NETS))
def test_every_layer_has_a_box_and_no_box_covers_another(name: str) -> None:
    plan, items, module, signature = planned(name)
    inside = "\n".join(box.title for box in items)
    for row in surgery.layers(module, signature):
        assert re.search(rf"^(with )?{re.escape(row.name)}(:|$)", inside, re.M), row.name
    rects = frames(plan)
    assert len(rects) == len(items)
    for k, one in enumerate(rects):
        assert 0 <= one.x <= plan.width - one.width
        assert 0 <= one.y <= plan.height - one.height
        for other in rects[k + 1 :]:
            assert one.x + one.width <= other.x or other.x + other.width <= one.x or abs(one.y - other.y) >= one.height


@pytest.mark.parametrize("name", list(NETS))
def test_lines_join_what_belongs_together_and_cross_no_box(name: str) -> None:
    plan, items, _, _ = planned(name)
    rects = dict(zip((box.name for box in items), frames(plan), strict=True))
    lines = [mark for mark in plan.marks if isinstance(mark, picture.Line) and mark.arrow]

    def touches(rect: picture.Rect, point: tuple[float, float]) -> bool:
        x, y = point
        return rect.x - 0.1 <= x <= rect.x + rect.width + 0.1 and rect.y - 0.1 <= y <= rect.y + rect.height + 0.1

    drawn = set()
    for line in lines:
        begin = [box for box, rect in rects.items() if touches(rect, line.points[0])]
        end = [box for box, rect in rects.items() if touches(rect, line.points[-1])]
        assert len(begin) == len(end) == 1
        drawn.add((begin[0], end[0]))
        for (x1, y1), (x2, y2) in zip(line.points, line.points[1:], strict=False):
            assert x1 == x2 or y1 == y2
            for box, rect in rects.items():
                if box in (begin[0], end[0]):
                    continue
                apart = (
                    max(x1, x2) <= rect.x
                    or min(x1, x2) >= rect.x + rect.width
                    or max(y1, y2) <= rect.y
                    or min(y1, y2) >= rect.y + rect.height
                )
                assert apart, (begin, end, box)
        assert all(0 <= x <= plan.width and 0 <= y <= plan.height for x, y in line.points)
    assert drawn == {(source, box.name) for box in items for source in box.inputs}


@pytest.mark.parametrize("name", list(NETS))
def test_the_picture_is_about_as_wide_as_a_page(name: str) -> None:
    plan, _, _, _ = planned(name)
    assert 0.5 < plan.width / plan.height < 2.6


def test_svg_says_what_the_layers_are(tmp_path: Path) -> None:
    module = meta(vision.vgg16)
    frozen = surgery.frozen_layers(module, "block4_pool")
    path = picture.plot(module, images(), frozen, tmp_path / "net.svg")
    assert path == tmp_path / "net.svg"
    root = ET.parse(path).getroot()
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for row in surgery.layers(module, images()):
        assert row.name in texts
        if row.parameters:
            assert f"{row.parameters:,}" in texts
    assert "138,357,544 parameters: 130,722,280 trainable, 7,635,264 frozen" in texts
    assert {"Conv2d + ReLU", "512×7×7", "Linear + ReLU"} <= set(texts)
    dashed = [r for r in root.iter(f"{SVG}rect") if r.get("stroke-dasharray") and r.get("height") == "40"]
    assert len(dashed) == len(frozen)
    plain = ET.parse(picture.plot(module, images(), frozenset(), tmp_path / "plain.svg")).getroot()
    assert not [r for r in plain.iter(f"{SVG}rect") if r.get("stroke-dasharray")]
    assert "frozen" not in "".join(e.text or "" for e in plain.iter(f"{SVG}text"))


def test_names_cannot_break_out(tmp_path: Path) -> None:
    hostile = '<script>alert(\'&"x")</script>\x00￾'
    module = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2)))
    signature = Signature({hostile: TensorSpec(("N", 2))}, {"a & b": TensorSpec(("N", 2))})
    path = picture.plot(module, signature, frozenset(), tmp_path / "net.svg")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    root = ET.fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "rect", "path", "polygon", "text", "title",
    }  # fmt: skip
    assert "a & b" in [element.text for element in root.iter(f"{SVG}text")]
    assert picture.plot(module, signature, frozenset(), tmp_path / "net.png").exists()


def test_long_names_are_shortened_in_the_middle() -> None:
    name = "encoder.layers.11.attention.output.dense.projection"
    short = picture._short(name, 12.0, 200.0)
    assert len(short) < len(name)
    assert short.startswith("encoder.")
    assert short.endswith("projection")
    assert "…" in short
    assert picture._short("fc1", 12.0, 200.0) == "fc1"


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    module = meta(vision.squeezenet1_1)
    path = picture.plot(module, images(), surgery.frozen_layers(module, "pool3"), str(tmp_path / "net.PNG"))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    ice = tuple(int(picture.ICE[k : k + 2], 16) for k in (1, 3, 5))
    assert ice in colours
    assert (255, 255, 255) in colours


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    module, signature = nn.Linear(2, 2), Signature({"x": TensorSpec(("N", 2))}, {"y": TensorSpec(("N", 2))})
    with pytest.raises(MissingExtraError, match=r"needs matplotlib\. Run: pip install 'kindling-spark\[plot\]'"):
        picture.plot(module, signature, frozenset(), tmp_path / "net.png")
    assert picture.plot(module, signature, frozenset(), tmp_path / "net.svg").exists()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    module, signature = nn.Linear(2, 2), Signature({"x": TensorSpec(("N", 2))}, {"y": TensorSpec(("N", 2))})
    with pytest.raises(ConfigError, match=r"End it in \.svg or \.png"):
        picture.plot(module, signature, frozenset(), tmp_path / "net.pdf")
    with pytest.raises(StorageError, match="cannot be written"):
        picture.plot(module, signature, frozenset(), tmp_path / "none" / "net.svg")
