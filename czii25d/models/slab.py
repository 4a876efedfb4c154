"""2.5D input: every slice with its neighbours as channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from czii25d.errors import InputError


class SlidingSlicer(nn.Module):
    """Turn a tile into a stack of slabs, one per slice; the tile's ends are padded with zeros.

    This is the convolution in depth with the frozen one-hot kernel ``conv`` that the published networks hold
    under this name; slicing gives the same and is several times faster.

    Parameters
    ----------
    in_channels
        Slices per slab, an odd number.
    channels_last
        Memory layout of the slabs. 2D and 3D convolutions take it through the whole network without a permutation.
    """

    def __init__(self, in_channels: int, channels_last: bool = True) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.conv = nn.Conv3d(1, in_channels, (in_channels, 1, 1), bias=False)
        self.conv.weight = nn.Parameter(torch.eye(in_channels)[:, None, :, None, None], requires_grad=False)
        self.register_load_state_dict_post_hook(_refuse_other_kernels)

    def forward(self, tiles: Tensor) -> Tensor:
        """Cut ``(B, 1, D, H, W)`` into ``(B * D, in_channels, H, W)``."""
        size = self.conv.out_channels
        padded = F.pad(tiles.squeeze(1), (0, 0, 0, 0, size // 2, size // 2))
        slabs = padded.unfold(1, size, 1)  # (B, D, H, W, slab)
        if self.channels_last:
            return slabs.flatten(0, 1).contiguous().movedim(-1, 1)
        return slabs.movedim(-1, 2).flatten(0, 1).contiguous()


def _refuse_other_kernels(slicer: nn.Module, _: object) -> None:
    weight = slicer.get_parameter("conv.weight").flatten(1)
    if not torch.equal(weight, torch.eye(len(weight)).to(weight)):
        raise InputError("stem.conv.weight", "the frozen one-hot kernel", "another one", "take a timm3d3 checkpoint")
