"""What all flows share: layers into a model and out of it, its session, its settings, its files."""
