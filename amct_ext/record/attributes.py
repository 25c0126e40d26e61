"""Attributes of a record's graph nodes: a name, a kind, and the value in the field that belongs to the kind."""

from __future__ import annotations

from typing import Any

from amct_ext.errors import RecordError
from amct_ext.proto.text import Where

_VALUE_FIELDS = {"FLOAT": "f", "INT": "i", "STRING": "s", "FLOATS": "floats", "INTS": "ints"}
_LISTS = ("FLOATS", "INTS")


def read_attribute(node: Any, name: str, kind: str, where: Where) -> Any:
    """The value of the first attribute of this name, None where there is none. Errors: RecordError (another kind)."""
    attr = next((item for item in node.attr if item.name == name), None)
    if attr is None:
        return None
    kinds = attr.DESCRIPTOR.fields_by_name["type"].enum_type.values_by_number
    if kinds[attr.type].name != kind:
        found = kinds[attr.type].name
        raise RecordError(f"{where()}: node '{node.name}': attribute '{name}' is {found}, must be {kind}")
    field = _VALUE_FIELDS[kind]
    if kind not in _LISTS and not attr.HasField(field):
        raise RecordError(f"{where()}: node '{node.name}': attribute '{name}' has no value; give it as '{field}: ...'")
    return getattr(attr, field)


def write_attribute(node: Any, name: str, kind: str, value: Any) -> None:
    """Give a node this attribute, in place of one of the same name."""
    attr = next((item for item in node.attr if item.name == name), None) or node.attr.add(name=name)
    attr.type = attr.DESCRIPTOR.fields_by_name["type"].enum_type.values_by_name[kind].number
    field = _VALUE_FIELDS[kind]
    attr.ClearField(field)
    if kind in _LISTS:
        getattr(attr, field).extend(value)
    else:
        setattr(attr, field, value)
