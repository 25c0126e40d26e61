"""How much of public models is pruned and quantised, beside another pruner: docs/models.md."""
