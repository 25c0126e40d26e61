"""Names that the TorchScript ONNX exporter gives to the nodes of a model."""

from __future__ import annotations

from collections.abc import Sequence

# ONNX names where the op's own name in camel case is not it.
_ONNX_NAMES = {"cat": "Concat", "stack": "Concat"}


class NodeNames:
    """Names of ops, each given once: by the modules on the stack and the operator, numbered where they repeat."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def unique(self, op: str, scopes: Sequence[str]) -> str:
        """The name of the next op of this kind inside of these modules (qualified names, outermost first)."""
        kind = _ONNX_NAMES.get(op) or "".join(part.capitalize() for part in op.rsplit("::", 1)[-1].split("_"))
        name = "/".join(["", *(scope_name(scope) for scope in scopes if scope), kind])
        count = self._used.get(name, 0)
        self._used[name] = count + 1
        return f"{name}_{count}" if count else name


def scope_name(qualified: str) -> str:
    """The exporter shows the last part of a module's name, with the parts before it as far as it is a mere number."""
    parts = qualified.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isnumeric():
        start -= 1
    return ".".join(parts[start:])
