"""The paths on which a layer can compute its product."""

from __future__ import annotations

from typing import Literal

# Fake-quantised floats, 8-bit codes, or fake-quantised floats by weights that are packed for an evaluation.
ProductPath = Literal["float", "integer", "prepared"]
