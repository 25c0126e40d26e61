"""Products on integers and on packed floats, and what is computed in their pass (docs/design/integer.md)."""
