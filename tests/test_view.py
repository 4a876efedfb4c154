"""Layers for napari, without a display."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_report import FOUND, PARTICLES, SHAPE, SPACING, THRESHOLDS, plant

from czii25d.data.predictions import PredictedRun, read_predictions, write_record
from czii25d.data.targets import create_heatmap_array, open_heatmap_array
from czii25d.errors import InputError
from czii25d.picks import make_picks
from czii25d.pipeline.app import load_config, translate_runs
from czii25d.pipeline.view import Layer, run_layers, view


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    plant("TS_1")
    return tmp_path


def layers(**options: object) -> dict[str, Layer]:
    predictions = read_predictions("output/predictions")
    found = run_layers(predictions, predictions.runs["TS_1"], **options)  # type: ignore[arg-type]
    return {layer.options["name"]: layer for layer in found}


def test_tomogram_and_picks_share_the_angstroms(work: Path) -> None:
    found = layers()
    assert list(found) == ["TS_1", "ball (3)", "rod (1)"]
    image, balls = found["TS_1"], found["ball (3)"]
    assert image.kind == "image" and image.data.shape == SHAPE and image.options["scale"] == SPACING
    low, high = image.options["contrast_limits"]
    assert low < high
    points, scores = FOUND["ball"]
    assert balls.kind == "points" and balls.options["scale"] == SPACING
    np.testing.assert_allclose(balls.data * SPACING, np.array(points[:3])[:, ::-1])
    assert balls.options["size"] * SPACING[2] == pytest.approx(2 * PARTICLES[0].radius)
    assert balls.options["border_color"] == PARTICLES[0].color and balls.options["units"] == "angstrom"
    np.testing.assert_allclose(balls.options["features"]["score"], scores[:3])
    assert balls.options["symbol"] != found["rod (1)"].options["symbol"]


def test_more_is_shown_if_it_is_there(work: Path) -> None:
    shape, coarse = (4, 6, 8), (60.0, 73.0, 84.0)  # heatmaps may be coarser than the tomogram
    path = Path("output/predictions/heatmaps/TS_1.zarr")
    array = create_heatmap_array(path, "TS_1", PARTICLES, coarse, shape)
    array[1, 2, 3, 4] = 200
    truth = pd.concat([make_picks("TS_1", "rod", [(1.0, 2.0, 3.0)]), make_picks("TS_2", "ball", [(0.0, 0.0, 0.0)])])
    found = layers(solution=truth, all_scores=True)
    assert list(found)[1:4] == [f"heatmap {name}" for name in PARTICLES.names]
    heatmap = found["heatmap rod"]
    assert heatmap.data.shape == shape and heatmap.data[2][3, 4] == np.asarray(heatmap.data)[2, 3, 4] == 200
    assert heatmap.options["colormap"] == PARTICLES[1].color and not heatmap.options["visible"]
    assert heatmap.options["scale"] == coarse and found["TS_1"].options["scale"] == SPACING
    np.testing.assert_allclose(found["true rod (1)"].data * SPACING, [[3, 2, 1]])
    assert "ball (4)" in found and "true ball (1)" not in found
    with pytest.raises(InputError, match=r"TS_1\.zarr: expected heatmaps of ball, found ball, rod, none"):
        open_heatmap_array(path, PARTICLES.first(1))
    shutil.rmtree(path / "0")
    with pytest.raises(InputError, match=r"TS_1\.zarr.*write them again"):
        layers()


def test_a_tomogram_is_opened_where_there_is_no_volume(work: Path) -> None:
    np.save("raw.npy", np.zeros(SHAPE, np.float32))
    run = PredictedRun("TS_1", None, Path("raw.npy"), (1.0, 2.0, 3.0))
    write_record(Path("output/predictions"), PARTICLES, THRESHOLDS, [], [run])
    image = layers()["TS_1"]
    assert image.options["scale"] == (1, 2, 3) and image.options["contrast_limits"][1] > 0


def test_without_napari_it_says_how_to_get_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(InputError, match=r"napari.*pip install 'napari\[all\]'"):
        view(load_config("view", ["runs=[TS_1]"]))
    with pytest.raises(InputError, match=r"TS_11.*did you mean 'TS_1'"):
        view(load_config("view", ["runs=[TS_11]"]))


def test_napari_is_told_what_it_understands_and_shows_every_layer(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[str, dict[str, Any]]] = []

    class Viewer:
        def __init__(self, title: str) -> None:
            self.dims, self.scale_bar = SimpleNamespace(), SimpleNamespace()
            viewers.append((title, self))

        def add_image(self, data: Any, **options: Any) -> None:
            added.append(("image", options))

        def add_points(self, data: Any, **options: Any) -> None:
            added.append(("points", options))

    for version, key in (("0.6.6", "out_of_slice_display"), ("0.9.2", "projection_mode"), ("0.10.0rc1", None)):
        viewers: list[tuple[str, Any]] = []
        added.clear()
        module = SimpleNamespace(__version__=version, Viewer=Viewer, run=lambda: None)
        monkeypatch.setitem(sys.modules, "napari", module)
        view(load_config("view", ["runs=TS_1"]))
        assert [title for title, _ in viewers] == ["TS_1 · czii25d"] and viewers[0][1].scale_bar.visible
        assert [kind for kind, _ in added] == ["image", *["points"] * 5]  # three true, two found
        assert all((key or "projection_mode") in options for kind, options in added if kind == "points")
        assert getattr(viewers[0][1].dims, "margin_left", None) == (None if version == "0.6.6" else (60.0, 0.0, 0.0))


@pytest.mark.parametrize("names", [["TS_1"], ["TS_1", "12"], ["it's", "a,b", "[c]", "d e", "tomo.rec{1}"]])
def test_words_are_runs(names: list[str]) -> None:
    words = translate_runs(["predictions=here", *names, "--cfg"])
    assert words[:2] == ["predictions=here", "--cfg"]
    assert list(load_config("view", [words[-1]]).runs) == names
    assert translate_runs(["runs=[a]", "-m"]) == ["runs=[a]", "-m"]
