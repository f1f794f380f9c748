"""The picture of a net: its layers as boxes, column by column, as SVG or PNG.

`plan` decides where everything stands and gives a list of plain marks; `_svg` writes them as text, `_png` draws them
with matplotlib. What the layers are comes from `kindling.surgery`. Other pictures (confusion matrices, training
curves) are with what they show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from kindling.errors import ConfigError, MissingExtraError, StorageError

if TYPE_CHECKING:
    from torch import nn

    from kindling.signature import Signature
    from kindling.surgery import LayerInfo

BOX_HEIGHT = 40.0
RANK_GAP = 24.0
LANE_GAP = 18.0
COLUMN_GAP = 44.0
MARGIN = 24.0
HEAD = 34.0
FOOT = 34.0
NAME_SIZE, SMALL_SIZE = 12.0, 10.5

INK, GREY, EDGE, FRAME = "#1b1f24", "#57606a", "#6e7781", "#afb8c1"
ICE, ICE_FRAME = "#e4f1fb", "#3b82b8"
FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("convolution", "#2f6db5", ("conv",)),
    ("dense", "#2c8a57", ("linear", "embedding")),
    ("recurrent, attention", "#7a4fb0", ("lstm", "gru", "rnn", "attention", "transformer")),
    ("pooling", "#d9822b", ("pool", "mean", "upsample", "interpolate")),
    ("normalisation", "#b0568f", ("norm",)),
    ("joining", "#4a5560", ("add", "cat", "sub", "mul", "stack", "concat", "matmul")),
)
OTHER = ("other", "#9aa4ae")

# ------------------------------------------------------------------------------------------------------- the marks


@dataclass(frozen=True)
class Rect:
    """A box; `title` is what a pointer held over it reads."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str | None = None
    dashed: bool = False
    radius: float = 5.0
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A path of points with rounded corners that ends in an arrow."""

    points: tuple[tuple[float, float], ...]
    colour: str = EDGE
    arrow: bool = True
    width: float = 1.3


@dataclass(frozen=True)
class Text:
    """One line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    size: float = SMALL_SIZE
    bold: bool = False
    colour: str = INK
    anchor: str = "start"


Mark = Rect | Line | Text


@dataclass(frozen=True)
class Plan:
    """A drawing: its size and its marks, in pixels, from back to front."""

    width: float
    height: float
    marks: tuple[Mark, ...]


# ------------------------------------------------------------------------------------------------------- the boxes


@dataclass(frozen=True)
class Box:
    """What one box says."""

    name: str
    kind: str
    shape: str
    parameters: int
    inputs: tuple[str, ...]
    frozen: bool
    title: str


def boxes(rows: Sequence[LayerInfo], ends: Mapping[str, tuple[str, ...]], signature: Signature) -> list[Box]:
    """One box for each layer, with a normalisation that is its only reader inside; then one for each output."""
    readers: dict[str, list[str]] = {}
    for row in rows:
        for name in row.inputs:
            readers.setdefault(name, []).append(row.name)
    for names in ends.values():
        for name in names:
            readers.setdefault(name, []).append("")
    by_name = {row.name: row for row in rows}
    home: dict[str, str] = {}  # layer -> the box it is in
    norms: dict[str, LayerInfo] = {}
    for row in rows:
        before = by_name[row.inputs[0]] if len(row.inputs) == 1 and row.inputs[0] in by_name else None
        if (
            before is not None
            and _family(row.kind)[0] == "normalisation"
            and _family(before.kind)[0] in ("convolution", "dense")
            and before.activation is None
            and before.frozen == row.frozen
            and readers[before.name] == [row.name]
        ):
            home[row.name], norms[before.name] = before.name, row
    found = []
    for row in rows:
        if row.name in home:
            continue
        norm = norms.get(row.name)
        last = norm or row
        kind = " + ".join(filter(None, (row.kind, norm.kind if norm else "", last.activation or "")))
        count = row.parameters + (norm.parameters if norm else 0)
        shapes = [
            f"{part.name}.{key} {_size(shape)}" for part in (row, norm) if part for key, shape in part.shapes.items()
        ]
        title = "\n".join([f"{row.name}: {kind}", *([f"with {norm.name}"] if norm else []), *shapes])
        inputs = tuple(dict.fromkeys(home.get(name, name) for name in row.inputs))
        shape = "" if last.output_shape is None else _size(last.output_shape)
        found.append(Box(row.name, kind, shape, count, inputs, row.frozen, title))
    taken = {box.name for box in found}
    for name, names in ends.items():
        label = name
        while label in taken:
            label = f"{label} "  # a box of its own beside the layer of the same name
        taken.add(label)
        shape = _size(signature.outputs[name].shape[1:])
        sources = tuple(dict.fromkeys(home.get(source, source) for source in names))
        found.append(Box(label, "Output", shape, 0, sources, False, f"output {name}"))
    return found


