"""Reader of protobuf's text format, for Caffe's `.prototxt` files; every value knows its line.

It reads what protobuf's own text reader reads (comments, `:` before messages or not, `<...>` for `{...}`, lists in
brackets, strings in either quote and in several parts) and checks names and values against `schema.py`. Parameters of
layers that Caffe does not have (`my_param { ... }`) are kept unchecked, for those who register a layer of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kindling.errors import FormatError, did_you_mean
from kindling.formats.caffe.schema import Field, Message, enums, merge, messages

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 2_000_000

# Possessive: a text of ten million characters must not take ten million steps back.
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n\f\v]+|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+')
      | (?P<word>[+-]?[A-Za-z0-9_.][A-Za-z0-9_.+-]*|-(?=\s*[A-Za-z0-9.]))
      | (?P<mark>[{}<>\[\]:;,/])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_SIMPLE = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_BOOLS = {"true": True, "True": True, "t": True, "1": True, "false": False, "False": False, "f": False, "0": False}
_INT = re.compile(r"[+-]?(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})\Z")
_FLOAT = re.compile(r"[+-]?([0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})([eE][+-]?[0-9]{1,6})?[fF]?\Z")
_INFINITE = re.compile(r"[+-]?(inf|infinity|nan)f?\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str | bytes, message: str = "NetParameter", what: str = "the text") -> Message:
    """The message that the text describes.

    Args:
        text: the whole file.
        message: name of the message in `schema.py`: `"NetParameter"`, `"SolverParameter"`.
        what: what to call the file in messages.
    Raises: FormatError, naming the line.

    >>> net = parse('name: "tiny" layer { name: "fc" inner_product_param { num_output: 3 } }')
    >>> net.get("name"), net.all("layer")[0].get("inner_product_param").get("num_output")
    ('tiny', 3)
    >>> parse('name: "x"\\nlayer { nam: "fc" }')
    Traceback (most recent call last):
    kindling.errors.FormatError: the text, line 2: LayerParameter has no field 'nam'. Did you mean 'name'?
    """
    if len(text) > MAX_BYTES:
        raise FormatError(f"{what} has {len(text):,} bytes; a net description has at most {MAX_BYTES:,}.")
    return _Parser(text if isinstance(text, str) else _decode(text), what).whole(message)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Parser:
    def __init__(self, text: str, what: str) -> None:
        self.what = what
        self.count = 0
        self.tokens = self._tokens(text)
        self.token: _Token | None = None
        self.line = 1
        self._advance()

    def _tokens(self, text: str) -> Iterator[_Token]:
        at, line = 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._error(line, f"{text[at]!r} is not part of the text format")
            kind = str(match.lastgroup)
            if kind != "skip":
                yield _Token(kind, match.group(), line)
            line += match.group().count("\n")
            at = match.end()

    def _error(self, line: int, why: str, near: str = "") -> FormatError:
        return FormatError(f"{self.what}, line {line}: {why}.{near}")

    def _advance(self) -> None:
        if self.token is not None:
            self.line = self.token.line
        self.token = next(self.tokens, None)

    def _next(self, wanted: str) -> _Token:
        token = self.token
        if token is None:
            raise self._error(self.line, f"the text ends where {wanted} should stand. Is the file whole?")
        self._advance()
        return token

    def _skip(self, mark: str) -> bool:
        if self.token is not None and self.token.kind == "mark" and self.token.text == mark:
            self._advance()
            return True
        return False

    def whole(self, message: str) -> Message:
        made = Message(message, 1)
        while self.token is not None:
            self._field(made, 1)
        return made

    def _body(self, message: Message, close: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(message.line, f"messages are nested more than {MAX_DEPTH} deep")
        while not self._skip(close):
            if self.token is None:
                raise self._error(
                    self.line, f"the text ends before the {close!r} of line {message.line}. Is the file whole?"
                )
            self._field(message, depth)

    def _field(self, message: Message, depth: int) -> None:
        token = self._next("a field")
        if token.kind != "word":
            raise self._error(token.line, f"{token.text[:40]!r} stands where a field's name should")
        name = token.text
        known = messages().get(message.type)
        entry = known.get(name) if known is not None else None
        if known is not None and entry is None and not _is_extra(message, name):
            near = did_you_mean(name[:60], known)
            raise self._error(token.line, f"{message.type} has no field {name[:60]!r}", near)
        colon = self._skip(":")
        opened = self.token
        if opened is not None and opened.kind == "mark" and opened.text == "[":
            self._advance()
            if not self._skip("]"):
                self._value(message, name, entry, token.line, depth)
                while self._skip(","):
                    self._value(message, name, entry, token.line, depth)
                if not self._skip("]"):
                    raise self._error(self.line, f"the list of {name!r} is not closed by ']'")
        else:
            if not colon and not (opened is not None and opened.text in ("{", "<")):
                raise self._error(token.line, f"a ':' is missing after {name[:60]!r}")
            self._value(message, name, entry, token.line, depth)
        if not self._skip(","):
            self._skip(";")

    def _value(self, message: Message, name: str, entry: Field | None, line: int, depth: int) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            raise self._error(line, f"the text has more than {MAX_VALUES:,} values")
        token = self._next(f"the value of {name!r}")
        is_message = token.kind == "mark" and token.text in ("{", "<")
        value: Any
        if entry is not None and (entry.type in messages()) != is_message:
            kind = "a message in braces" if entry.type in messages() else "one value"
            raise self._error(token.line, f"{name!r} takes {kind}, not {token.text[:40]!r}")
        if is_message:
            value = Message(entry.type if entry is not None else name, token.line)
            self._body(value, "}" if token.text == "{" else ">", depth + 1)
            if entry is not None and not entry.repeated and message.has(name):
                merge(message.get(name), value)
                return
        elif token.kind == "string":
            parts = [token.text]
            while self.token is not None and self.token.kind == "string":
                parts.append(self._next("a string").text)
            value = self._string(parts, entry, name, token.line)
        elif token.kind == "word":
            text = token.text
            if text == "-":
                text += self._next("a number").text
            value = self._scalar(text, entry, name, token.line)
        else:
            raise self._error(token.line, f"{token.text!r} stands where the value of {name!r} should")
        if entry is not None and not entry.repeated:
            message.put(name, value)  # the last one counts
            message.lines[name] = line
        else:
            message.add(name, value, line)

    def _string(self, parts: list[str], entry: Field | None, name: str, line: int) -> str | bytes:
        if entry is not None and entry.type not in ("str", "bytes", "Engine"):
            if entry.type in enums() and len(parts) == 1:  # written with quotes by some tools
                return str(self._scalar(parts[0][1:-1], entry, name, line))
            raise self._error(line, f"{name!r} takes {_kind(entry)}, not the text {parts[0][:40]}")
        raw = b"".join(_ESCAPE.sub(_unescape, part[1:-1].encode("utf-8")) for part in parts)
        if entry is not None and entry.type == "bytes":
            return raw
        return raw.decode("utf-8", "replace")

    def _scalar(self, text: str, entry: Field | None, name: str, line: int) -> Any:
        value = _convert(text, entry)
        if value is None:
            assert entry is not None
            near = did_you_mean(text[:60], enums()[entry.type]) if entry.type in enums() else ""
            raise self._error(line, f"{name!r} takes {_kind(entry)}, not {text[:60]!r}", near)
        return value


def _convert(text: str, entry: Field | None) -> Any:
    """A bare word as a value; None where it does not fit."""
    if entry is None:
        if _INT.match(text):
            return _int(text)
        return _float(text) if _FLOAT.match(text) else _BOOLS.get(text, text)
    if entry.type == "bool":
        return _BOOLS.get(text)
    if entry.type in ("int", "uint"):
        value = _int(text) if _INT.match(text) else None
        low, high = (0, 2**32) if entry.type == "uint" else (-(2**63), 2**63)
        return value if value is not None and low <= value < high else None
    if entry.type in ("float", "double"):
        if _INT.match(text):
            return float(_int(text))
        return _float(text) if _FLOAT.match(text) or _INFINITE.match(text) else None
    if entry.type == "Engine":
        return text
    if entry.type in enums():
        names = enums()[entry.type]
        if text in names:
            return text
        if _INT.match(text):
            number = _int(text)
            return next((known for known, other in names.items() if other == number), None)
    return None


def _int(text: str) -> int:
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    if digits[:2].lower() == "0x":
        return sign * int(digits, 16)
    octal = len(digits) > 1 and digits[0] == "0" and all(digit in "01234567" for digit in digits)
    return sign * int(digits, 8 if octal else 10)


def _float(text: str) -> float:
    if text[-1] in "fF" and not text.lower().endswith("inf"):
        text = text[:-1]
    return float(text)


def _kind(entry: Field) -> str:
    kinds = {
        "int": "a whole number",
        "uint": "a whole number from 0 to 4294967295",
        "float": "a number",
        "double": "a number",
        "bool": "true or false",
        "str": "a text in quotes",
        "bytes": "a text in quotes",
    }
    return kinds.get(entry.type, f"a name of {entry.type}")


def _is_extra(message: Message, name: str) -> bool:
    return message.type in ("LayerParameter", "V1LayerParameter") and name.endswith("_param")


def _unescape(match: re.Match[bytes]) -> bytes:
    octal, hexa, small, large, plain = match.groups()
    if octal is not None:
        return bytes([int(octal, 8) & 0xFF])
    if hexa is not None:
        return bytes([int(hexa, 16)])
    if small is not None or large is not None:
        point = int(small or large, 16)
        return chr(point).encode("utf-8", "replace") if point < 0x110000 else b"?"
    return _SIMPLE.get(plain, plain)
