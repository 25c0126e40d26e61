"""Which layer was compressed and why not, and what a device gains from it."""