def _size(shape: Iterable[int | str]) -> str:
    return "×".join(map(str, shape)) or "1"


def _family(kind: str) -> tuple[str, str]:
    lower = kind.lower()
    for name, colour, words in FAMILIES:
        if any(word in lower for word in words):
            return name, colour
    return OTHER


# ------------------------------------------------------------------------------------------------------ the places


def _ranks(items: Sequence[Box]) -> dict[str, int]:
    """Row of each box: one below the lowest of its inputs; what reads nothing stands just above its first reader."""
    ranks: dict[str, int] = {}
    for box in items:
        ranks[box.name] = max((ranks[name] + 1 for name in box.inputs if name in ranks), default=0)
    for box in items:
        if not box.inputs:
            below = [ranks[other.name] for other in items if box.name in other.inputs]
            ranks[box.name] = max(min(below, default=1) - 1, 0)
    return ranks


def _lanes(items: Sequence[Box], ranks: Mapping[str, int]) -> dict[str, int]:
    """Place of each box in its row: under its first input where that is free, else beside."""
    lanes: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    for box in items:
        wish = [lanes[name] for name in box.inputs if name in lanes]
        # A box that joins branches goes under the leftmost of them.
        lane = min(wish, default=0)
        while (ranks[box.name], lane) in taken:
            lane += 1
        lanes[box.name] = lane
        taken.add((ranks[box.name], lane))
    return lanes


def _breaks(items: Sequence[Box], ranks: Mapping[str, int], columns: int) -> list[int]:
    """Rows at which the columns begin: of nearly equal heights, broken where few lines cross."""
    last = max(ranks.values())
    crossing = [0] * (last + 2)
    for box in items:
        for name in box.inputs:
            for row in range(ranks[name] + 1, ranks[box.name] + 1):
                crossing[row] += 1
    ideal = (last + 1) / columns
    # best[r]: cheapest way to fill some columns with the rows before r, as (cost, starts).
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(columns):
        following: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, starts) in best.items():
            for end in range(start + 1, last + 2):
                lines = 0.0 if end == last + 1 else 30.0 * max(crossing[end] - 1, 0)
                new = cost + (end - start - ideal) ** 2 + lines
                if end not in following or new < following[end][0]:
                    following[end] = new, [*starts, start]
        best = following
    return best[last + 1][1]


def _text_width(text: str, size: float) -> float:
    wide = sum(0.72 if c.isupper() or c in "×+—mw" else 0.34 if c in ".,:;il|' " else 0.6 for c in text)
    return wide * size


def _short(text: str, size: float, room: float) -> str:
    """The text with its middle left out where it is too long; its end tells layers apart, its beginning blocks."""
    if _text_width(text, size) <= room:
        return text
    keep = len(text)
    while keep > 2 and _text_width(text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :], size) > room:
        keep -= 1
    return text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]


