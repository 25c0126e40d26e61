"""Benchmarks of whole training steps and of the functions around them."""
