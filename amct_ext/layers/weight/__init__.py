"""Fake quantisation and masks of weights."""
