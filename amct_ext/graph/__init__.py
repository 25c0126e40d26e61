"""One recorded forward of a model: its layers, who feeds whom, and what each layer can take."""
