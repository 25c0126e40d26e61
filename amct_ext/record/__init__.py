"""The record file: quantisation factors, removed channels and masks, strict on reading and writing."""
