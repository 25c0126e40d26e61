"""What follows a convolution in training, in one pass (docs/design/fusion.md)."""
