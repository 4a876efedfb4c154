"""The 4th place's 2.5D U-Net: a 2D backbone over slabs, depth pooled between its stages, and a 3D decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from czii25d.errors import InputError
from czii25d.geometry import Shape3D
from czii25d.models.decoder import ConvBnRelu, Decoder, pixel_shuffle_3d
from czii25d.models.encoder import (
    STRIDES,
    create_backbone,
    drop_stages,
    features_by_stride,
    run_stage,
    split_stages,
    takes_channels_last,
)
from czii25d.models.slab import SlidingSlicer

MAX_DEPTH_STRIDE = 16
DEPTH_STRIDES = tuple(min(stride, MAX_DEPTH_STRIDE) for stride in STRIDES)
TILE_MULTIPLE: Shape3D = (DEPTH_STRIDES[-1], STRIDES[-1], STRIDES[-1])
HEAD_FACTOR = STRIDES[0]


class Timm3d3(nn.Module):
    """Predict heatmaps of tiles, ``(B, 1, D, H, W) -> (B, class_num, D, H, W)``, without output activation.

    Every slice enters the 2D backbone with its neighbours as channels. After each backbone stage, depth is average
    pooled; the pooled tensor is both the skip and the next stage's input. Two 3D convolutions refine each skip, a 3D
    decoder joins them, and a 3D pixel shuffle brings back the full resolution.

    **Depth.** The stride in depth follows the stride in the plane, 4, 8, 16, and stops at 16. So a voxel of a feature
    is a cube, which is what upsampling by 2 in all axes and the shuffle by 4 need; and the published slab of 16
    slices ends as a single one. These strides are relative to the tensor that comes in: the same weights are the
    same function of their surroundings at every tile shape, whatever the nominal one. Tiles of 16 n x 32 m x 32 k
    voxels work, any other is refused.

    ===== ============== ========================= ======================
    stage stride (z, xy) feature of 16 x 128 x 128 of 32 x 128 x 128
    ===== ============== ========================= ======================
    1     4, 4           4 x 32 x 32               8 x 32 x 32
    2     8, 8           2 x 16 x 16               4 x 16 x 16
    3     16, 16         1 x 8 x 8                 2 x 8 x 8
    4     16, 32         1 x 4 x 4                 2 x 4 x 4
    ===== ============== ========================= ======================

    **Fewer stages.** Two decoder widths in place of three leave out the last stage, one leaves out two: what the coarse
    stages see beyond the size of a particle costs most of the weights.

    Parameters
    ----------
    backbone
        A convolutional backbone of timm with features at strides 4, 8, 16 and 32.
    in_channels
        Slices per slab, an odd number.
    class_num
        Heatmaps.
    img_depth, img_size
        Nominal tile ``(img_depth, img_size, img_size)``, for those who cut tiles.
    decoder_channels
        Widths of the decoder's blocks, coarsest first; the backbone has one stage more than there are blocks.
    pretrained, pretrained_path, drop_path_rate
        See `czii25d.models.encoder.create_backbone`.

    Raises
    ------
    InputError
        If an argument's value is impossible, or the pretrained weights cannot be had.
    """

    def __init__(
        self,
        backbone: str = "convnext_nano.in12k_ft_in1k",
        in_channels: int = 5,
        class_num: int = 6,
        img_depth: int = 16,
        img_size: int = 128,
        decoder_channels: Sequence[int] = (1024, 768, 256),
        pretrained: bool = True,
        pretrained_path: str | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check("backbone", backbone, isinstance(backbone, str), "a model of timm")
        counts = {"in_channels": in_channels, "class_num": class_num, "img_depth": img_depth, "img_size": img_size}
        for key, value in counts.items():
            _check(key, value, _is_count(value), "a whole number of at least 1")
        _check(
            "in_channels",
            in_channels,
            in_channels % 2 == 1,
            "an odd number of slices, the middle one being the slice itself",
        )
        possible = isinstance(drop_path_rate, int | float) and 0 <= drop_path_rate < 1
        _check("drop_path_rate", drop_path_rate, possible, "a number from 0 to below 1")
        most = len(STRIDES) - 1
        _check(
            "decoder_channels",
            decoder_channels,
            isinstance(decoder_channels, Sequence)
            and 1 <= len(decoder_channels) <= most
            and all(map(_is_count, decoder_channels)),
            f"1 to {most} widths of at least 1",
        )
        self.img_depth, self.img_size = img_depth, img_size
        check_tile_shape((img_depth, img_size, img_size), "model.img_depth, model.img_size")

        trunk = create_backbone(backbone, in_channels, pretrained, pretrained_path, drop_path_rate)
        self.stem = SlidingSlicer(in_channels, takes_channels_last(trunk, in_channels))
        self.backbone = trunk
        stages = split_stages(self.backbone, backbone, in_channels, img_size)
        blocks = len(decoder_channels)
        self.stages = stages[: blocks + 1]
        drop_stages(self.backbone, stages[blocks + 1 :])
        features = features_by_stride(trunk)
        channels = [features[stride][1] for stride in STRIDES[: blocks + 1]]
        scales = [
            (DEPTH_STRIDES[i] // DEPTH_STRIDES[i - 1], STRIDES[i] // STRIDES[i - 1], STRIDES[i] // STRIDES[i - 1])
            for i in range(blocks, 0, -1)
        ]
        self.decoder = Decoder(channels, decoder_channels, scales)
        self.conv3ds = nn.ModuleList(nn.Sequential(ConvBnRelu(c, c), ConvBnRelu(c, c)) for c in channels)
        self.segmentation_head = nn.Conv3d(decoder_channels[-1], class_num * HEAD_FACTOR**3, 1)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the stages' results for the backward pass and compute the rest anew: less memory, more time."""
        self.grad_checkpointing = enable

    def forward(self, tiles: Tensor) -> Tensor:
        """Predict heatmaps, ``(B, 1, D, H, W) -> (B, class_num, D, H, W)``.

        Raises
        ------
        InputError
            If the tiles' shape is not ``(B, 1, 16 n, 32 m, 32 k)``.
        """
        if tiles.ndim != 5 or tiles.shape[1] != 1:
            raise InputError("tiles", "shape (B, 1, D, H, W)", str(tuple(tiles.shape)), "add or remove axes")
        depth = tiles.shape[2]
        check_tile_shape((depth, tiles.shape[3], tiles.shape[4]), "tiles")
        x = self.stem(tiles)  # (B * D, slab, H, W)
        features = []
        stride = 1
        depth_strides = DEPTH_STRIDES[: len(self.stages)]
        for stage, depth_stride, conv3d in zip(self.stages, depth_strides, self.conv3ds, strict=True):
            x = self._run(stage, x)
            x = _pool_depth(x, depth_stride // stride)  # (B * D / depth_stride, C, H / xy_stride, W / xy_stride)
            stride = depth_stride
            features.append(conv3d(x.unflatten(0, (-1, depth // stride)).transpose(1, 2)))
        return pixel_shuffle_3d(self.segmentation_head(self.decoder(features)), HEAD_FACTOR)

    def _run(self, stage: tuple[str, ...], x: Tensor) -> Tensor:
        run = partial(run_stage, self.backbone, stage)
        if not (self.grad_checkpointing and self.training):
            return run(x)
        return checkpoint(run, x, use_reentrant=False, context_fn=self._checkpoint_contexts)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _untracked_statistics(self.backbone)


def _check(key: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise InputError(f"model.{key}", expected, repr(value), "correct it")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_tile_shape(shape_zyx: Shape3D, where: str) -> None:
    """Raise an ``InputError`` that names the nearest possible shapes, if the network cannot take this one."""
    if all(size % multiple == 0 and size > 0 for size, multiple in zip(shape_zyx, TILE_MULTIPLE, strict=True)):
        return
    pairs = list(zip(shape_zyx, TILE_MULTIPLE, strict=True))
    below = tuple(max(size // multiple, 1) * multiple for size, multiple in pairs)
    above = tuple(max(-(-size // multiple), 1) * multiple for size, multiple in pairs)
    nearest = " or ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys((below, above)))
    raise InputError(
        where,
        f"a tile (D, H, W) in multiples of {' x '.join(map(str, TILE_MULTIPLE))}",
        " x ".join(map(str, shape_zyx)),
        f"take {nearest}",
    )


def _pool_depth(x: Tensor, factor: int) -> Tensor:
    """Average ``factor`` neighbouring slices, ``(B * D, C, H, W) -> (B * D / factor, C, H, W)``."""
    return x if factor == 1 else x.unflatten(0, (-1, factor)).mean(1)


@contextmanager
def _untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics alone, which the first of a checkpoint's two passes has updated."""
    before = [
        (norm, norm.momentum, norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None
    ]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches, count in before:
            norm.momentum = momentum
            batches.copy_(count)
