"""Fake quantisation of a layer's input: calibration, the search for its range, clips, what backward keeps."""
