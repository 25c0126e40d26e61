"""torch's table of ONNX translations, built once per process instead of once per export.

`torch.onnx.export` reads and parses some 500 functions of onnxscript in every call: 0.3 s, half of the export of a
small model. The functions are the same each time; every export still gets a table of its own.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

REGISTRATION = "torch.onnx._internal.exporter._registration"


def keep() -> None:
    """From now on. Nothing happens before the first export has imported the table, or where torch has none."""
    registry = getattr(sys.modules.get(REGISTRATION), "ONNXRegistry", None)
    build = getattr(registry, "from_torchlib", None)
    if registry is None or build is None or hasattr(build, "built"):
        return
    built = functools.cache(build)

    def from_torchlib(*arguments: Any, **options: Any) -> Any:
        whole = built(*arguments, **options)
        table = registry()
        vars(table).update(vars(whole), functions={target: list(found) for target, found in whole.functions.items()})
        return table

    from_torchlib.built = built  # type: ignore[attr-defined]
    registry.from_torchlib = staticmethod(from_torchlib)
