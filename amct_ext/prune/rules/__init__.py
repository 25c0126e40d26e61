"""One rule for each operator of a recorded forward: how channels pass through it."""
