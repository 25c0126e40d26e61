"""ONNX files of a compressed model: fake-quantised and for deployment."""
