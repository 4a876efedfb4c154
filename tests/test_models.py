"""The network: the published function, at any tile shape, on any backbone that will do."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn import functional as F

from czii25d.errors import InputError
from czii25d.models import create_model
from czii25d.models.decoder import pixel_shuffle_3d
from czii25d.models.slab import SlidingSlicer
from czii25d.models.timm3d3 import Timm3d3

FAMILIES = ("test_convnext", "test_resnet", "test_efficientnet")
NARROW = (16, 12, 8)


def tiny(backbone: str = "test_resnet", **kwargs) -> Timm3d3:
    torch.manual_seed(0)
    defaults = {"in_channels": 3, "img_size": 32, "decoder_channels": NARROW, "pretrained": False}
    net = create_model("timm3d3", backbone=backbone, **{**defaults, **kwargs})
    assert isinstance(net, Timm3d3)
    return net


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(net: nn.Module) -> None:
    """Give every weight and statistic a value of its own, so that nothing is hidden by a one or a zero."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and name != "stem.conv.weight":
            jitter = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + jitter.abs() if name.endswith("running_var") else tensor + jitter)


# ---- parity ----------------------------------------------------------------------------------------------------------


def recipe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(a)
    if name.endswith("running_mean"):
        return 0.1 * a
    if len(shape) <= 1:
        return 1 + 0.1 * a if name.endswith("weight") else 0.1 * a
    return a / np.sqrt(np.prod(shape[1:])).astype(np.float32)


@pytest.mark.data
@pytest.mark.parametrize("which", [0, 1], ids=["convnext_nano", "convnext_atto"])
def test_published_keys_shapes_and_outputs(reference_dir: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads((reference_dir / "reference/network_parity.json").read_text())[which]
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)  # all weights are replaced
    arguments = {key: wanted[key] for key in ("backbone", "in_channels", "class_num", "img_depth", "img_size")}
    net = create_model("timm3d3", **arguments, pretrained=False).eval()
    state = net.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == wanted["state_dict"]
    assert sum(parameter.numel() for parameter in net.parameters()) == wanted["parameters"]
    for key, tensor in state.items():
        if tensor.is_floating_point() and key != "stem.conv.weight":
            tensor.copy_(torch.from_numpy(recipe(key, tuple(tensor.shape))))
    tiles = np.random.default_rng(wanted["input"]["seed"]).standard_normal(wanted["input"]["shape"])
    with torch.inference_mode():
        heatmaps = net(torch.from_numpy(tiles.astype(np.float32)))
    assert list(heatmaps.shape) == wanted["output_shape"]
    np.testing.assert_allclose(heatmaps.flatten()[wanted["index"]], wanted["value"], rtol=0, atol=1e-4)
    assert float(heatmaps.mean()) == pytest.approx(wanted["mean"], abs=1e-6)
    assert float(heatmaps.std()) == pytest.approx(wanted["std"], abs=1e-6)


