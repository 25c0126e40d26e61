"""Benchmarks of the ops: a row per op and input, against eager torch, Inductor and a call that moves the bytes."""
