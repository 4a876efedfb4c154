"""Averaging weights, and networks that go on with other particles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from test_training import TINY, compose
from test_training import pytestmark as pytestmark
from test_training import work as work

from czii25d.errors import InputError
from czii25d.models import create_model
from czii25d.models.checkpoint import ModelCard, copy_weights, load_checkpoint, save_weights
from czii25d.models.soup import average_weights, greedy_soup
from czii25d.particles import load_particles
from czii25d.pipeline.app import load_config
from czii25d.pipeline.soup import judge, make_soup
from czii25d.pipeline.train import train

MODEL = {
    "backbone": "test_convnext",
    "in_channels": 3,
    "img_depth": 16,
    "img_size": 32,
    "decoder_channels": [16, 12, 8],
}


def network(seed: int, class_num: int = 6) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model(**MODEL, class_num=class_num, pretrained=False)


def card(**changes) -> ModelCard:
    own = ModelCard(
        model={"arch": "timm3d3", **MODEL, "class_num": 6}, particles=load_particles().to_config(), fold=["a", "b"]
    )
    return replace(own, **changes)


def soup(paths: list[Path], target: Path, **keys: str) -> dict:
    listed = ",".join(map(str, paths))
    return make_soup(load_config("soup", [f"checkpoints=[{listed}]", f"target={target}", *map("=".join, keys.items())]))


def test_a_soup_is_the_mean_and_forgets_thresholds(tmp_path: Path) -> None:
    nets = [network(seed) for seed in range(3)]
    nets[1].decoder.blocks[0].conv1.block[1].num_batches_tracked += 7
    thresholds = dict.fromkeys(load_particles().names, 0.4)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, net, fold in zip(paths, nets, (["a", "b"], ["b", "c"], ["b"]), strict=True):
        save_weights(path, net, card(fold=fold, thresholds=thresholds))
    report = soup(paths, tmp_path / "soup.safetensors")
    assert report == {"ingredients": list(map(str, paths))}
    found, own = load_checkpoint(tmp_path / "soup.safetensors")
    key = "segmentation_head.weight"
    expected = np.mean([net.state_dict()[key].numpy() for net in nets], axis=0)
    np.testing.assert_allclose(found.state_dict()[key].numpy(), expected, rtol=1e-6, atol=1e-8)
    assert own.thresholds is None and own.fold == ["b"], "held out is what all held out"


def test_what_does_not_fit_together_is_not_averaged(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", network(0), card())
    turned = dict(reversed(list(card().particles.items())))
    for name, changes in {
        "order": {"particles": turned},
        "spacing": {"voxel_spacing": (5.0, 5.0, 5.0)},
        "grey": {"contrast": "bright"},
    }.items():
        save_weights(tmp_path / f"{name}.safetensors", network(1), card(**changes))
        with pytest.raises(
            InputError, match=rf"{name}\.safetensors: expected the (particles|voxel_spacing|contrast) of"
        ):
            soup([tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors"], tmp_path / "soup.safetensors")
    with pytest.raises(InputError, match="at least two"):
        soup([tmp_path / "a.safetensors"], tmp_path / "soup.safetensors")
    with pytest.raises(InputError, match="method"):
        soup([tmp_path / "a.safetensors"] * 2, tmp_path / "soup.safetensors", method="hot")
    assert not (tmp_path / "soup.safetensors").exists()


def test_a_greedy_soup_takes_what_helps_and_leaves_what_does_not() -> None:
    """The score is nearness to a planted point; only the mean of the first and third lies nearer than each."""
    points = [torch.tensor([1.0, 0.2]), torch.tensor([9.0, 9.0]), torch.tensor([-1.0, 0.0])]
    states = [{"weight": point, "count": torch.tensor(3)} for point in points]
    chosen, scores, best = greedy_soup(states, lambda state: -float(state["weight"].norm()))
    assert chosen == [2, 0] and best == pytest.approx(-0.1) and best > max(scores)
    assert torch.equal(average_weights([states[i] for i in chosen])["count"], torch.tensor(3))


class Dark(torch.nn.Module):
    """Finds every particle in every dark blob."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return 0.2 * tiles.neg().clamp_min(0).expand(-1, 6, -1, -1, -1)


def test_a_greedy_soup_is_judged_in_the_regions(work: Path) -> None:
    """At low x lie two apo-ferritins and one thyroglobulin, 3 of 7 by weight: nothing elsewhere counts."""
    everywhere, there = (
        judge(load_config("soup", ["checkpoints=none", *key]), Dark(), card(fold=["TS_6_4"]))({})
        for key in ([], ["regions={TS_6_4: {x: [0, 150]}}"])
    )
    assert 0.3 < there <= 3 / 7 < everywhere


def test_a_training_keeps_its_best_and_they_make_a_soup(work: Path) -> None:
    train(compose("trainer.max_epochs=4", "data.fold_id=TS_6_4", "keep_best=2"))
    top = work / "saved_models/tiny/top"
    assert len(list(top.iterdir())) == 2
    result = run_script("13_soup.py", f"checkpoints={top}", "method=greedy", "infer.device=cpu", cwd=work)
    assert "greedy soup of" in result.stderr and "12_fit_thresholds.py" in result.stderr
    net, own = load_checkpoint(work / "saved_models/soup/soup.safetensors")
    assert own.fold == ["TS_6_4"] and own.thresholds is None
    assert bool(net(torch.zeros(1, 1, 16, 32, 32)).isfinite().all())


# ---- other particles -------------------------------------------------------------------------------------------------


def test_heads_follow_their_particles_names() -> None:
    old, new = network(0, class_num=3).eval(), network(1, class_num=2).eval()
    fresh = new.state_dict()["segmentation_head.weight"].clone()
    assert copy_weights(old, ["ribosome", "virus", "amylase"], new, ["ferritin", "ribosome"]) == ["ribosome"]
    tile = torch.randn(1, 1, 16, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(new(tile)[:, 1], old(tile)[:, 0])
    head = new.state_dict()["segmentation_head.weight"]
    assert torch.equal(head[: len(head) // 2], fresh[: len(head) // 2])


def test_a_training_goes_on_with_other_particles(work: Path) -> None:
    base = ["trainer.max_epochs=1", "data.fold_id=TS_6_4"]
    train(compose(*base, "wandb.name=first"))
    run_script("02_create_mask.py", "--class_num", "5", cwd=work)
    first = "model.resume_path=saved_models/first/last.ckpt"
    result = run_script("11_train.py", *TINY, *base, first, "model.class_num=5", "opt.lr=1e-12", cwd=work)
    assert "heads kept: apo-ferritin," in result.stderr and "dropped: beta-amylase" in result.stderr
    old, new = (load_checkpoint(work / f"saved_models/{name}/last.ckpt")[0] for name in ("first", "tiny"))
    head, kept = (net.segmentation_head.weight for net in (old, new))
    torch.testing.assert_close(kept, head.unflatten(0, (6, -1))[:5].flatten(0, 1))
    with pytest.raises(InputError, match=r"first/last\.ckpt: expected model\.in_channels 3, as in the file, found 5"):
        train(compose(*base, first, "model.class_num=5", "model.in_channels=5", "wandb.name=third"))
