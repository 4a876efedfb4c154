"""Networks run by OpenVINO, on CPUs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from czii25d.errors import InputError

INSTALL = "pip install 'czii25d[export]'"
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@cache
def _core() -> Any:
    """Return the one core of this process, which stays until its end.

    OpenVINO's CPU plugin gives the thread that loads it a stack for signal handlers and takes the memory back when it
    goes, but the stack only if it goes in that thread. A core that another thread drops (a garbage collector does)
    leaves the first thread without: the next signal, of a child that ends or Ctrl-C, kills the process without a word.
    """
    import openvino

    return openvino.Core()


class OpenVinoNetwork:
    """An ONNX file as a predictor.

    Parameters
    ----------
    path
        Input ``(batch, 1, D, H, W)`` float32 with a free batch size, output ``(batch, C, D, H, W)`` float32.
    precision
        In which it computes, whatever the graph's own; `None`: bf16 where the CPU has instructions for it, else
        fp32.

    Raises
    ------
    InputError
        If OpenVINO is missing, or the file is no such graph.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path | str, precision: Literal["fp32", "bf16", "fp16"] | None = None) -> None:
        try:
            core = _core()
        except ImportError:
            raise InputError("key infer.runtime", "openvino installed", "it is not", INSTALL) from None
        if precision is None:
            precision = "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
        self.precision = precision
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        try:
            model = core.read_model(str(path))
            d, h, w = (dimension.get_length() for dimension in model.input(0).partial_shape[2:])
            self._model = core.compile_model(model, "CPU", settings)
        except Exception as error:  # RuntimeError with a trail of C++ lines
            raise InputError(path, "an ONNX graph that OpenVINO runs", str(error), "export it again") from None
        self.tile_shape = (d, h, w)
        self.class_num = int(model.output(0).partial_shape[1].get_length())
        self._request = self._model.create_infer_request()

    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)`` float32 heatmaps."""
        array = np.ascontiguousarray(tiles.to(torch.float32).numpy())
        result = self._request.infer({0: array}, share_inputs=True)[0]
        return torch.from_numpy(np.array(result, np.float32))  # a copy: the request writes to the same memory again
