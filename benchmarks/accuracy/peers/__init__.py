"""Other toolkits, one module each, at their best settings found here; imported when a run uses them."""
