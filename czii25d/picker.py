"""Networks that pick tomograms, for notebooks and other programs: what 21 does, without its files.

Settings are those of ``conf/infer/default.yaml``, whose defaults hold; what a message calls ``key infer.tile`` is the
argument ``tile``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from czii25d.data.preparation import GivenContrast, Preparation
from czii25d.data.regions import RegionTable, check_entry
from czii25d.data.tomogram import Tomogram, open_tomogram, wrap_array
from czii25d.data.volumes import MemoryVolume
from czii25d.errors import InputError
from czii25d.geometry import Spacing3D
from czii25d.inference import pick_slabs, tiles_of_region
from czii25d.inference.sliding import Progress
from czii25d.particles import ParticleSet
from czii25d.pipeline.members import predict_groups, spacing_to_predict
from czii25d.pipeline.predict import Plan, compose_plan
from czii25d.pipeline.regions import keep_selected

AnyPath: TypeAlias = str | PathLike[str]

FOR_MANY_RUNS = ("shard", "save_heatmaps")  # keys of conf/infer that say how 21 goes through its runs


class Picker:
    """One or several networks, on a device, that turn tomograms into picks; see `Picker.load`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._groups = plan.groups  # puts the networks on their device, so that what is wrong shows here

    @classmethod
    def load(
        cls,
        checkpoints: AnyPath | Sequence[AnyPath],
        *,
        runtime: str | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
        tile: Sequence[int] | None = None,
        overlap: float | None = None,
        thresholds: float | Mapping[str, float] | None = None,
        tta: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        batch_size: int | None = None,
        model: Mapping[str, Any] | None = None,
        onnx_folder: AnyPath | None = None,
        **infer: Any,
    ) -> Picker:
        """Read networks and put them on their runtime and device.

        Parameters
        ----------
        checkpoints
            A checkpoint, ONNX file or engine; a folder of them, or of trainings; or a list. Several are averaged.
        runtime, device, precision, tile, overlap, tta, weights, batch_size
            As the keys of ``conf/infer/default.yaml``, which explains them; ``None``: as it says. ``tile`` is
            ``(D, H, W)`` voxels, ``overlap`` a share of its sides, ``device`` one device.
        thresholds
            Smallest score that is a pick, in [0, 1]: for all, or by particle. ``None``: the checkpoints' own.
        model
            What builds the network (``arch, backbone, in_channels, class_num, img_depth, img_size,
            decoder_channels``), only where a checkpoint holds no configuration.
        onnx_folder
            Where the ONNX file is kept that OpenVINO and ONNX Runtime need of a checkpoint; ``None``:
            ``output/onnx``, as of 21.
        **infer
            Any other key of ``conf/infer/default.yaml`` but those for many runs: ``stride, margin, window, floor,
            nms_radius, min_distance, rescale, rescale_limit, refine, compile, provider``.

        Raises
        ------
        InputError
            If a network cannot be read, they do not fit together, or an argument is unknown or wrong.
        """
        infer |= {
            "runtime": runtime,
            "device": str(device) if isinstance(device, torch.device) else device,
            "precision": precision,
            "tile": tile,
            "overlap": overlap,
            "tta": tta,
            "weights": weights,
            "batch_size": batch_size,
        }
        for key in FOR_MANY_RUNS:
            if key in infer:
                raise InputError(f"key infer.{key}", "no key for many runs", repr(infer[key]), "leave it to 21")
        if not isinstance(infer["device"], str | None):
            raise InputError("key infer.device", "one device", repr(device), "load a Picker for each")
        keys: dict[str, Any] = {"thresholds": thresholds}
        keys |= {f"infer.{key}": value for key, value in infer.items()}
        keys |= {f"model.{key}": value for key, value in (model or {}).items()}
        given = checkpoints if isinstance(checkpoints, list | tuple) else [checkpoints]
        plan = compose_plan(
            {key: _plain(value) for key, value in keys.items()} | {"checkpoints": [str(path) for path in given]}
        )
        if onnx_folder is not None:
            plan.cache = Path(onnx_folder)
        return cls(plan)

    @property
    def particles(self) -> ParticleSet:
        """What it finds; a particle's position is its channel in `heatmap`."""
        return self._plan.particles

    @property
    def thresholds(self) -> dict[str, float]:
        """The smallest score that is a pick, by particle."""
        return dict(self._plan.thresholds)

    @property
    def voxel_spacing(self) -> Spacing3D | None:
        """Angstrom per voxel along z, y, x of the tomograms it was trained on, if that is known."""
        return self._plan.card.voxel_spacing

    def pick(
        self,
        tomogram: AnyPath | NDArray[Any],
        voxel_spacing: float | Sequence[float] | None = None,
        *,
        run: str | None = None,
        region: Mapping[str, Any] | None = None,
        contrast: GivenContrast = "dark",
        all_scores: bool = False,
        fill_missing_chunks: bool = False,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Find the particles of a tomogram: the picks that 21 finds.

        A tomogram of another voxel spacing than the networks know is resampled to theirs, within ``rescale_limit``;
        the picks are in its own angstroms.

        Parameters
        ----------
        tomogram
            An MRC, OME-Zarr or ``.npy`` file, or an array ``(D, H, W)`` of real numbers. It need not be normalised.
        voxel_spacing
            Angstrom per voxel, one number or z, y, x. ``None``: as the file states; ``.npy`` files and arrays state
            nothing and need it.
        run
            What the picks' ``run`` is; ``None``: the file's name without its suffix, ``"array"`` for an array.
        region
            Where to look, as an entry of ``regions.yaml`` (`czii25d.data.regions`): ``{"y": (0, 4000), "margin": 50}``;
            ranges and polygons in angstrom, masks as files or arrays of the tomogram's shape. Tiles outside are not
            predicted. ``None``: everywhere.
        contrast
            What protein is in the tomogram: ``"dark"``, ``"bright"``, or ``"auto"``: detected, which the log says. A
            tomogram of another contrast than the networks know is inverted.
        all_scores
            All picks above ``floor``, not only those that reach the thresholds and keep ``min_distance``.
        fill_missing_chunks
            Chunks that an OME-Zarr does not store are empty on purpose, not lost.
        progress
            Called with the number of tiles done and of all.

        Returns
        -------
        picks
            Columns ``run, particle, x, y, z`` (angstrom) and ``score``; by particle, best first.

        Raises
        ------
        InputError
            If the tomogram cannot be read or is constant, has no voxel spacing or one too far from what the networks
            know; if ``contrast="auto"`` finds none; if nothing of it lies in the region; or if the heatmaps are not
            finite.
        """
        name, opened, volume = self._prepare(tomogram, voxel_spacing, run, contrast, fill_missing_chunks)
        table = RegionTable({} if region is None else {name: check_entry(region, "region")}, "region")
        selection = table.select(name, opened.shape, opened.voxel_spacing)
        options, offset = self._groups[0].options, self._plan.card.offset_voxel
        wanted = tiles_of_region(selection, self.particles, options, volume.voxel_spacing)
        slabs = predict_groups(name, volume, self._groups, len(self.particles), progress, wanted)
        picks = pick_slabs(slabs, self.particles, options, volume.voxel_spacing, offset).assign(run=name)
        picks = keep_selected(picks, selection, name)
        return picks if all_scores else self._plan.submitted(picks).reset_index(drop=True)

    def heatmap(
        self,
        tomogram: AnyPath | NDArray[Any],
        voxel_spacing: float | Sequence[float] | None = None,
        *,
        run: str | None = None,
        contrast: GivenContrast = "dark",
        fill_missing_chunks: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Predict a tomogram's heatmaps; arguments and errors as `pick`.

        Returns
        -------
        heatmap
            ``(C, D, H, W)`` float32, a channel for each of `particles`; as a peak is high its score is. ``D, H, W`` are
            the tomogram's where it has the voxel spacing of the networks. Else they are those of the tomogram as it is
            resampled: voxel ``i`` lies at ``i`` times `voxel_spacing` angstrom, along each axis.
        """
        name, _, volume = self._prepare(tomogram, voxel_spacing, run, contrast, fill_missing_chunks)
        heatmap = np.empty((len(self.particles), *volume.shape), np.float32)
        z = 0
        for slab in predict_groups(name, volume, self._groups, len(self.particles), progress):
            depth = slab.shape[1]
            heatmap[:, z : z + depth] = slab.cpu().numpy()
            z += depth
        return heatmap

    def _prepare(
        self,
        tomogram: Any,
        voxel_spacing: Any,
        run: str | None,
        contrast: GivenContrast,
        fill_missing_chunks: bool,
    ) -> tuple[str, Tomogram, MemoryVolume]:
        spacing = _plain(voxel_spacing)
        if isinstance(tomogram, str | PathLike):
            opened = open_tomogram(Path(tomogram), spacing)
        elif isinstance(tomogram, np.ndarray):
            opened = wrap_array(tomogram, spacing, run or "array")
        else:
            raise InputError(
                "tomogram",
                "a path or a numpy array (D, H, W)",
                type(tomogram).__name__,
                "convert it with numpy.asarray",
            )
        name = run or opened.path.stem
        plan = self._plan
        target = spacing_to_predict(name, opened.voxel_spacing, [file.card for file in plan.files], plan.infer)
        preparation = Preparation(fill_missing_chunks, contrast, plan.card.contrast, target)
        return name, opened, MemoryVolume.of(*preparation.read(opened, name), plan.card.normalization)


def _plain(value: Any) -> Any:
    """Return numbers and arrays of NumPy as Python's, which a configuration can hold."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
