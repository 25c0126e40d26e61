"""Compressed layers and what hangs below them: quantisers, masks, the shift search."""
