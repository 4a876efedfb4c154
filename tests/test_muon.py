"""Muon: what it makes of a matrix, and what it leaves to AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from czii25d.training.muon import Muon, is_filter_bank, orthogonalize


def matrix_of(singular_values: torch.Tensor, m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix with these singular values, and the one with all of them 1."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u * singular_values.double()) @ v, u @ v


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 9), st.floats(-6, 6))
def test_singular_values_become_one_and_their_vectors_stay(m: int, n: int, seed: int, scale: float) -> None:
    rank = min(m, n)
    planted, wanted = matrix_of(10**scale * torch.logspace(0, -1, rank), m, n, seed)
    found = orthogonalize(planted.float()).double()
    u, s, v = torch.linalg.svd(found, full_matrices=False)
    assert 0.65 < s.min() and s.max() < 1.25
    assert (found * wanted).sum() / (found.norm() * wanted.norm()) > 0.94
    torch.testing.assert_close(u @ v, wanted, atol=2e-4, rtol=0)


def test_it_is_the_published_iteration() -> None:
    matrix, _ = matrix_of(torch.logspace(0, -3, 24), 24, 210)
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix.float()).double(), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalize(matrix.mT.float()).double(), x.mT, atol=1e-4, rtol=0)


def test_nothing_becomes_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(5, 7)), torch.zeros(5, 7))


@pytest.mark.parametrize(
    ("shape", "is_bank"),
    [
        ((8, 5, 3, 3, 3), True),
        ((8, 2, 3, 3), True),
        ((6, 9), True),
        ((8, 1, 7, 7), False),
        ((3, 9), False),
        ((8,), False),
        ((), False),
    ],
    ids=str,
)
def test_filter_banks(shape: tuple[int, ...], is_bank: bool) -> None:
    assert is_filter_bank(torch.zeros(shape)) == is_bank


def test_steps_of_filters_are_of_adams_size_and_all_else_is_adamws() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv3d(6, 10, (1, 2, 3)), nn.BatchNorm3d(10), nn.Conv3d(10, 10, 3, groups=10))
    twin = nn.Sequential(nn.Conv3d(6, 10, (1, 2, 3)), nn.BatchNorm3d(10), nn.Conv3d(10, 10, 3, groups=10))
    twin.load_state_dict(net.state_dict())
    start = net[0].weight.detach().clone()
    muon = Muon([{"params": net.parameters()}], lr=0.03, weight_decay=0.1)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.03, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(3):
        x = torch.randn(2, 6, 4, 5, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((net, muon), (twin, adamw)):
            twin[0].weight.data.copy_(net[0].weight.data)  # what is compared follows from the same filters
            optimizer.zero_grad()
            model(x).square().mean().backward()
        gradient = net[0].weight.grad.clone()
        muon.step()
        adamw.step()
        assert torch.equal(net[0].weight.grad, gradient), "gradients are the caller's"
        if step == 0:
            moved = net[0].weight.detach() - (1 - 0.03 * 0.1) * start
            rms = float(moved.square().mean().sqrt())
            assert rms == pytest.approx(0.03 * 0.2 * math.sqrt(36) * math.sqrt(10 / 360), rel=0.3)
            u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
            assert torch.trace(-moved.flatten(1).mT @ (u @ v)) > 0.9 * moved.norm() * math.sqrt(10)
    for name, weight in net.named_parameters():
        if name != "0.weight":
            torch.testing.assert_close(weight, dict(twin.named_parameters())[name], msg=name)
    assert not torch.allclose(net[0].weight, start)


def test_weights_without_a_gradient_stay_and_the_state_can_be_kept() -> None:
    def nets() -> tuple[nn.Linear, Muon]:
        torch.manual_seed(0)
        net = nn.Linear(7, 5)
        return net, Muon(net.parameters(), lr=0.1)

    def train(net: nn.Linear, optimizer: Muon, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            net(torch.randn(3, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    net, optimizer = nets()
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.weight, before)
    train(net, optimizer, range(4))
    half, half_optimizer = nets()
    train(half, half_optimizer, range(2))
    other, other_optimizer = nets()
    other.load_state_dict(half.state_dict())
    other_optimizer.load_state_dict(half_optimizer.state_dict())
    train(other, other_optimizer, range(2, 4))
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)


def test_a_weak_direction_is_learned_as_fast_as_a_strong_one() -> None:
    """A linear map between ill-conditioned features, whose loss hardly sees half of its directions."""
    torch.manual_seed(0)
    wanted, features = torch.randn(12, 16), torch.randn(256, 16) * torch.logspace(0, -2, 16)

    def error(create: type[torch.optim.Optimizer]) -> float:
        weight = nn.Parameter(torch.zeros(12, 16))
        optimizer = create([weight], lr=0.05, weight_decay=0.0)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            optimizer.zero_grad()
            (features @ (weight - wanted).mT).square().mean().backward()
            optimizer.step()
        return float((weight.detach() - wanted).norm() / wanted.norm())

    assert error(Muon) < 0.5 * error(torch.optim.SGD)
