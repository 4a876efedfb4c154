"""Export checkpoints to ONNX files and TensorRT engines, checked against torch, each described by a JSON file."""

from czii25d.pipeline.app import run
from czii25d.pipeline.export import export

if __name__ == "__main__":
    run(export, "export")
