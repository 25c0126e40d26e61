"""Benchmarks of the integer forward: time and accuracy."""
