"""Layers whose product is in a forward of the user's: their own, or that of a module above them."""
