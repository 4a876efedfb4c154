"""Networks run by ONNX Runtime, on a CPU or a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from czii25d.errors import InputError
from czii25d.geometry import Shape3D

logger = logging.getLogger(__name__)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
INSTALL = "pip install 'czii25d[export]' (or onnxruntime-gpu for a GPU)"


class OnnxRuntimeNetwork:
    """An ONNX file as a predictor; tensors are bound to the session where they lie.

    Parameters
    ----------
    path
        Input ``(batch, 1, D, H, W)`` float32 with a free batch size, output ``(batch, C, D, H, W)`` float32.
    device
        ``"cpu"`` or a CUDA device.
    provider
        ``None``: CPU, or CUDA on a GPU. ``"tensorrt"``: ONNX Runtime's own use of TensorRT.

    Raises
    ------
    InputError
        If ONNX Runtime or its provider is missing, or the file is no such graph.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu", provider: str | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise InputError("key infer.runtime", "onnxruntime installed", "it is not", INSTALL) from None
        self.device = torch.device(device)
        wanted = PROVIDERS[provider or self.device.type]
        if wanted not in ort.get_available_providers():
            found = ", ".join(ort.get_available_providers())
            raise InputError("key infer.runtime", f"onnxruntime with its {wanted}", found, INSTALL)
        index = self.device.index or 0
        options = {} if wanted == PROVIDERS["cpu"] else {"device_id": index}
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), settings, providers=[(wanted, options)])
        except Exception as error:  # of its own kinds, which it does not export
            raise InputError(path, "an ONNX graph that onnxruntime runs", str(error), "export it again") from None
        if wanted not in self._session.get_providers():  # it falls back to the CPU without a word
            raise InputError(path, f"a graph that runs on {wanted}", "one that does not", "choose another runtime")
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self.tile_shape = _tile_shape(path, self._input.shape)
        self.class_num = int(self._output.shape[1])
        self._index = index

    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)`` float32 heatmaps."""
        tiles = tiles.to(self.device, torch.float32).contiguous()
        heatmaps = torch.empty(len(tiles), self.class_num, *self.tile_shape, device=self.device)
        binding = self._session.io_binding()
        where = (self.device.type, self._index, np.float32)
        binding.bind_input(self._input.name, *where, tuple(tiles.shape), tiles.data_ptr())
        binding.bind_output(self._output.name, *where, tuple(heatmaps.shape), heatmaps.data_ptr())
        if self.device.type == "cuda":  # its stream is not torch's
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return heatmaps


def _tile_shape(path: Path | str, shape: list[Any]) -> Shape3D:
    sides = shape[2:]
    if len(sides) != 3 or shape[1] != 1 or not all(isinstance(side, int) for side in sides):
        raise InputError(path, "an input (batch, 1, D, H, W) of fixed D, H, W", str(shape), "export it again")
    return sides[0], sides[1], sides[2]
