"""What networks run on: torch, ONNX Runtime, OpenVINO, TensorRT; each is a `czii25d.inference.Predictor`."""
