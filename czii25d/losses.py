"""Losses between a predicted and a target heatmap, and the mixing of samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from czii25d.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Loss = Callable[["Tensor", "Tensor"], "Tensor"]


def weighted_mse(prediction: Tensor, target: Tensor, background: float = 0.1) -> Tensor:
    """Mean of ``(p - t)^2 (t + background)``: the 4th place's loss, with ``background = 0.1``.

    Parameters
    ----------
    prediction, target
        ``(B, C, D, H, W)``; the target in [0, 1].
    background
        Weight of a voxel whose target is 0, beside 1 for a centre.
    """
    return ((prediction - target).square() * (target + background)).mean()


def balanced_mse(prediction: Tensor, target: Tensor, background: float = 1.0) -> Tensor:
    """``sum(se t) / sum(t) + background * sum(se (1 - t)) / sum(1 - t)``, the loss of the 4th place's second half.

    Particles and background weigh the same however few voxels the particles fill. Shapes as `weighted_mse`.
    """
    return _balanced((prediction - target).square(), target, background)


def focal_mse(prediction: Tensor, target: Tensor, background: float = 1.0) -> Tensor:
    """As `balanced_mse`, but of ``|p - t|^3``: voxels that are nearly right count less.

    The regression form of the focal loss (Yang et al. 2021, arXiv:2102.09554), with the error itself as the factor.
    """
    return _balanced((prediction - target).abs().pow(3), target, background)


def soft_dice(prediction: Tensor, target: Tensor, background: float = 1.0) -> Tensor:
    """``1 - 2 sum(p t) / (sum(t^2) + sum(p^2 (t + background (1 - t))))`` over the batch and all classes.

    The squared form of Milletari et al. 2016 (doi:10.1109/3DV.2016.79), which is 0 at ``p = t``, at ``background = 1``.
    """
    weight = target + background * (1 - target)
    size = target.square().sum() + (prediction.square() * weight).sum()
    return 1 - 2 * (prediction * target).sum() / size.clamp_min(1.0)


def _balanced(error: Tensor, target: Tensor, background: float) -> Tensor:
    on_particles = (error * target).sum() / target.sum().clamp_min(1.0)
    off_particles = (error * (1 - target)).sum() / (1 - target).sum().clamp_min(1.0)
    return on_particles + background * off_particles


LOSSES: dict[str, Callable[..., Tensor]] = {
    "weighted_mse": weighted_mse,
    "balanced_mse": balanced_mse,
    "focal_mse": focal_mse,
    "soft_dice": soft_dice,
}


def on_labelled(loss: Loss) -> Loss:
    """Return the loss of the voxels whose target is known, which is not NaN; 0 where none is.

    What nobody has labelled is neither particle nor background.
    """

    def labelled_loss(prediction: Tensor, target: Tensor) -> Tensor:
        is_labelled = ~torch.isnan(target)
        if not is_labelled.any():
            return prediction.sum() * 0
        return loss(prediction[is_labelled], target[is_labelled])

    return labelled_loss


def create_loss(name: str, background: float | None = None) -> Loss:
    """Return the loss called ``name`` as a function of prediction and target; ``background=None`` is its own.

    Raises
    ------
    InputError
        If there is no such loss, or the background weight is negative.
    """
    if name not in LOSSES:
        raise InputError(
            "key loss.name",
            f"one of {', '.join(LOSSES)}",
            f"'{name}'{did_you_mean(name, LOSSES)}",
            "choose one",
        )
    if background is not None and background < 0:
        raise InputError("key loss.background", "a weight of at least 0", str(background), "raise it")
    loss = LOSSES[name]
    return loss if background is None else partial(loss, background=background)


class Mixer:
    """Mixes each batch with a shuffled copy of itself: mixup, cutmix, or nothing.

    Mixup blends whole tiles (Zhang et al. 2018, arXiv:1710.09412); cutmix pastes a box of the partner (Yun et al.
    2019, arXiv:1905.04899). One coefficient is drawn per batch, as the 4th place does; for mixup the *losses*
    are blended, not the targets.

    Parameters
    ----------
    mixup_prob, cutmix_prob
        Probability that a batch is mixed either way; together at most 1.
    alpha
        The coefficient is drawn from Beta(alpha, alpha).
    """

    def __init__(self, mixup_prob: float = 0.0, cutmix_prob: float = 0.0, alpha: float = 1.0) -> None:
        if not (0 <= mixup_prob and 0 <= cutmix_prob and mixup_prob + cutmix_prob <= 1):
            raise InputError(
                "keys loss.mixup, loss.cutmix",
                "probabilities that add up to at most 1",
                f"{mixup_prob} and {cutmix_prob}",
                "lower one",
            )
        if alpha <= 0:
            raise InputError("key loss.mix_alpha", "a number above 0", str(alpha), "raise it (1 is uniform)")
        self.mixup_prob, self.cutmix_prob, self.alpha = mixup_prob, cutmix_prob, alpha

    def __call__(
        self, image: Tensor, target: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """Mix a batch.

        Parameters
        ----------
        image, target
            ``(B, 1, D, H, W)`` and ``(B, C, D, H, W)``.
        generator
            On the CPU; all that is drawn comes from it.

        Returns
        -------
        image, weighted_targets
            The mixed image, and the targets whose losses add up with these weights.
        """
        draw = float(torch.rand((), generator=generator))
        if draw >= self.mixup_prob + self.cutmix_prob or len(image) < 2:
            return image, [(1.0, target)]
        concentration = torch.tensor([self.alpha, self.alpha])
        gammas = torch._standard_gamma(concentration, generator=generator)
        keep = float(gammas[0] / gammas.sum())
        partner = torch.randperm(len(image), generator=generator).to(image.device)
        if draw < self.mixup_prob:
            mixed = keep * image + (1 - keep) * image[partner]
            return mixed, [(keep, target), (1 - keep, target[partner])]
        box = draw_box(image.shape[2:], 1 - keep, generator)
        mixed, pasted = image.clone(), target.clone()
        mixed[(slice(None), slice(None), *box)] = image[partner][(slice(None), slice(None), *box)]
        pasted[(slice(None), slice(None), *box)] = target[partner][(slice(None), slice(None), *box)]
        return mixed, [(1.0, pasted)]


def draw_box(shape: torch.Size, fraction: float, generator: torch.Generator) -> tuple[slice, slice, slice]:
    """Draw a box that fills about ``fraction`` of a volume of that shape, anywhere inside it."""
    sides = [max(1, round(side * fraction ** (1 / 3))) for side in shape]
    starts = [
        int(torch.randint(size - side + 1, (), generator=generator)) for size, side in zip(shape, sides, strict=True)
    ]
    z, y, x = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return z, y, x
