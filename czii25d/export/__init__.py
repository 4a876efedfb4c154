"""From checkpoints to files that other runtimes read: ONNX graphs and TensorRT engines."""
