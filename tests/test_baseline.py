import numpy as np
import pytest

from czii25d.baseline import find_blobs
from czii25d.particles import Particle, ParticleSet

SPACING = (10.0, 11.0, 12.0)
SHAPE = (24, 40, 56)
PARTICLES = ParticleSet([Particle("small", 40.0), Particle("large", 75.0)])
SMALL = [(100.0, 300.0, 80.0), (403.0, 95.0, 171.0)]  # x, y, z angstrom
LARGE = [(300.0, 251.0, 113.0)]


def balls(centers_and_radii):
    """Dark solid balls with a soft rim."""
    z, y, x = (np.arange(n) * d for n, d in zip(SHAPE, SPACING, strict=True))
    volume = np.zeros(SHAPE)
    for (cx, cy, cz), radius in centers_and_radii:
        distance = np.sqrt((z[:, None, None] - cz) ** 2 + (y[:, None] - cy) ** 2 + (x - cx) ** 2)
        volume -= np.clip((radius - distance) / 10 + 0.5, 0, 1)
    return volume


@pytest.fixture(scope="module")
def volume():
    noise = np.random.default_rng(0).normal(0, 0.05, SHAPE)
    return balls([(c, 40.0) for c in SMALL] + [(c, 75.0) for c in LARGE]) + noise


@pytest.mark.parametrize("factor", [1.0, 7e-6])
def test_planted_balls_are_the_best_of_their_size(volume, factor):
    picks = find_blobs(volume.astype(np.float32) * factor + 5e-8, SPACING, PARTICLES)
    assert list(picks.columns) == ["particle", "x", "y", "z", "score"]
    large = picks[picks["particle"] == "large"]
    np.testing.assert_allclose(large[["x", "y", "z"]].to_numpy()[0], LARGE[0], atol=6)
    small = picks[picks["particle"] == "small"]
    for center in SMALL:
        distance = np.linalg.norm(small[["x", "y", "z"]].to_numpy() - center, axis=1)
        assert distance.min() < 6
    for particle in PARTICLES:
        found = picks[picks["particle"] == particle.name]
        assert (np.diff(found["score"]) <= 0).all()
        assert found["score"].min() >= 1


def test_bright_balls_are_no_particles(volume):
    picks = find_blobs(-volume, SPACING, PARTICLES)
    for center in SMALL + LARGE:
        distance = np.linalg.norm(picks[["x", "y", "z"]].to_numpy() - center, axis=1)
        assert distance.min() > 20


def test_a_constant_volume_has_none():
    picks = find_blobs(np.ones(SHAPE, np.float32), SPACING, PARTICLES)
    assert picks.empty
    assert list(picks.columns) == ["particle", "x", "y", "z", "score"]
