"""Networks run by torch itself: eager or compiled, on a CPU or a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from czii25d.errors import InputError

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class TorchNetwork:
    """A network as a predictor.

    Parameters
    ----------
    network
        ``(B, 1, D, H, W) -> (B, C, D, H, W)``; put into evaluation mode and moved to the device.
    device, dtype
        Where, and in which autocast precision (``None``: float32).
    compile_mode
        ``None``: eager. Else compiled by ``torch.compile`` in that mode; ``"reduce-overhead"`` replays CUDA graphs.

    Raises
    ------
    InputError
        If ``compile_mode`` is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        compile_mode: CompileMode | None = None,
    ) -> None:
        if compile_mode is not None and compile_mode not in get_args(CompileMode):
            modes = ", ".join(get_args(CompileMode))
            raise InputError("key infer.compile", f"null, {modes}", repr(compile_mode), "choose one")
        self.device, self.dtype, self.compile_mode = torch.device(device), dtype, compile_mode
        self.network = network.to(self.device).eval()
        self._run = torch.compile(self.network, mode=compile_mode) if compile_mode else self.network

    @torch.inference_mode()
    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)`` float32 heatmaps."""
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            heatmaps = self._run(tiles.to(self.device))
        # CUDA graphs write every result to the same memory.
        return heatmaps.float() if self.compile_mode is None else heatmaps.float().clone()
