"""Checkpoints: read strictly, in our names or in AMCT's."""
