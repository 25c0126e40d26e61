"""What every other package may use: files, ranks, layer kinds, copies of models."""
