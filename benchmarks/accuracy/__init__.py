"""Accuracy of compressed networks at a stated training budget, beside float and other toolkits (docs/accuracy.md)."""
