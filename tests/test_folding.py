"""A folded network is the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_export import TILE, network
from torch import nn
from torch.nn import functional as F

from czii25d.models.decoder import DecoderBlock
from czii25d.models.folding import fold

FORMS: Any = ["transposed", "phases"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 2, 2), (2, 1, 2)])
def test_a_convolution_of_an_upsampled_tensor_is_one_of_the_coarse_one(scale: Any, form: Any) -> None:
    torch.manual_seed(0)
    block = DecoderBlock(5, 3, 4, scale).eval()
    x = torch.randn(2, 5, 2, 3, 4)
    skip = torch.randn(2, 3, *(side * factor for side, factor in zip(x.shape[2:], scale, strict=True)))
    folded = fold(nn.ModuleList([block]), form)[0]  # type: ignore[index]
    with torch.inference_mode():
        torch.testing.assert_close(folded(x, skip), block(x, skip), atol=2e-6, rtol=0)
        upsampled = F.interpolate(x, scale_factor=tuple(map(float, scale)))
        conv = nn.functional.conv3d(upsampled, block.conv1.block[0].weight[:, :5], padding=1)
        assert folded.upsampled(x).shape == conv.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet"])
def test_a_folded_network_is_the_same_function_at_any_tile(backbone: str, form: Any) -> None:
    net = network(3, backbone=backbone)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    folded = fold(net, form)
    for tile in (TILE, (32, 32, 64)):
        tiles = torch.randn(2, 1, *tile)
        with torch.inference_mode():
            expected, found = net(tiles), folded(tiles)
        assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    assert not any(isinstance(module, nn.BatchNorm3d | DecoderBlock) for module in folded.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
