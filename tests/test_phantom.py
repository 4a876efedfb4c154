import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist, squareform
from scipy.spatial.transform import Rotation

from czii25d.contrast import contrast_of, protein_skewness
from czii25d.errors import InputError
from czii25d.particles import ParticleSet, load_particles
from czii25d.phantom import (
    STRUCTURES,
    VALUE_MEAN,
    VALUE_STD,
    Imaging,
    form_image,
    simulate_tomogram,
)
from czii25d.picks import read_picks_csv, read_picks_json
from czii25d.pipeline.phantom import make_phantom

PARTICLES = load_particles()
SPACING = (10.0, 11.0, 12.0)
PERFECT = Imaging(noise=0, drift=0, wedge_degrees=90, low_cut_angstrom=0, resolution_angstrom=20)
GROUPS = {
    "apo-ferritin": "O",
    "beta-galactosidase": "D2",
    "thyroglobulin": "C2",
    "virus-like-particle": "I",
    "beta-amylase": "C4",
}


def simulate(counts=None, look_alikes=None, imaging=PERFECT, shape=(24, 40, 56), seed=0, particles=PARTICLES):
    rng = np.random.default_rng([seed, 0])
    return simulate_tomogram(particles, shape, SPACING, counts or {}, look_alikes or {}, imaging, rng)


@pytest.mark.parametrize("name", GROUPS)
def test_structures_have_their_symmetry(name):
    centers = STRUCTURES[name][0]
    tree = cKDTree(centers)
    for rotation in Rotation.create_group(GROUPS[name]):
        distances, images = tree.query(rotation.apply(centers))
        assert distances.max() < 1e-9
        assert len(set(images)) == len(centers)


def test_no_rotation_turns_a_ribosome_into_itself():
    centers = STRUCTURES["ribosome"][0] - STRUCTURES["ribosome"][0].mean(0)
    moments = np.linalg.eigvalsh(np.cov(centers.T))
    axes = np.linalg.eigh(np.cov(centers.T))[1]
    assert np.diff(moments).min() > 0.1 * moments[0]  # so only its principal axes could be axes of symmetry
    tree = cKDTree(centers)
    for axis in axes.T:
        assert tree.query(Rotation.from_rotvec(np.pi * axis).apply(centers))[0].max() > 0.5


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_pick_is_the_centre_of_mass(name, seed):
    volume, picks = simulate({name: 1}, shape=(44, 48, 60), seed=seed)
    assert list(picks["particle"]) == [name]
    density = np.median(volume) - volume  # protein is dark
    expected = picks[["z", "y", "x"]].to_numpy(float)[0] / SPACING
    np.testing.assert_allclose(ndimage.center_of_mass(density), expected, atol=0.02)


def test_particles_differ_in_size_as_their_radii_do():
    extents = {}
    for name in STRUCTURES:
        volume, picks = simulate({name: 1}, shape=(44, 48, 60))
        grid = np.stack(np.indices(volume.shape), -1) * SPACING
        far = np.linalg.norm(grid - picks[["z", "y", "x"]].to_numpy(float)[0], axis=-1)
        density = volume.max() - volume
        extents[name] = far[density > 0.15 * density.max()].max()
    for name, extent in extents.items():
        assert extent == pytest.approx(PARTICLES[PARTICLES.channel(name)].radius, rel=0.3), name


def test_particles_neither_overlap_nor_leave_the_volume():
    counts = {"ribosome": 2, "thyroglobulin": 2, "apo-ferritin": 12}
    shape = (40, 64, 88)
    _, picks = simulate(counts, {"globule": 5, "bead": 3, "filament": 2}, shape=shape)
    assert picks["particle"].value_counts().to_dict() == counts
    radii = np.array([PARTICLES[PARTICLES.channel(name)].radius for name in picks["particle"]])
    locations = picks[["z", "y", "x"]].to_numpy(float)
    room = squareform(pdist(locations)) - radii[:, None] - radii
    assert room[~np.eye(len(picks), dtype=bool)].min() >= -1e-9
    assert (locations - radii[:, None] >= 0).all()
    assert (locations + radii[:, None] <= (np.array(shape) - 1) * SPACING).all()


def test_values_are_of_the_competition_and_depend_on_the_seed_alone():
    arguments = {"apo-ferritin": 4}, {"globule": 3}, Imaging()
    volume, picks = simulate(*arguments)
    again, picks_again = simulate(*arguments)
    other, _ = simulate(*arguments, seed=1)
    assert volume.dtype == np.float32 and volume.shape == (24, 40, 56)
    assert volume.mean() == pytest.approx(VALUE_MEAN, abs=1e-10)
    assert volume.std() == pytest.approx(VALUE_STD, rel=1e-4)
    np.testing.assert_array_equal(volume, again)
    pd.testing.assert_frame_equal(picks, picks_again)
    assert np.abs(volume - other).max() > VALUE_STD


