"""Public models at small size with random weights; nothing is downloaded."""