STAGES = {
    "test_convnext": (("stem_0", "stem_1", "stages_0"), ("stages_1",), ("stages_2",), ("stages_3",)),
    "test_resnet": (("conv1", "bn1", "act1", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",)),
    "test_efficientnet": (("conv_stem", "bn1", "blocks.0", "blocks.1"), ("blocks.2",), ("blocks.3",), ("blocks.4",)),
}


def by_the_book(net: Timm3d3, family: str, tiles: Tensor) -> Tensor:
    """The published forward pass, operation by operation, in plain memory layout."""
    batch, _, depth, *_ = tiles.shape
    x = F.conv3d(tiles, net.stem.conv.weight, padding=(net.stem.conv.weight.shape[0] // 2, 0, 0))
    x = x.transpose(1, 2).reshape(batch * depth, -1, *x.shape[3:]).contiguous()
    features = []
    for names, factor, conv3d in zip(STAGES[family], (4, 2, 2, 1), net.conv3ds, strict=False):
        for name in names:
            x = net.backbone.get_submodule(name)(x)
        volume = x.reshape(batch, depth, *x.shape[1:]).transpose(1, 2).contiguous()
        volume = F.avg_pool3d(volume, (factor, 1, 1))
        depth //= factor
        x = volume.transpose(1, 2).reshape(batch * depth, -1, *volume.shape[3:]).contiguous()
        features.append(conv3d(volume))
    y = features.pop()
    scales = ((1, 2, 2), (2, 2, 2), (2, 2, 2))[3 - len(net.decoder.blocks) :]
    for block, scale in zip(net.decoder.blocks, scales, strict=True):
        for axis, times in enumerate(scale, start=2):
            y = y.repeat_interleave(times, axis)
        y = block.conv2(block.conv1(torch.cat([y, features.pop()], 1)))
    y = net.segmentation_head(y)
    heatmaps = torch.empty(batch, y.shape[1] // 64, *(4 * n for n in y.shape[2:]))
    for c in range(heatmaps.shape[1]):
        for z, row, column in np.ndindex(4, 4, 4):
            heatmaps[:, c, z::4, row::4, column::4] = y[:, 64 * c + 16 * z + 4 * row + column]
    return heatmaps


@pytest.mark.parametrize("shape", [(1, 1, 16, 32, 64), (2, 1, 32, 64, 32)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_published_one(family: str, shape: tuple[int, ...]) -> None:
    net = tiny(family, class_num=2).eval()
    shake(net)
    with torch.no_grad():
        wanted, found = by_the_book(net, family, noise(*shape)), net(noise(*shape))
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("widths", [(12, 8), (8,)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_widths_leave_out_the_coarse_stages(family: str, widths: tuple[int, ...]) -> None:
    net = tiny(family, class_num=2, decoder_channels=widths)
    dropped = STAGES[family][len(widths) + 1 :]
    present = {name for name, _ in net.backbone.named_modules()}
    assert dropped and not present & {name for stage in dropped for name in stage}
    tiles = noise(1, 1, 32, 32, 64)
    net.train()(tiles).square().mean().backward()
    assert all(weight.grad is not None for weight in net.parameters() if weight.requires_grad)
    net.eval()
    shake(net)
    with torch.no_grad():
        torch.testing.assert_close(net(tiles), by_the_book(net, family, tiles), atol=1e-4, rtol=1e-4)


def test_state_dict_has_the_published_names() -> None:
    state = tiny("test_convnext", class_num=5).state_dict()
    assert state["stem.conv.weight"].shape == (3, 1, 3, 1, 1)
    assert state["segmentation_head.weight"].shape == (5 * 64, 8, 1, 1, 1)
    assert state["conv3ds.3.1.block.0.weight"].shape == (64, 64, 3, 3, 3)
    assert state["decoder.blocks.0.conv1.block.0.weight"].shape == (16, 64 + 48, 3, 3, 3)
    assert state["decoder.blocks.2.conv2.block.1.running_var"].shape == (8,)
    assert {key.split(".")[0] for key in state} == {"stem", "backbone", "decoder", "conv3ds", "segmentation_head"}


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_depth_pooling_follows_the_tensor() -> None:
    """Features of a tile of other sides than the nominal one, and the function does not depend on the nominal one."""
    net, other = tiny(img_depth=16, img_size=32).eval(), tiny(img_depth=32, img_size=64).eval()
    sizes: list[tuple[int, ...]] = []
    for conv3d in net.conv3ds:
        conv3d.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[2:])))
    tiles = noise(2, 1, 32, 64, 96)
    with torch.no_grad():
        found = net(tiles)
        torch.testing.assert_close(other(tiles), found, rtol=0, atol=0)
    assert sizes == [(8, 16, 24), (4, 8, 12), (2, 4, 6), (2, 2, 3)]
    assert found.shape == (2, 6, 32, 64, 96)


@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((1, 1, 20, 100, 70), "take 16 x 96 x 64 or 32 x 128 x 96"),
        ((1, 1, 16, 64, 65), "take 16 x 64 x 64 or 16 x 64 x 96"),
        ((1, 1, 8, 32, 32), "take 16 x 32 x 32$"),
        ((1, 2, 16, 32, 32), r"\(B, 1, D, H, W\), found \(1, 2, 16, 32, 32\)"),
        ((1, 16, 32, 32), r"\(B, 1, D, H, W\)"),
    ],
    ids=str,
)
def test_other_tiles_are_refused_with_those_that_would_do(shape: tuple[int, ...], cure: str) -> None:
    with pytest.raises(InputError, match=cure):
        tiny()(noise(*shape))


@pytest.mark.parametrize("in_channels", [1, 3, 7])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_slicing_is_the_one_hot_convolution(in_channels: int, channels_last: bool, batch: int) -> None:
    stem, tiles = SlidingSlicer(in_channels, channels_last), noise(batch, 1, 6, 5, 4)
    wanted = F.conv3d(tiles, stem.conv.weight, padding=(in_channels // 2, 0, 0)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(stem(tiles), wanted)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert stem(tiles).is_contiguous(memory_format=layout)


def test_another_stem_kernel_is_refused() -> None:
    stem = SlidingSlicer(3)
    with pytest.raises(InputError, match=r"stem\.conv\.weight"):
        stem.load_state_dict({"conv.weight": noise(3, 1, 3, 1, 1)})


def test_pixel_shuffle_in_a_plane_is_torchs() -> None:
    x = noise(2, 3 * 8, 4, 5, 6)
    found = pixel_shuffle_3d(x, 2)
    for z in range(2):
        channels = x.unflatten(1, (3, 2, 4))[:, :, z].flatten(1, 2)
        for d in range(4):
            assert torch.equal(found[:, :, 2 * d + z], F.pixel_shuffle(channels[:, :, d], 2))


# ---- backbones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone", [*FAMILIES, "resnet18d", "efficientnet_b0", "tf_efficientnetv2_b0", "convnext_atto", "regnetx_002"]
)
def test_backbones_train(backbone: str) -> None:
    """Every weight but the stem's gets a gradient."""
    net = tiny(backbone, in_channels=5, class_num=2).train()
    shake(net)  # some blocks start as the identity, with no gradient inside
    heatmaps = net(noise(2, 1, 16, 64, 32))
    assert heatmaps.shape == (2, 2, 16, 64, 32)
    (heatmaps - noise(2, 2, 16, 64, 32, seed=2)).square().mean().backward()
    without = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == ["stem.conv.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(family: str) -> None:
    plain = tiny(family, class_num=2, drop_path_rate=0.2).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    results = []
    for net in (plain, saving):
        torch.manual_seed(5)  # of the stochastic depth
        net(noise(3, 1, 16, 64, 32)).square().mean().backward()
        results.append(({k: w.grad for k, w in net.named_parameters() if w.requires_grad}, net.state_dict()))
    assert any(key.endswith("running_mean") for key in results[0][1])
    torch.testing.assert_close(results[0], results[1])


def test_gradient_checkpointing_keeps_less() -> None:
    def kept(net: Timm3d3) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(noise(1, 1, 16, 64, 64))
        return sum(sizes)

    net = tiny().train()
    before = kept(net)
    net.set_grad_checkpointing()
    assert kept(net) < before / 2
    net.set_grad_checkpointing(False)
    assert kept(net) == before


def test_a_replaced_module_is_the_one_that_runs() -> None:
    net, tiles = tiny().eval(), noise(1, 1, 16, 32, 32)
    with torch.no_grad():
        before = net(tiles)
        net.backbone.layer2 = nn.Sequential(net.backbone.layer2, nn.Tanh())
        assert not torch.allclose(net(tiles), before)


def test_a_backbone_that_crashes_on_channels_last_is_spared_it() -> None:
    net = tiny("fastvit_t8", in_channels=5, class_num=1).train()
    net(noise(2, 1, 16, 32, 32)).square().mean().backward()
    assert not net.stem.channels_last and tiny().stem.channels_last


def test_export_with_dynamic_batch() -> None:
    net = tiny("test_convnext").eval()
    exported = torch.export.export(net, (noise(2, 1, 16, 32, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        for batch in (1, 3):
            tiles = noise(batch, 1, 16, 32, 64)
            torch.testing.assert_close(exported.module()(tiles), net(tiles))


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backbone": "test_resnat"}, "did you mean 'test_resnet'"),
        ({"backbone": "resnet18.no_such_tag"}, "a1_in1k"),
        ({"backbone": "test_vit"}, "strides 4, 8, 16, 32, found test_vit with 16;"),
        ({"backbone": "hrnet_w18_small"}, "chain of convolutional stages"),
        ({"backbone": "test_resnet", "drop_path_rate": 1.5}, "drop_path_rate"),
        ({"backbone": "vgg11", "drop_path_rate": 0.1}, "drop_path_rate"),
        ({"backbone": None}, "model.backbone"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate"),
        ({"in_channels": 4}, "odd number"),
        ({"in_channels": -1}, "in_channels"),
        ({"class_num": 0}, "class_num"),
        ({"class_num": 2.5}, "class_num"),
        ({"class_num": True}, "class_num"),
        ({"img_depth": 20}, "model.img_depth.*16 x 32 x 32 or 32 x 32 x 32"),
        ({"img_size": "128"}, "img_size"),
        ({"decoder_channels": []}, "1 to 3 widths"),
        ({"decoder_channels": [64, 48, 32, 16]}, "1 to 3 widths"),
        ({"decoder_channels": [64, 32, 0]}, "1 to 3 widths"),
        ({"decoder_channel": [64, 32, 16]}, "did you mean 'decoder_channels'"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_clear_line(kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        tiny(**kwargs)
    assert "\n" not in str(raised.value)


def test_unknown_architecture() -> None:
    with pytest.raises(InputError, match=r"one of timm3d3.*did you mean 'timm3d3'"):
        create_model("timm3d")


# ---- pretrained weights ----------------------------------------------------------------------------------------------


def test_offline_names_the_two_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"model\.pretrained=false, or model\.pretrained_path=FILE"):
        tiny("resnet18", pretrained=True)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_file(family: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(11)
    weights = timm.create_model(family, pretrained=False).state_dict()
    path = tmp_path / f"weights.{suffix}"
    torch.save(weights, path) if suffix == "pth" else safetensors.torch.save_file(weights, path)
    net = tiny(family, in_channels=5, pretrained=True, pretrained_path=str(path))
    loaded = [tensor for key, tensor in net.backbone.state_dict().items() if key.endswith("weight")]
    first, *rest = [tensor for key, tensor in weights.items() if key.endswith("weight")]
    torch.testing.assert_close(loaded[0], torch.cat([first, first], 1)[:, :5] * 3 / 5)  # as timm adapts it
    for mine, theirs in zip(loaded[1:], rest, strict=False):
        assert torch.equal(mine, theirs)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    other, garbage = tmp_path / "other.safetensors", tmp_path / "garbage.pth"
    safetensors.torch.save_file(timm.create_model("test_convnext").state_dict(), other)
    garbage.write_bytes(b"not weights at all")
    for path, message in (
        (other, "weights of test_resnet"),
        (garbage, "weights of test_resnet"),
        (tmp_path / "absent.pth", "a file"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            tiny(pretrained=True, pretrained_path=str(path))
        assert str(path) in str(raised.value)
