"""Reading protobuf text with messages that say where: file, line, column, field.

protobuf's Python parser reports where a syntax error is, but not where the fields are that it has read.
`FieldLocations` finds the line of a field from the text, only when a message needs it.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format

from amct_ext.proto import message_class

_TOKEN = re.compile(
    r"(?P<newline>\n)|(?P<blank>[ \t\r\f\v]+|\#[^\n]*)"
    r"|(?P<string>\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?)"
    r"|(?P<mark>[{}<>\[\]:;,])|(?P<word>[^\s{}<>\[\]:;,\"'#]+)"
)
_END = ("end", "", 0)
_MAX_MESSAGE_LENGTH = 600  # characters of a message, whatever stands in the file

Where = Callable[[], str]  # 'file:line' of a field, asked for only where a message needs it


@dataclass
class _Field:
    name: str
    line: int
    children: list[_Field] = field(default_factory=list)


class _Scanner:
    """Names and lines of the fields of protobuf text that is known to be valid."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = 0

    def _peek(self) -> tuple[str, str, int]:
        return self._tokens[self._next] if self._next < len(self._tokens) else _END

    def _take(self) -> tuple[str, str, int]:
        token = self._peek()
        self._next += 1
        return token

    def fields(self) -> list[_Field]:
        found = []
        while self._peek()[1] not in ("}", ">") and self._peek() != _END:
            kind, name, line = self._take()
            if kind != "word":  # a separator between fields
                continue
            if self._peek()[1] == ":":
                self._take()
            if self._peek()[1] != "[":
                found.append(self._value(name, line))
                continue
            self._take()
            while self._peek()[1] not in ("]", ""):
                if self._peek()[1] == ",":
                    self._take()
                else:
                    found.append(self._value(name, self._peek()[2]))
            self._take()
        return found

    def _value(self, name: str, line: int) -> _Field:
        kind, token, _ = self._take()
        if kind == "mark" and token in "{<":
            value = _Field(name, line, self.fields())
            self._take()
            return value
        while kind == "string" and self._peek()[0] == "string":  # neighbouring strings are one
            self._take()
        return _Field(name, line)


def _tokens(text: str) -> list[tuple[str, str, int]]:
    line, found = 1, []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind == "newline":
            line += 1
        elif kind != "blank":
            found.append((kind, match.group(), line))
    return found


@dataclass(frozen=True)
class FieldLocations:
    """Finds the line of a field in a file; `source` is the file's name as messages give it."""

    source: str
    text: str = field(default="", repr=False)

    @functools.cached_property
    def _fields(self) -> list[_Field]:
        """Scanned at most once: a record of a large model has thousands of nodes to locate."""
        return _Scanner(self.text).fields() if self.text else []

    def at(self, *path: str | int) -> str:
        """'file:line' of a field, e.g. at('override_layer_configs', 2, 'layer_name'); a number picks an occurrence.

        Without a number the last occurrence counts, as for protobuf. An absent field gives its parent's line.
        """
        line, fields = None, self._fields
        position = 0
        while position < len(path):
            same = [item for item in fields if item.name == path[position]]
            position += 1
            index = -1
            if position < len(path) and isinstance(path[position], int):
                index = int(path[position])
                position += 1
            if not same or index >= len(same):
                break
            line, fields = same[index].line, same[index].children
        return self.source if line is None else f"{self.source}:{line}"


def close_matches(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a name that is not known, '' where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(repr(item) for item in near)}?" if near else ""


class MessageSyntaxError(Exception):
    """A text is no text of a message: what is wrong, after file, line and column; these (None where unknown)."""

    def __init__(self, reason: str, line: int | None, column: int | None) -> None:
        super().__init__(reason, line, column)
        self.reason = reason


def parse_message(name: str, text: str, source: str, repeated_scalars: bool = False) -> Any:
    """The message with this full name that `text` describes; `source` is the file's name as messages give it.

    `repeated_scalars`: a scalar may be given twice, the last one counts. Errors: MessageSyntaxError.
    """
    message = message_class(name)()
    try:
        (text_format.Merge if repeated_scalars else text_format.Parse)(text, message)
    except text_format.ParseError as error:
        reason, line, column = _explain(error, text, source, message)
        if len(reason) > _MAX_MESSAGE_LENGTH:
            reason = f"{reason[: _MAX_MESSAGE_LENGTH - 60]} ... {reason[-50:]}"
        raise MessageSyntaxError(reason, line, column) from None
    return message


def format_message(message: Any) -> str:
    """The text of a message, as protobuf prints it."""
    return str(text_format.MessageToString(message, as_utf8=True))


def _explain(error: text_format.ParseError, text: str, source: str, message: Any) -> tuple[str, int | None, int | None]:
    line, column = error.GetLine(), error.GetColumn()
    reason = re.sub(r"^\d+:\d+ : ", "", str(error))
    reason = re.sub(r"^'.*?': (?=[A-Z])", "", reason, flags=re.DOTALL).rstrip(". ")
    source_line = text.splitlines()[line - 1] if line and line <= len(text.splitlines()) else ""
    location = source if line is None else f"{source}:{line}:{column}"
    if _open_braces(text) and source_line.strip() == _last_line(text):
        return f"{location}: the text ends before its last brace is closed (a truncated file?): {reason}", line, column
    unknown = re.search(r'type "([\w.]+)" has no field named "(.+?)"', reason)
    if unknown:
        known = _field_names(message.DESCRIPTOR, unknown[1])
        hint = close_matches(unknown[2], known) or f"; known here: {', '.join(known)}"
        return f"{location}: unknown field '{unknown[2]}' in {unknown[1].rsplit('.', 1)[-1]}{hint}", line, column
    named = re.search(r"(\w+)\s*:?\s*\[?[^\[\]:{}<>]*$", source_line[: (column or 1) - 1][-_MAX_MESSAGE_LENGTH:])
    return f"{location}: {'field ' + repr(named[1]) + ': ' if named else ''}{reason}", line, column


def _open_braces(text: str) -> bool:
    marks = [token for kind, token, _ in _tokens(text) if kind == "mark"]
    return sum(token in "{<[" for token in marks) > sum(token in "}>]" for token in marks)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _field_names(descriptor: Any, message_name: str) -> list[str]:
    """The fields of the message type of this full name, found from the root's descriptor."""
    return [item.name for item in descriptor.file.pool.FindMessageTypeByName(message_name).fields]
