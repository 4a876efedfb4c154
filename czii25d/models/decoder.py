"""The 3D half: convolutions, upsampling with skips, and the shuffle of channels into voxels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scale3D = tuple[int, int, int]


class ConvBnRelu(nn.Module):
    """A 3 x 3 x 3 convolution without bias, batch normalisation, ReLU; the shape stays."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, D, H, W) -> (B, C', D, H, W)``."""
        return self.block(x)


class DecoderBlock(nn.Module):
    """Upsample to the next finer feature, join it, and convolve twice.

    Parameters
    ----------
    in_channels, skip_channels, out_channels
        Of the coarser feature, the finer one, and what comes out.
    scale
        Upsampling along z, y, x.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, scale: Scale3D) -> None:
        super().__init__()
        self.in_channels, self.scale = in_channels, tuple(map(float, scale))
        self.conv1 = ConvBnRelu(in_channels + skip_channels, out_channels)
        self.conv2 = ConvBnRelu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` and a skip of ``scale`` times its size ``-> (B, C', D', H', W')``."""
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return self.conv2(self.conv1(torch.cat((x, skip), 1)))


class Decoder(nn.Module):
    """Go from the coarsest feature to the finest.

    Parameters
    ----------
    skip_channels
        Of the features, finest first.
    out_channels
        Of the blocks, coarsest first; one fewer than features.
    scales
        Upsampling of each block along z, y, x.
    """

    def __init__(self, skip_channels: Sequence[int], out_channels: Sequence[int], scales: Sequence[Scale3D]) -> None:
        super().__init__()
        *skips, deepest = skip_channels
        in_channels = (deepest, *out_channels)
        self.blocks = nn.ModuleList(
            DecoderBlock(*sizes) for sizes in zip(in_channels[:-1], reversed(skips), out_channels, scales, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Join features ``(B, C_i, D_i, H_i, W_i)``, finest first, to one ``(B, C, D_0, H_0, W_0)`` of the finest."""
        *skips, x = features
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, skip)
        return x


def pixel_shuffle_3d(x: Tensor, factor: int) -> Tensor:
    """Turn ``(B, C * factor^3, D, H, W)`` into ``(B, C, D * factor, H * factor, W * factor)``.

    The 3D form of Shi et al. (2016), doi:10.1109/CVPR.2016.207: channel ``((c * f + z) * f + y) * f + x`` becomes
    the voxel at offset ``z, y, x`` of channel ``c``.
    """
    depth, height, width = x.shape[2:]
    x = x.unflatten(1, (-1, factor, factor, factor)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C, D, f, H, f, W, f)
    return x.reshape(-1, x.shape[1], depth * factor, height * factor, width * factor)
