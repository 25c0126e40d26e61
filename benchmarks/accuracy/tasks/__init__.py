"""The tasks, one module per family: image, speech, text, time series, face."""