@given(seed=st.integers(0, 99), wedge=st.floats(20, 80))
def test_the_missing_wedge_is_about_y_and_around_z(seed, wedge):
    shape = (24, 40, 56)
    imaging = Imaging(noise=0.5, drift=0, wedge_degrees=wedge, low_cut_angstrom=0)
    rng = np.random.default_rng(seed)
    image = form_image(rng.standard_normal(shape).astype(np.float32), SPACING, imaging, rng)
    power = np.abs(np.fft.fftn(image)) ** 2
    kz, _, kx = np.meshgrid(*[np.fft.fftfreq(n, d) for n, d in zip(shape, SPACING, strict=True)], indexing="ij")
    sample = 1 / (shape[0] * SPACING[0])
    tilt = np.degrees(np.arctan2(np.abs(kz), np.abs(kx)))
    is_missing = (tilt > wedge) & (
        np.abs(kz) * np.cos(np.radians(wedge)) > np.abs(kx) * np.sin(np.radians(wedge)) + sample
    )
    assert is_missing.any()
    assert power[is_missing].max() < 1e-6 * power.mean()
    is_measured = (tilt < wedge) & (np.abs(kz) > 0)
    assert power[is_measured].mean() > 1e-2 * power.mean()


def test_noise_and_contrast_are_what_their_keys_say():
    empty, rng = np.zeros((24, 40, 56), np.float32), np.random.default_rng(0)
    assert form_image(empty, SPACING, Imaging(noise=0.2, drift=0), rng).std() == pytest.approx(0.2, rel=1e-3)
    assert form_image(empty, SPACING, Imaging(noise=0, drift=0.3), rng).std() == pytest.approx(0.3, rel=1e-3)
    wavelength = 56 * 12.0 / 7
    wave = np.broadcast_to(np.cos(2 * np.pi * np.arange(56) * 12.0 / wavelength), empty.shape).astype(np.float32)
    for key in ("resolution_angstrom", "low_cut_angstrom"):
        clear = {"noise": 0, "drift": 0, "resolution_angstrom": 0, "low_cut_angstrom": 0}
        image = form_image(wave, SPACING, Imaging(**clear | {key: wavelength}), rng)
        np.testing.assert_allclose(image, wave / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": {"ribosom": 1}}, "did you mean 'ribosome'"),
        ({"counts": {"ribosome": -1}}, "counts.ribosome"),
        ({"look_alikes": {"beads": 1}}, "did you mean 'bead'"),
        ({"counts": {"ribosome": 40}}, "lower counts"),
        ({"counts": {"ribosome": 1}, "shape": (9, 40, 56)}, "raise shape"),
        ({"counts": {"ribosome": 1}, "particles": PARTICLES.first(1)}, "ribosome"),
        ({"counts": {"proteasome": 1}, "particles": ParticleSet([*PARTICLES])}, "proteasome"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        simulate(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"noise": -1.0}, {"wedge_degrees": 0.0}, {"wedge_degrees": 91.0}, {"drift": np.nan}])
def test_impossible_imaging_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Imaging(**wrong)


@pytest.fixture
def cfg(tmp_path):
    """The configuration of a miniature data set."""
    conf = OmegaConf.load(Path(__file__).parents[1] / "conf" / "phantom.yaml")
    del conf["defaults"]
    conf.particles = PARTICLES.to_config()
    conf.paths = {"input": str(tmp_path / "input")}
    conf.train_runs, conf.test_runs = ["TS_1", "TS_2"], ["TS_9"]
    conf.shape = [40, 48, 60]
    conf.counts = {"ribosome": 1, "apo-ferritin": 4, "beta-amylase": 0}
    conf.look_alikes = {"globule": 2, "bead": 2, "filament": 1}
    return conf


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_make_phantom_writes_the_competitions_layout(cfg):
    make_phantom(cfg)
    root = Path(cfg.paths.input)
    for split, run in (("train", "TS_1"), ("train", "TS_2"), ("test", "TS_9")):
        path = root / split / "static/ExperimentRuns" / run / "VoxelSpacing10.000/denoised.zarr"
        group = zarr.open_group(path, mode="r")
        assert json.loads((path / "0/.zarray").read_text())["zarr_format"] == 2
        assert (path / "0/0/0/0").is_file()
        assert [group[str(level)].shape for level in range(3)] == [(40, 48, 60), (20, 24, 30), (10, 12, 15)]
        assert group["0"].dtype == np.float32
        [multiscale] = group.attrs["multiscales"]
        assert [axis["name"] for axis in multiscale["axes"]] == ["z", "y", "x"]
        scale = multiscale["datasets"][1]["coordinateTransformations"][0]["scale"]
        assert scale == [20.024888392857143, 20.024888392857143, 20.024889075237773]
    picks = root / "train/overlay/ExperimentRuns/TS_2/Picks"
    found = {name: len(read_picks_json(picks / f"{name}.json", name)) for name in cfg.counts}
    assert found == dict(cfg.counts)
    assert not (root / "test/overlay").exists()
    solution = read_picks_csv(root / "test_solution.csv")
    assert (root / "test_solution.csv").read_text().startswith("id,experiment,particle_type,x,y,z\n")
    assert set(solution["run"]) == {"TS_9"}
    assert solution["particle"].value_counts().to_dict() == {"ribosome": 1, "apo-ferritin": 4}
    first, second = (
        zarr.open_array(root / f"train/static/ExperimentRuns/TS_{i}/VoxelSpacing10.000/denoised.zarr/0", mode="r")[:]
        for i in (1, 2)
    )
    assert np.abs(first - second).max() > 0