def plan(items: Sequence[Box], foot: str) -> Plan:
    """Places for boxes and lines, in as many columns as make the picture about as wide as a page is high."""
    ranks = _ranks(items)
    lanes = _lanes(items, ranks)
    rooms = [
        (
            _text_width(box.name, NAME_SIZE) + _text_width(f"{box.parameters:,}", SMALL_SIZE) + 18.0 * box.frozen,
            _text_width(box.kind, SMALL_SIZE) + _text_width(box.shape, SMALL_SIZE),
        )
        for box in items
    ]
    widest = max(max(room) for room in rooms)
    width = min(max(widest + 44, 150.0), 330.0)
    rows = max(ranks.values()) + 1
    tries = []
    for columns in range(1, min(rows // 4 + 1, 12) + 1):
        starts = _breaks(items, ranks, columns)
        heights = [end - start for start, end in zip(starts, [*starts[1:], rows], strict=True)]
        made = _lay_out(items, ranks, lanes, width, starts, foot)
        empty = 1.0 - sum(heights) / (len(heights) * max(heights))
        tries.append((abs(math.log(made.width / made.height / 1.35)) + 1.5 * empty, columns, made))
    return min(tries, key=lambda one: one[:2])[2]


def _lay_out(
    items: Sequence[Box],
    ranks: Mapping[str, int],
    lanes: Mapping[str, int],
    width: float,
    starts: Sequence[int],
    foot: str,
) -> Plan:
    column_of_rank = {
        row: max(k for k, start in enumerate(starts) if start <= row) for row in range(max(ranks.values()) + 1)
    }
    column = {box.name: column_of_rank[ranks[box.name]] for box in items}
    edges = [(source, box.name) for box in items for source in box.inputs if source in ranks]
    # Lines that pass boxes by run in channels at the right of their column.
    occupied = {(ranks[box.name], lanes[box.name]) for box in items}
    channels: dict[tuple[str, str], tuple[int, int]] = {}  # edge -> lane it passes at the right of, place there
    straight: dict[tuple[str, str], int] = {}
    for source, target in sorted(edges, key=lambda edge: ranks[edge[1]] - ranks[edge[0]]):
        between = range(ranks[source] + 1, ranks[target])
        if column[source] != column[target] or not between:
            continue
        free = [lane for lane in (lanes[source], lanes[target]) if all((row, lane) not in occupied for row in between)]
        if free:
            straight[source, target] = free[0]
            occupied |= {(row, free[0]) for row in between}
            continue
        rows = range(ranks[source], ranks[target] + 1)
        lane = max(own for row, own in occupied if row in rows)
        used = {
            place
            for edge, (_, place) in channels.items()
            if column[edge[0]] == column[source] and ranks[edge[0]] < ranks[target] and ranks[source] < ranks[edge[1]]
        }
        channels[source, target] = lane, next(k for k in range(len(channels) + 1) if k not in used)

    # Where columns, rows and lanes are.
    across = [(s, t) for s, t in edges if column[s] != column[t]]
    left: list[float] = []
    gutter: list[float] = []  # the middle of the free strip at the right of each column
    x = MARGIN
    for k in range(len(starts)):
        own = [box for box in items if column[box.name] == k]
        lane_count = max(lanes[box.name] for box in own) + 1
        lane_count = max(lane_count, *(lane + 1 for (s, _), lane in straight.items() if column[s] == k), 1)
        channel_count = max((place + 1 for (s, _), (_, place) in channels.items() if column[s] == k), default=0)
        left.append(x)
        x += lane_count * width + (lane_count - 1) * LANE_GAP + 12.0 * channel_count
        leaving = sum(1 for s, t in across if column[s] <= k < column[t])
        gutter.append(x + COLUMN_GAP / 2)
        x += COLUMN_GAP + 5.0 * max(leaving - 1, 0)
    total_width = x - COLUMN_GAP + MARGIN
    over = sum(1 for s, t in across if column[t] > column[s] + 1)
    top = MARGIN + HEAD + 6.0 * over

    def at(name: str) -> tuple[float, float]:
        """Upper left corner of a box."""
        k = column[name]
        lane_x = left[k] + lanes[name] * (width + LANE_GAP)
        return lane_x, top + (ranks[name] - starts[k]) * (BOX_HEIGHT + RANK_GAP)

    # Lines that change lanes do it in the gap below their source, each source at a height of its own.
    bends: dict[tuple[int, int], list[str]] = {}
    for source, target in edges:
        sideways = straight.get((source, target), lanes[target]) != lanes[source]
        if sideways and (source, target) not in channels and column[source] == column[target]:
            gap = bends.setdefault((column[source], ranks[source]), [])
            gap.append(source) if source not in gap else None

    def beside(name: str) -> bool:
        """Whether other boxes stand at the right of this one."""
        return any(ranks[box.name] == ranks[name] and lanes[box.name] > lanes[name] for box in items)

    def level(source: str) -> float:
        gap = bends[column[source], ranks[source]]
        share = 0.4 if len(gap) == 1 else 0.2 + 0.4 * gap.index(source) / (len(gap) - 1)
        return at(source)[1] + BOX_HEIGHT + RANK_GAP * share

    marks: list[Mark] = []
    turns: dict[int, int] = {}
    for source, target in edges:
        (sx, sy), (tx, ty) = at(source), at(target)
        begin, end = (sx + width / 2, sy + BOX_HEIGHT), (tx + width / 2, ty)
        if (source, target) in channels:
            lane, place = channels[source, target]
            k = column[source]
            side = left[k] + (lane + 1) * width + lane * LANE_GAP + 10.0 + 10.0 * place
            # Out of the side and into the side, or through the gaps where other boxes stand in that row.
            if beside(source):
                low = begin[1] + RANK_GAP * 0.7
                points = [begin, (begin[0], low), (side, low)]
            else:
                points = [(sx + width, sy + BOX_HEIGHT * 0.6), (side, sy + BOX_HEIGHT * 0.6)]
            if beside(target):
                high = end[1] - RANK_GAP * 0.45
                points += [(side, high), (end[0], high), end]
            else:
                points += [(side, ty + BOX_HEIGHT * 0.4), (tx + width, ty + BOX_HEIGHT * 0.4)]
            marks.append(Line(tuple(points)))
        elif (source, target) in straight:
            lane_x = left[column[source]] + straight[source, target] * (width + LANE_GAP) + width / 2
            if lane_x == begin[0] == end[0]:
                marks.append(Line((begin, end)))
            elif lane_x == begin[0]:
                turn_y = end[1] - RANK_GAP * 0.6
                marks.append(Line((begin, (lane_x, turn_y), (end[0], turn_y), end)))
            else:
                marks.append(Line((begin, (begin[0], level(source)), (lane_x, level(source)), end)))
        elif column[source] == column[target]:
            bend = () if begin[0] == end[0] else ((begin[0], level(source)), (end[0], level(source)))
            marks.append(Line((begin, *bend, end)))
        else:
            # Down into the gap below, over to the strip between columns, up, and down into the target from above.
            k, goal = column[source], column[target]
            turn = turns[k] = turns.get(k, -1) + 1
            strip, low, high = gutter[k] + 5.0 * turn, begin[1] + RANK_GAP / 2, end[1] - RANK_GAP / 2
            points = [begin, (begin[0], low), (strip, low)]
            if goal > k + 1:
                band = MARGIN + HEAD - 8.0 + 6.0 * len([m for m in marks if isinstance(m, Line) and len(m.points) > 6])
                strip2 = gutter[goal - 1] + 5.0 * turn
                points += [(strip, band), (strip2, band), (strip2, high)]
            else:
                points.append((strip, high))
            marks.append(Line((*points, (end[0], high), end)))
    for box in items:
        marks += _box_marks(box, *at(box.name), width)
    rows_in = [
        max(ranks[box.name] for box in items if column[box.name] == k) - starts[k] + 1 for k in range(len(starts))
    ]
    bottom = top + max(rows_in) * (BOX_HEIGHT + RANK_GAP) - RANK_GAP
    legend, legend_width = _legend(items, bottom + 34.0, foot)
    return Plan(max(total_width, legend_width), bottom + FOOT + 22.0, (*marks, *legend))


def _box_marks(box: Box, x: float, y: float, width: float) -> list[Mark]:
    edge_case = box.kind in ("Input", "Output")
    fill = ICE if box.frozen else "#eceff2" if edge_case else "#ffffff"
    stroke = ICE_FRAME if box.frozen else EDGE if edge_case else FRAME
    marks: list[Mark] = [Rect(x, y, width, BOX_HEIGHT, fill, stroke, box.frozen, 14.0 if edge_case else 5.0, box.title)]
    if not edge_case:
        marks.append(Rect(x + 4.0, y + 5.0, 4.0, BOX_HEIGHT - 10.0, _family(box.kind)[1], radius=2.0))
    inset, right = x + 15.0, x + width - 10.0
    if box.frozen:
        marks += _snowflake(right - 5.0, y + 12.0)
        right -= 17.0
    count = f"{box.parameters:,}" if box.parameters else ""
    room = right - inset - (_text_width(count, SMALL_SIZE) + 8.0 if count else 0.0)
    marks.append(Text(inset, y + 16.5, _short(box.name.strip(), NAME_SIZE, room), NAME_SIZE, bold=True))
    if count:
        marks.append(Text(right, y + 16.5, count, SMALL_SIZE, colour=GREY, anchor="end"))
    right = x + width - 10.0
    room = right - inset - _text_width(box.shape, SMALL_SIZE) - 8.0
    marks.append(Text(inset, y + 32.0, _short(box.kind, SMALL_SIZE, max(room, 40.0)), SMALL_SIZE, colour=GREY))
    marks.append(Text(right, y + 32.0, box.shape, SMALL_SIZE, colour=GREY, anchor="end"))
    return marks


def _snowflake(x: float, y: float, radius: float = 5.5) -> list[Mark]:
    """Drawn, for not every font has one."""
    marks: list[Mark] = []
    for degrees in (30, 90, 150):
        dx, dy = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
        marks.append(Line(((x - dx, y - dy), (x + dx, y + dy)), ICE_FRAME, arrow=False, width=1.4))
    return marks


def _legend(items: Sequence[Box], y: float, foot: str) -> tuple[list[Mark], float]:
    marks: list[Mark] = [Text(MARGIN, MARGIN + 8.0, foot, NAME_SIZE, bold=True)]
    present = dict.fromkeys(_family(box.kind) for box in items if box.kind not in ("Input", "Output"))
    x = MARGIN
    for name, colour in sorted(present, key=lambda family: family == OTHER):
        marks += [Rect(x, y - 9.0, 4.0, 12.0, colour, radius=2.0), Text(x + 9.0, y, name, colour=GREY)]
        x += _text_width(name, SMALL_SIZE) + 26.0
    if any(box.frozen for box in items):
        label = "frozen: not trained, inference mode"
        marks += [Rect(x, y - 11.0, 20.0, 15.0, ICE, ICE_FRAME, True, 3.0), *_snowflake(x + 10.0, y - 3.5, 4.5)]
        marks.append(Text(x + 26.0, y, label, colour=GREY))
        x += _text_width(label, SMALL_SIZE) + 40.0
    return marks, max(x, MARGIN + _text_width(foot, NAME_SIZE) * 1.1) + MARGIN


# ------------------------------------------------------------------------------------------------------ the drawing


def plot(module: nn.Module, signature: Signature, frozen: frozenset[str], path: str | Path) -> Path:
    """Draw the layers of a module, their shapes and weights, and the ways between them; frozen layers are marked.

    Args:
        path: where to; the ending chooses the form, `.svg` or `.png` (which needs matplotlib).
    Returns: the path.
    Raises: ConfigError, for another ending. MissingExtraError, without matplotlib. StorageError, where the file cannot
        be written.

    >>> import tempfile
    >>> from torch import nn
    >>> from kindling.signature import Signature, TensorSpec
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> spec = Signature({"x": TensorSpec(("N", 4))}, {"scores": TensorSpec(("N", 2))})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot(net, spec, frozenset({"0"}), f"{folder}/net.svg").read_text()[:4]
    '<svg'
    """
    from kindling.surgery import summary
    from kindling.surgery.summary import table

    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError("path", str(path), "has no ending that says what to draw", "End it in .svg or .png")
    rows, ends = table(module, signature, frozen)
    counts = summary(module, signature, frozen)
    foot = f"{counts.total:,} parameters"
    if counts.frozen:
        foot += f": {counts.trainable:,} trainable, {counts.frozen:,} frozen"
    made = plan(boxes(rows, ends, signature), foot)
    data = _svg(made).encode() if path.suffix.lower() == ".svg" else _png(made)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def _rounded(points: Sequence[tuple[float, float]], radius: float = 7.0) -> list[tuple[str, tuple[float, ...]]]:
    """Path commands M, L, Q through points with round corners."""
    commands: list[tuple[str, tuple[float, ...]]] = [("M", points[0])]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        one, two = math.dist(before, corner), math.dist(corner, after)
        r = min(radius, one / 2, two / 2)
        if r == 0:
            continue
        enter = tuple(c + (b - c) * r / one for b, c in zip(before, corner, strict=True))
        leave = tuple(c + (a - c) * r / two for a, c in zip(after, corner, strict=True))
        commands += [("L", enter), ("Q", (*corner, *leave))]
    return [*commands, ("L", points[-1])]


def _arrow(line: Line) -> tuple[tuple[float, float], ...]:
    """Corners of the arrow's head."""
    (x1, y1), (x2, y2) = line.points[-2:]
    long = math.dist((x1, y1), (x2, y2)) or 1.0
    ux, uy = (x2 - x1) / long, (y2 - y1) / long
    return (
        (x2, y2),
        (x2 - 7.0 * ux - 3.2 * uy, y2 - 7.0 * uy + 3.2 * ux),
        (x2 - 7.0 * ux + 3.2 * uy, y2 - 7.0 * uy - 3.2 * ux),
    )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _printable(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c if c in "\n\t" or (c.isprintable() and c not in "￾￿") else "�" for c in text)


def _svg(made: Plan) -> str:
    """The drawing as SVG: no scripts, no links, no fonts of its own."""
    n = _number
    size = f'width="{n(made.width)}" height="{n(made.height)}" viewBox="0 0 {n(made.width)} {n(made.height)}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{n(made.width)}" height="{n(made.height)}" fill="#ffffff"/>',
    ]
    for mark in made.marks:
        if isinstance(mark, Rect):
            stroke = f' stroke="{mark.stroke}"' if mark.stroke else ""
            dash = ' stroke-dasharray="5 3"' if mark.dashed else ""
            place = f'x="{n(mark.x)}" y="{n(mark.y)}" width="{n(mark.width)}" height="{n(mark.height)}"'
            title = f"<title>{escape(_printable(mark.title))}</title>" if mark.title else ""
            out.append(f'<rect {place} rx="{n(mark.radius)}" fill="{mark.fill}"{stroke}{dash}>{title}</rect>')
        elif isinstance(mark, Line):
            d = " ".join(f"{letter}{' '.join(map(n, numbers))}" for letter, numbers in _rounded(mark.points))
            out.append(f'<path d="{d}" fill="none" stroke="{mark.colour}" stroke-width="{n(mark.width)}"/>')
            if mark.arrow:
                corners = " ".join(f"{n(x)},{n(y)}" for x, y in _arrow(mark))
                out.append(f'<polygon points="{corners}" fill="{mark.colour}"/>')
        else:
            bold = ' font-weight="bold"' if mark.bold else ""
            anchor = f" text-anchor={quoteattr(mark.anchor)}" if mark.anchor != "start" else ""
            place = f'x="{n(mark.x)}" y="{n(mark.y)}" font-size="{n(mark.size)}"'
            out.append(f'<text {place}{bold}{anchor} fill="{mark.colour}">{escape(_printable(mark.text))}</text>')
    return "\n".join([*out, "</svg>\n"])


def _png(made: Plan) -> bytes:
    """The drawing as PNG, twice as fine as the SVG's pixels where that stays below 40 megapixels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
        from matplotlib.path import Path as Curve
    except ImportError:
        raise MissingExtraError.of("Drawing a PNG", "matplotlib", "plot") from None
    import io

    fine = max(min(2.0, math.sqrt(40e6 / (made.width * made.height))), 0.25)
    figure = Figure(figsize=(made.width / 100, made.height / 100), dpi=100 * fine, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, made.width)
    axes.set_ylim(made.height, 0)
    axes.axis("off")
    points = 72 / 100  # a pixel of ours in matplotlib's points
    codes: dict[str, list[Any]] = {
        "M": [Curve.MOVETO],
        "L": [Curve.LINETO],
        "Q": [Curve.CURVE3] * 2,
    }
    for order, mark in enumerate(made.marks):
        if isinstance(mark, Rect):
            style = f"round,pad=0,rounding_size={min(mark.radius, mark.width / 2, mark.height / 2)}"
            box = FancyBboxPatch((mark.x, mark.y), mark.width, mark.height, boxstyle=style)
            box.set(facecolor=mark.fill, edgecolor=mark.stroke or "none", linewidth=points, zorder=order)
            if mark.dashed:
                box.set_linestyle((0, (4, 2.5)))
            axes.add_patch(box)
        elif isinstance(mark, Line):
            commands = _rounded(mark.points)
            verts = [pair for _, numbers in commands for pair in zip(numbers[::2], numbers[1::2], strict=True)]
            curve = Curve(verts, [code for letter, _ in commands for code in codes[letter]])
            axes.add_patch(
                PathPatch(curve, fill=False, edgecolor=mark.colour, linewidth=mark.width * points, zorder=order)
            )
            if mark.arrow:
                axes.add_patch(
                    Polygon(_arrow(mark), closed=True, facecolor=mark.colour, edgecolor="none", zorder=order)
                )
        else:
            axes.text(
                mark.x,
                mark.y,
                _printable(mark.text),
                fontsize=mark.size * points * 0.94,
                fontweight="bold" if mark.bold else "normal",
                color=mark.colour,
                ha={"start": "left", "end": "right", "middle": "center"}[mark.anchor],
                va="baseline",
                zorder=order,
                parse_math=False,
            )
    out = io.BytesIO()
    canvas.print_png(out)
    return out.getvalue()
