"""Channel pruning: coupled channels found, chosen and removed, and the search for ratios."""