def test_coarser_scales_keep_the_origin(cfg):
    cfg.counts, cfg.look_alikes, cfg.train_runs = {"ribosome": 1}, {}, []
    cfg.imaging = {"noise": 0, "drift": 0, "drift_angstrom": 1, "wedge_degrees": 90, "low_cut_angstrom": 0,
                   "resolution_angstrom": 20}  # fmt: skip
    make_phantom(cfg)
    path = Path(cfg.paths.input) / "test/static/ExperimentRuns/TS_9/VoxelSpacing10.000/denoised.zarr"
    group = zarr.open_group(path, mode="r")
    centers = [np.multiply(ndimage.center_of_mass(v.max() - v), 2**i) for i in range(3) if (v := group[str(i)][:]).size]
    np.testing.assert_allclose(centers[1], centers[0], atol=0.1)
    np.testing.assert_allclose(centers[2], centers[0], atol=0.3)


def test_make_phantom_completes_what_was_interrupted(cfg):
    make_phantom(cfg)
    root = Path(cfg.paths.input)
    before = contents(root)
    untouched = root / "train/static/ExperimentRuns/TS_1/VoxelSpacing10.000/denoised.zarr/.zattrs"
    mtime = untouched.stat().st_mtime_ns
    shutil.rmtree(root / "train/static/ExperimentRuns/TS_2")
    (root / "train/overlay/ExperimentRuns/TS_2/Picks/ribosome.json").unlink()
    (root / "test_solution.csv").unlink()
    make_phantom(cfg)
    assert contents(root) == before
    assert untouched.stat().st_mtime_ns == mtime


def test_other_settings_or_real_data_are_never_overwritten(cfg):
    make_phantom(cfg)
    root = Path(cfg.paths.input)
    before = contents(root)
    cfg.imaging.noise = 0.5
    with pytest.raises(InputError, match=r"imaging.*paths\.input"):
        make_phantom(cfg)
    assert contents(root) == before
    (root / "phantom.json").unlink()
    with pytest.raises(InputError, match=r"paths\.input"):
        make_phantom(cfg)
    (root / "phantom.json").write_text("{")
    with pytest.raises(InputError, match=r"paths\.input"):
        make_phantom(cfg)


def test_settings_that_failed_at_once_can_be_mended(cfg):
    cfg.counts.ribosome = 100
    with pytest.raises(InputError, match="lower counts"):
        make_phantom(cfg)
    cfg.counts.ribosome = 1
    make_phantom(cfg)
    assert (Path(cfg.paths.input) / "test_solution.csv").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("shape", [40, 48]), ("voxel_spacing", [10, 0, 10]), ("train_runs", ["TS_9"]), ("test_runs", ["a/b"])],
)
def test_impossible_settings_name_their_key(cfg, key, value):
    cfg[key] = value
    with pytest.raises(InputError, match=key):
        make_phantom(cfg)
    assert not Path(cfg.paths.input).exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_contrast_of_a_phantom_is_told(seed: int) -> None:
    counts = {"apo-ferritin": 6, "ribosome": 4, "thyroglobulin": 5, "virus-like-particle": 3}
    rng = np.random.default_rng(seed)
    spacing = (10.0, 10.0, 10.0)
    volume, _ = simulate_tomogram(load_particles(), (48, 112, 128), spacing, counts, {"globule": 20}, Imaging(), rng)
    dark, bright = protein_skewness(volume, spacing), protein_skewness(-volume, spacing)
    assert contrast_of(dark) == "dark" and contrast_of(bright) == "bright" and bright == pytest.approx(-dark)
