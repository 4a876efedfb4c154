from __future__ import annotations

import pytest
import torch

from czii25d.errors import InputError
from czii25d.losses import LOSSES, Mixer, balanced_mse, create_loss, draw_box, focal_mse, soft_dice, weighted_mse

PREDICTION = torch.tensor([0.2, 0.5, 0.0, 1.0]).reshape(1, 1, 1, 2, 2)
TARGET = torch.tensor([0.0, 1.0, 0.5, 1.0]).reshape(1, 1, 1, 2, 2)


def test_weighted_mse_by_hand() -> None:
    # (0.04 * 0.1 + 0.25 * 1.1 + 0.25 * 0.6 + 0) / 4
    assert weighted_mse(PREDICTION, TARGET).item() == pytest.approx(0.429 / 4)


def test_balanced_mse_by_hand() -> None:
    # on: (0.25 * 1 + 0.25 * 0.5) / 2.5; off: (0.04 * 1 + 0.25 * 0.5) / 1.5
    assert balanced_mse(PREDICTION, TARGET, 2.0).item() == pytest.approx(0.375 / 2.5 + 2 * 0.165 / 1.5)


def test_focal_mse_by_hand() -> None:
    # on: (0.125 * 1 + 0.125 * 0.5) / 2.5; off: (0.008 * 1 + 0.125 * 0.5) / 1.5
    assert focal_mse(PREDICTION, TARGET, 2.0).item() == pytest.approx(0.1875 / 2.5 + 2 * 0.0705 / 1.5)


def test_soft_dice_by_hand() -> None:
    # p t: 0.5 + 1; t²: 1 + 0.25 + 1; p² (t + 2 (1 - t)): 0.04 * 2 + 0.25 + 0 + 1
    assert soft_dice(PREDICTION, TARGET, 2.0).item() == pytest.approx(1 - 3 / (2.25 + 1.33))
    assert soft_dice(TARGET, TARGET).item() == pytest.approx(0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_without_particles_and_least_at_the_target(name: str) -> None:
    loss = create_loss(name, 1.0)
    assert torch.isfinite(loss(PREDICTION, torch.zeros_like(TARGET)))
    prediction = PREDICTION.clone().requires_grad_()
    loss(prediction, TARGET).backward()
    step = 0.05 * prediction.grad / prediction.grad.norm()
    assert loss(TARGET, TARGET) < loss(prediction - step, TARGET) < loss(prediction, TARGET)


@pytest.mark.parametrize(("name", "own"), [("weighted_mse", 0.1), ("balanced_mse", 1.0), ("soft_dice", 1.0)])
def test_a_loss_has_a_background_of_its_own(name: str, own: float) -> None:
    assert create_loss(name)(PREDICTION, TARGET) == create_loss(name, own)(PREDICTION, TARGET)
    assert create_loss(name)(PREDICTION, TARGET) != create_loss(name, 0.5)(PREDICTION, TARGET)


def test_unknown_loss_is_refused_with_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"loss\.name.*did you mean 'weighted_mse'"):
        create_loss("weightd_mse", 0.1)
    with pytest.raises(InputError, match="background"):
        create_loss("weighted_mse", -1)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.arange(4.0).reshape(4, 1, 1, 1, 1).expand(4, 1, 4, 6, 8).clone()
    return image, torch.cat([image, 10 * image], 1)


def test_mixup_blends_image_and_losses_with_one_weight() -> None:
    image, target = batch()
    mixed, targets = Mixer(mixup_prob=1.0)(image, target, torch.Generator().manual_seed(1))
    (keep, first), (give, second) = targets
    assert keep + give == pytest.approx(1) and 0 < keep < 1
    torch.testing.assert_close(mixed, keep * first[:, :1] + give * second[:, :1])
    assert not torch.equal(first, second)


def test_cutmix_pastes_the_same_box_in_image_and_target() -> None:
    image, target = batch()
    changed = 0
    for seed in range(5):
        mixed, [(weight, pasted)] = Mixer(cutmix_prob=1.0)(image, target, torch.Generator().manual_seed(seed))
        assert weight == 1
        torch.testing.assert_close(pasted[:, :1], mixed)
        torch.testing.assert_close(pasted[:, 1:], 10 * mixed)
        changed += int((mixed != image).sum())
    assert changed > 0


def test_mixing_happens_as_often_as_asked_and_repeats_with_the_seed() -> None:
    image, target = batch()
    mixer = Mixer(mixup_prob=0.5)
    generator = torch.Generator().manual_seed(0)
    mixed = sum(len(mixer(image, target, generator)[1]) == 2 for _ in range(400))
    assert 160 < mixed < 240
    first, again = (mixer(image, target, torch.Generator().manual_seed(3))[0] for _ in range(2))
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("wrong", [{"mixup_prob": -0.1}, {"mixup_prob": 0.7, "cutmix_prob": 0.7}, {"alpha": 0}])
def test_impossible_mixing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"loss\."):
        Mixer(**wrong)


def test_box_stays_inside_and_has_the_fraction() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        box = draw_box(torch.Size((8, 12, 20)), 0.125, generator)
        assert [part.stop - part.start for part in box] == [4, 6, 10]
        assert all(0 <= part.start and part.stop <= side for part, side in zip(box, (8, 12, 20), strict=True))
