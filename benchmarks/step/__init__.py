"""Benchmarks of whole training steps and of the verbs around them."""
