"""Checkpoints: what was saved comes back, what is foreign is understood, and what is hostile does nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from timm.utils import ModelEmaV3
from torch import nn

from czii25d.errors import InputError
from czii25d.geometry import PUBLISHED_OFFSET_VOXEL
from czii25d.models import create_model
from czii25d.models.checkpoint import ModelCard, load_checkpoint, load_model, save_weights
from czii25d.particles import load_particles

MODEL: dict[str, Any] = {
    "arch": "timm3d3",
    "backbone": "test_convnext",
    "in_channels": 3,
    "class_num": 5,
    "img_depth": 16,
    "img_size": 32,
    "decoder_channels": [16, 12, 8],
}
TILES = torch.randn((1, 1, 16, 32, 64), generator=torch.Generator().manual_seed(1))


def network(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(**{**MODEL, "pretrained": False, **kwargs}).eval()


def model_card(**kwargs: Any) -> ModelCard:
    names = load_particles().names[:5]
    defaults: dict[str, Any] = {
        "model": MODEL,
        "particles": load_particles().first(5).to_config(),
        "voxel_spacing": (10.0, 7.5, 8.5),
        "thresholds": {name: 0.1 * (i + 1) for i, name in enumerate(names)},
        "nms_radius": {names[0]: 61.5},
        "fold": ["TS_6_4"],
    }
    return ModelCard(**{**defaults, **kwargs})


def lightning_file(path: Path, net: nn.Module, averaged: nn.Module | None, **entries: Any) -> Path:
    """Write what Lightning writes for a module with the attributes ``model`` and ``model_ema``."""
    module = nn.Module()
    module.model = net
    if averaged is not None:
        module.model_ema = ModelEmaV3(averaged)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save(
        {"epoch": 3, "state_dict": module.state_dict(), "optimizer_states": [optimizer], "loops": {}, **entries}, path
    )
    return path


def same_function(one: nn.Module, other: nn.Module) -> bool:
    assert not one.training and not other.training
    with torch.no_grad():
        return torch.equal(one(TILES), other(TILES))


# ---- our own files ---------------------------------------------------------------------------------------------------


def test_own_checkpoint_comes_back_with_its_average_and_card(tmp_path: Path) -> None:
    card = model_card()
    path = lightning_file(tmp_path / "best.ckpt", network(1).train(), network(2), czii25d=card.to_dict())
    net, found = load_checkpoint(path)
    assert found == card
    assert same_function(net, network(2)) and not same_function(net, network(1))
    assert same_function(load_model(str(path)), net)


def test_without_an_average_the_weights_themselves(tmp_path: Path) -> None:
    path = lightning_file(tmp_path / "best.ckpt", network(1), None, czii25d=model_card().to_dict())
    assert same_function(load_model(path), network(1))


def test_safetensors_come_back(tmp_path: Path) -> None:
    path, card = tmp_path / "net.safetensors", model_card(normalization="global", offset_voxel=-0.5)
    save_weights(path, network(4).to(memory_format=torch.preserve_format), card)
    net, found = load_checkpoint(path)
    assert found == card and same_function(net, network(4))
    assert [item.name for item in tmp_path.iterdir()] == ["net.safetensors"]


def test_keywords_may_repeat_the_card_or_change_the_nominal_tile(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, network(), model_card())
    net, card = load_checkpoint(path, **{**MODEL, "decoder_channels": (16, 12, 8), "img_size": 64, "img_depth": 32})
    assert (net.img_depth, net.img_size) == (32, 64) == (card.model["img_depth"], card.model["img_size"])
    assert load_checkpoint(path, backbone="test_convnext.r160_in1k")[1].particles == card.particles


@pytest.mark.parametrize(
    "kwargs",
    [{"class_num": 6}, {"backbone": "test_resnet"}, {"in_channels": 5}, {"decoder_channels": [16, 12, 9]}],
    ids=str,
)
def test_keywords_that_contradict_the_card_are_refused(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, network(), model_card())
    (key,) = kwargs
    with pytest.raises(InputError, match=rf"net\.safetensors: expected model\.{key}"):
        load_model(path, **kwargs)


# ---- foreign files ---------------------------------------------------------------------------------------------------


def assert_published(card: ModelCard) -> None:
    assert card.offset_voxel == PUBLISHED_OFFSET_VOXEL == -0.5
    assert card.normalization == "global"
    assert tuple(card.particles) == load_particles().names[:5]
    assert card.voxel_spacing is None and card.thresholds is None


def test_published_lightning_file(tmp_path: Path) -> None:
    path = lightning_file(tmp_path / "published.ckpt", network(1), network(2))
    net, card = load_checkpoint(path, **MODEL)
    assert same_function(net, network(2))
    assert_published(card)
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    with pytest.raises(InputError, match="keywords backbone, in_channels, class_num"):
        load_model(path)
    with pytest.raises(InputError, match="keywords in_channels"):
        load_model(path, backbone="test_convnext", class_num=5)


@pytest.mark.parametrize("kind", ["omegaconf", "omegaconf section", "dict", "arguments"])
def test_published_configuration_is_read(tmp_path: Path, kind: str) -> None:
    ran: list[str] = []
    OmegaConf.register_new_resolver("spy", lambda *_: ran.append("spy") or "test_resnet", replace=True)
    section = {key: value for key, value in MODEL.items() if key != "img_size"}
    tree = {
        "model": {**section, "img_size": "${spy:1}", "ema": True},
        "data": {"runs": ["a", 1, None], "home": "${oc.env:HOME}"},
    }
    config = OmegaConf.create(tree)
    hyper_parameters = {
        "omegaconf": config,
        "omegaconf section": {"cfg": config, "lr": 0.1},
        "dict": {"cfg": tree},
        "arguments": {**section, "lr": 0.1},
    }[kind]
    entries = {"hyper_parameters": hyper_parameters, "hparams_type": type(config), "hparams_name": "cfg"}
    path = lightning_file(tmp_path / "published.ckpt", network(1), network(2), **entries)
    net, card = load_checkpoint(path)
    assert same_function(net, network(2))
    assert_published(card)
    assert net.img_size == 128, "the interpolation is left out, not resolved"
    assert not ran
    with pytest.raises(InputError, match=r"model\.class_num 5, as in the file, found 6"):
        load_model(path, class_num=6)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_state_dict(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network(3).half().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    net, card = load_checkpoint(path, **MODEL)
    assert next(net.parameters()).dtype == torch.float32
    assert same_function(net, network(3).half().float())
    assert_published(card)


def test_safetensors_without_a_card(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network(3).state_dict(), path)
    net, card = load_checkpoint(path, **MODEL)
    assert same_function(net, network(3))
    assert_published(card)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network().state_dict(), path)
    with pytest.raises(InputError, match=r"model\.class_num 6, found weights for 5; set model\.class_num=5"):
        load_model(path, **{**MODEL, "class_num": 6})
    with pytest.raises(InputError, match=r"stem\.conv\.weight is \[3, 1, 3, 1, 1\] for \[5, 1, 5, 1, 1\]"):
        load_model(path, **{**MODEL, "in_channels": 5})
    with pytest.raises(InputError, match=r"is missing; .* and \d+ more; correct model\.backbone"):
        load_model(path, **{**MODEL, "backbone": "test_resnet"})
    state = network().state_dict()
    torch.save({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="extra is unknown"):
        load_model(path, **MODEL)


# ---- hostile and damaged files ---------------------------------------------------------------------------------------


class RunsWhenLoaded:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("where", ["bare pickle", "state_dict", "hyper_parameters", "hidden in a config"])
@pytest.mark.parametrize("function", ["os.mkdir", "eval"])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, where: str, function: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    evil = (
        RunsWhenLoaded(os.mkdir, str(ran))
        if function == "os.mkdir"
        else RunsWhenLoaded(eval, f"__import__('os').mkdir({str(ran)!r})")
    )
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        state = {**network().state_dict(), **({"evil": evil} if where == "state_dict" else {})}
        config = OmegaConf.create({"model": MODEL}, flags={"allow_objects": True})
        if where == "hidden in a config":
            config.evil = evil
        torch.save({"state_dict": state, "hyper_parameters": config if "config" in where else {"x": evil}}, path)
    with pytest.raises(InputError, match=r"evil\.ckpt: .* would run code when loaded \(.*(mkdir|eval)\)") as raised:
        load_model(path, **MODEL)
    assert "\n" not in str(raised.value)
    assert not ran.exists()
    with pytest.raises((FileExistsError, AttributeError, KeyError, TypeError, pickle.UnpicklingError)):
        ran.mkdir()  # the trap is set: loading without the guard would spring it
        torch.load(path, weights_only=False) if where != "bare pickle" else pickle.loads(path.read_bytes())


def damaged(path: Path, how: str) -> None:
    if how == "a folder":
        path.mkdir()
    elif how == "an empty one":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello, these are no weights")
    elif how == "random":
        path.write_bytes(np.random.default_rng(0).bytes(4096))
    elif how == "truncated":
        torch.save(network().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "a zip":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    elif how == "no weights":
        torch.save({"state_dict": {}}, path)
    elif how == "numbers":
        torch.save({"epoch": 3, "loss": 0.5}, path)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    "how",
    [
        *("nothing there", "a folder", "an empty one", "text", "random", "truncated"),
        *("a tensor", "a zip", "no weights", "numbers"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path: Path, how: str, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    damaged(path, how)
    with pytest.raises(InputError) as raised:
        load_model(path, **MODEL)
    assert str(raised.value).startswith(f"{path}: expected ") and "\n" not in str(raised.value)
    if how in ("nothing there", "a folder", "an empty one"):
        assert f"found {how}" in str(raised.value)


def test_loading_leaves_the_allow_list_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load_model(lightning_file(tmp_path / "a.ckpt", network(), None), **MODEL)
    assert set(torch.serialization.get_safe_globals()) == before


# ---- the card --------------------------------------------------------------------------------------------------------


def test_card_survives_json_and_numpy_values() -> None:
    card = model_card(
        voxel_spacing=tuple(np.float32([10.0, 7.5, 8.5])),
        thresholds={"ribosome": np.float64(0.25)},
        model={**MODEL, "decoder_channels": (16, 12, 8)},
    )
    found = ModelCard.from_dict(json.loads(json.dumps(card.to_dict())))
    assert found == model_card(thresholds={"ribosome": 0.25})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**MODEL, "class_num": 6}}, "class_num 5, one for each of apo-ferritin"),
        ({"model": {**MODEL, "arch": "unet"}}, "an arch of timm3d3"),
        ({"particles": {"ribosome": {"radius": -3}}}, "radius above 0"),
        ({"voxel_spacing": (10.0, 0.0, 10.0)}, "voxel_spacing: expected 3 above 0"),
        ({"voxel_spacing": (10.0, 10.0)}, "voxel_spacing"),
        ({"normalization": "minmax"}, "one of volume, global"),
        ({"offset_voxel": float("nan")}, "offset_voxel"),
        ({"thresholds": {"vesicle": 0.5}}, "thresholds: expected numbers for some of apo-ferritin"),
        ({"nms_radius": {"ribosome": "wide"}}, "nms_radius"),
    ],
    ids=str,
)
def test_impossible_cards_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_card(**change)


def test_a_card_of_before_contrast_was_recorded_knows_dark_protein() -> None:
    values = ModelCard(MODEL, load_particles().first(MODEL["class_num"]).to_config(), contrast="bright").to_dict()
    assert ModelCard.from_dict(values).contrast == values.pop("contrast") == "bright"
    assert ModelCard.from_dict(values).contrast == "dark"
    with pytest.raises(InputError, match="model card: contrast: expected one of dark, bright, found 'light'"):
        ModelCard.from_dict({**values, "contrast": "light"})


@pytest.mark.parametrize("content", [{"model": MODEL}, "text", None], ids=str)
def test_what_is_no_card_is_refused(content: Any) -> None:
    with pytest.raises(InputError, match=r"a\.ckpt: expected a model card with czii25d_version"):
        ModelCard.from_dict(content, "a.ckpt")
