"""The networks of an ensemble: from the files named on the command line to predictors on a device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from czii25d.errors import InputError
from czii25d.export.manifest import Manifest, content_hash, read_manifest, write_manifest
from czii25d.export.onnx import export_onnx
from czii25d.geometry import Shape3D, Spacing3D, spacing_text, spacings_agree
from czii25d.inference import Ensemble, InferenceOptions, Member, Planes, Predictor, merge_slabs, predict_slabs
from czii25d.inference.sliding import Progress, Wanted
from czii25d.metrics import DEFAULT_THRESHOLD
from czii25d.models.checkpoint import ModelCard, load_checkpoint
from czii25d.models.folding import fold
from czii25d.models.timm3d3 import check_tile_shape
from czii25d.particles import ParticleSet
from czii25d.runtimes.torch import TorchNetwork

logger = logging.getLogger(__name__)

RUNTIMES = ("torch", "onnxruntime", "openvino", "tensorrt")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")
RESCALE = ("auto", "never")
AMPERE = (8, 0)  # the first compute capability that computes bf16; torch calls its emulation supported, too
GRAPH_SUFFIX, ENGINE_SUFFIX = ".onnx", ".engine"
SUFFIXES = (*CHECKPOINT_SUFFIXES, GRAPH_SUFFIX, ENGINE_SUFFIX)
INSTALL_EXPORT = "pip install 'czii25d[export]', or set infer.runtime=torch"


@dataclass(frozen=True)
class NetworkFile:
    """A checkpoint, ONNX file or engine, and what is known of it.

    Parameters
    ----------
    path, sha256
        The file.
    card
        How its heatmaps are read.
    network
        A checkpoint's, in evaluation mode on the CPU.
    manifest
        An ONNX file's or engine's.
    """

    path: Path
    sha256: str
    card: ModelCard
    network: nn.Module | None = None
    manifest: Manifest | None = None

    @property
    def is_engine(self) -> bool:
        """Whether only TensorRT can run it."""
        return self.path.suffix == ENGINE_SUFFIX

    @property
    def nominal_tile(self) -> Shape3D:
        """``(D, H, W)``: the only one of an ONNX file or engine, the trained one of a checkpoint."""
        if self.manifest is not None:
            return self.manifest.tile_shape
        return self.card.tile_shape


def find_network_files(given: Any) -> list[Path]:
    """Return the files that ``checkpoints`` names: one, a list, or those in a folder.

    Of a folder that a training wrote that is ``best.ckpt``; of a folder of such folders, each one's, whatever soups lie
    beside them. Of a folder with engines or ONNX files, these: engines before ONNX files before checkpoints. A training
    without ``best.ckpt`` is left out of several, and the log says so.
    """
    paths: list[Path] = []
    for name in given if isinstance(given, list | tuple | ListConfig) else [given]:
        path = Path(str(name))
        found = [path]
        if path.is_dir():
            there = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            found = next(
                (
                    files
                    for files in (
                        [file for file in there if file.suffix == ENGINE_SUFFIX],
                        [file for file in there if file.suffix == GRAPH_SUFFIX],
                        [file for file in there if file.name == "best.ckpt"],  # of one training, the chosen one
                        chosen_of_trainings(path),
                        there,
                    )
                    if files
                ),
                [],
            )
        if not found or not all(file.is_file() for file in found):
            raise InputError(
                "key checkpoints",
                "checkpoint, ONNX or engine files, or a folder of them",
                f"none at {path}",
                "correct the path",
            )
        paths += found
    if not paths:
        raise InputError("key checkpoints", "at least one checkpoint", "an empty list", "name one")
    return paths


def chosen_of_trainings(folder: Path) -> list[Path]:
    """Return ``best.ckpt`` of every training in a folder; name in the log those that have none."""
    chosen = sorted(folder.glob("*/best.ckpt"))
    without = {path.parent for path in folder.glob("*/last.ckpt")} - {path.parent for path in chosen}
    if chosen and without:
        names = ", ".join(sorted(path.name for path in without))
        logger.warning("%s: without %s, which has no best.ckpt; name its last.ckpt to use it", folder, names)
    return chosen


def open_network_file(path: Path, model_kwargs: Mapping[str, Any]) -> NetworkFile:
    """Read a file, and its manifest if it is an export; an engine itself is not touched yet."""
    if path.suffix in (GRAPH_SUFFIX, ENGINE_SUFFIX):
        manifest = read_manifest(path)
        return NetworkFile(path, content_hash(path), manifest.card, manifest=manifest)
    network, card = load_checkpoint(path, **model_kwargs)
    return NetworkFile(path, content_hash(path), card, network)


def agree(files: Sequence[NetworkFile]) -> tuple[ModelCard, list[list[int]]]:
    """Return the first card, and each file's channels in the first one's order.

    Raises
    ------
    InputError
        If members find other particles, decode with another offset, or expect other grey values or voxels.
    """
    first = files[0].card
    names = list(first.particles)
    for file in files:
        for what, own, common in (
            ("particles", sorted(file.card.particles), sorted(names)),
            ("offset_voxel", file.card.offset_voxel, first.offset_voxel),
            ("normalization", file.card.normalization, first.normalization),
            ("contrast", file.card.contrast, first.contrast),
        ):
            if own != common:
                raise InputError(
                    file.path, f"the {what} of {files[0].path.name}, {common}", str(own), "predict them separately"
                )
        own_spacing, first_spacing = file.card.voxel_spacing, first.voxel_spacing
        if own_spacing and first_spacing and not spacings_agree(own_spacing, first_spacing):
            raise InputError(
                file.path,
                f"the voxel spacing of {files[0].path.name}, {spacing_text(first_spacing)}",
                spacing_text(own_spacing),
                "predict them separately",
            )
    return first, [[list(file.card.particles).index(name) for name in names] for file in files]


@dataclass(frozen=True)
class Group:
    """Members that take the same tiles, as one predictor, and its share in the whole ensemble."""

    predictor: Ensemble
    options: InferenceOptions
    weight: float


def create_groups(
    infer: DictConfig,
    files: Sequence[NetworkFile],
    channels: Sequence[list[int]],
    options: Sequence[InferenceOptions],
    cache: Path,
) -> list[Group]:
    """Put every network on its device and runtime; those with the same tile share a group.

    Parameters
    ----------
    infer
        ``conf/infer``.
    channels, options
        Of each file, see `agree` and `inference_options`.
    cache
        Folder for ONNX files that a runtime needs of a checkpoint.
    """
    weights = member_weights(infer.weights, len(files))
    device = choose_device(infer.device)
    members: dict[Shape3D, list[Member]] = {}
    said = []
    for file, order, own, weight in zip(files, channels, options, weights, strict=True):
        predictor, what = create_predictor(infer, file, device, own.tile_shape, cache)
        members.setdefault(own.tile_shape, []).append(Member(predictor, order, weight))
        said.append(what)
    logger.info("%d network%s on %s: %s", len(files), "s"[: len(files) > 1], device, ", ".join(dict.fromkeys(said)))
    by_tile = {own.tile_shape: own for own in options}
    ensembles = {tile: Ensemble(group, list(infer.tta or ())) for tile, group in members.items()}
    return [Group(ensemble, by_tile[tile], ensemble.weight) for tile, ensemble in ensembles.items()]


def predict_groups(
    run: str,
    volume: Planes,
    groups: Sequence[Group],
    class_num: int,
    progress: Progress | None = None,
    wanted: Wanted | None = None,
) -> Iterator[Tensor]:
    """Yield the finite heatmaps ``(C, d, H, W)`` of a whole ensemble, slab by slab.

    Parameters
    ----------
    run
        Its name, for messages.
    progress
        Called with the number of tiles done and of all, over all networks.
    wanted
        Which tiles are predicted, see `czii25d.inference.predict_slabs`; ``None``: all.

    Raises
    ------
    InputError
        If heatmaps are not finite; and as `czii25d.inference.predict_slabs`.
    """
    tiles = dict.fromkeys(range(len(groups)), (0, 1))

    def watch(index: int) -> Progress:
        def update(done: int, of: int) -> None:
            tiles[index] = (done, of)
            if progress is not None:
                progress(sum(done for done, _ in tiles.values()), sum(of for _, of in tiles.values()))

        return update

    streams = [
        predict_slabs(volume, group.predictor, class_num, group.options, watch(index), wanted)
        for index, group in enumerate(groups)
    ]
    for _, slab in merge_slabs(streams, [group.weight for group in groups]):
        if not torch.isfinite(slab.amax()):  # a maximum passes NaN on
            raise InputError(f"run {run}", "finite heatmaps", "NaN or infinity", "set infer.precision=fp32")
        yield slab


def spacing_to_predict(run: str, own: Spacing3D, cards: Sequence[ModelCard], infer: DictConfig) -> Spacing3D | None:
    """Return the voxel spacing a run is resampled to for these networks; ``None``: it stays as it is.

    Raises
    ------
    InputError
        If a network was trained on voxels of another size than this run's, and ``infer.rescale`` or
        ``infer.rescale_limit`` forbids to resample it.
    """
    if infer.rescale not in RESCALE:
        raise InputError("key infer.rescale", " or ".join(RESCALE), repr(infer.rescale), "choose one")
    known = [card.voxel_spacing for card in cards if card.voxel_spacing]
    target = next((spacing for spacing in known if not spacings_agree(own, spacing)), None)
    if target is None:
        return None
    ratio, limit = max(max(a / b, b / a) for a, b in zip(own, target, strict=True)), infer.rescale_limit
    if infer.rescale == "never" or ratio > limit:
        expected = f"the voxel spacing the network was trained on, {spacing_text(target)}"
        cure = "set infer.rescale=auto, or train on this spacing"
        if infer.rescale != "never":
            expected += f", or one that differs by a factor of at most {limit:g}"
            cure = "see that it is right (voxel_spacing); else bin the tomogram, or train on this spacing"
        raise InputError(f"run {run}", expected, spacing_text(own), cure)
    return target


def member_weights(given: Any, count: int) -> list[float]:
    """Return ``infer.weights`` as a list, equal ones where it is null."""
    weights = [1.0] * count if given is None else list(given)
    if len(weights) != count or not all(isinstance(weight, int | float) and weight > 0 for weight in weights):
        raise InputError(
            "key infer.weights", f"{count} numbers above 0, one for each network", str(given), "correct it"
        )
    return [float(weight) for weight in weights]


def tile_of(file: NetworkFile, infer: DictConfig) -> Shape3D:
    """Return the tile a network is given: ``infer.tile``, else its own."""
    tile = shape_key(infer.tile, "infer.tile") or file.nominal_tile
    if file.manifest is not None and tile != file.nominal_tile:
        own = ", ".join(map(str, file.nominal_tile))
        raise InputError("key infer.tile", f"[{own}], the tile of {file.path.name}", str(list(tile)), "leave it null")
    if file.network is not None:
        check_tile_shape(tile, "key infer.tile")
    return tile


def choose_device(given: Any) -> torch.device:
    """Return ``infer.device``; ``auto`` is a GPU if there is one."""
    device = str(given)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith(("cpu", "cuda")) or (device.startswith("cuda") and not torch.cuda.is_available()):
        raise InputError("key infer.device", "auto, cpu, or a GPU that torch sees", device, "set infer.device=cpu")
    return torch.device(device)


def choose_runtime(given: str, file: NetworkFile, device: torch.device) -> str:
    """Return ``infer.runtime``, or the fastest that is there for this file and device.

    On a CPU that is OpenVINO, then torch for a checkpoint and ONNX Runtime for a graph; on a GPU it is torch for a
    checkpoint, ONNX Runtime for a graph and TensorRT for an engine.
    """
    if given not in ("auto", *RUNTIMES):
        raise InputError("key infer.runtime", f"auto, {', '.join(RUNTIMES)}", repr(given), "choose one")
    possible = ["tensorrt"] if file.is_engine else ["onnxruntime"]
    if not file.is_engine:
        possible = [*(["openvino"] if device.type == "cpu" else []), *possible]
        possible = possible if file.network is None else ["torch", *possible]
    if given != "auto":
        if given not in possible:
            cure = "choose one of them" if given != "tensorrt" else "make an engine of it with export_trt.py"
            raise InputError(
                "key infer.runtime", f"{' or '.join(possible)} for {file.path.name} on {device.type}", given, cure
            )
        return given
    if "openvino" in possible and find_spec("openvino") and (file.network is None or _can_export()):
        return "openvino"
    if file.network is not None or file.is_engine:
        return possible[0]
    if not find_spec("onnxruntime"):
        raise InputError(file.path, "openvino or onnxruntime to run it", "neither", "pip install 'czii25d[export]'")
    return "onnxruntime"


def _can_export() -> bool:
    return bool(find_spec("onnx") and find_spec("onnxscript"))


def choose_precision(given: str, runtime: str, device: torch.device) -> str | None:
    """Return ``infer.precision``; for ``auto`` what the device computes fastest, ``None``: OpenVINO's choice."""
    if given not in ("auto", *AUTOCAST):
        raise InputError("key infer.precision", f"auto, {', '.join(AUTOCAST)}", given, "choose one")
    if given != "auto":
        return given
    if runtime == "openvino":
        return None
    if device.type == "cuda" and runtime == "torch":
        return "bf16" if torch.cuda.get_device_capability(device) >= AMPERE else "fp16"
    return "fp32"


def create_predictor(
    infer: DictConfig, file: NetworkFile, device: torch.device, tile: Shape3D, cache: Path
) -> tuple[Predictor, str]:
    """Put one network on its runtime; returns the predictor and what to say of it."""
    runtime = choose_runtime(str(infer.runtime), file, device)
    precision: Any = choose_precision(str(infer.precision), runtime, device)
    if runtime == "torch":
        assert file.network is not None
        compiled = {False: None, None: None, True: "default"}.get(infer.compile, infer.compile)
        what = f"torch {precision}{' compiled' if compiled else ''}"
        folded = fold(file.network, "phases") if device.type == "cpu" else file.network
        return TorchNetwork(folded, device, AUTOCAST[precision], compiled), what
    if runtime == "tensorrt":
        return create_engine_predictor(file, device), f"TensorRT {file.manifest.precision if file.manifest else ''}"
    graph = file.path if file.network is None else cached_graph(file, tile, cache)
    if runtime == "openvino":
        from czii25d.runtimes.openvino import OpenVinoNetwork

        network = OpenVinoNetwork(graph, precision)
        return network, f"OpenVINO {network.precision}"
    from czii25d.runtimes.onnxruntime import OnnxRuntimeNetwork

    made_in = file.manifest.precision if file.manifest else "fp32"
    if str(infer.precision) not in ("auto", made_in):
        raise InputError(
            "key infer.precision",
            f"{made_in}, that of {graph.name}, or auto",
            str(infer.precision),
            "make a graph of that precision with export_trt.py",
        )
    return OnnxRuntimeNetwork(graph, device, infer.provider), f"ONNX Runtime {made_in}"


def create_engine_predictor(file: NetworkFile, device: torch.device) -> Predictor:
    """Load an engine that was built on this GPU with this TensorRT."""
    from czii25d.runtimes.tensorrt import TensorRTNetwork, require_tensorrt

    assert file.manifest is not None
    here, built = require_tensorrt().__version__, file.manifest.versions.get("tensorrt", "")
    portable = bool(file.manifest.options.get("version_compatible"))
    cure = "export it again here with export_trt.py"
    if here != built and not (portable and _major(built) <= _major(here)):
        raise InputError(file.path, f"an engine of TensorRT {here}", f"one of {built}", cure)
    gpu = torch.cuda.get_device_name(device)
    if gpu != file.manifest.gpu and file.manifest.options.get("hardware_compatible", "none") == "none":
        raise InputError(file.path, f"an engine of {gpu}", f"one of {file.manifest.gpu}", cure)
    return TensorRTNetwork(file.path, str(device), portable)


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def prepare_graph(infer: DictConfig, file: NetworkFile, tile: Shape3D, cache: Path) -> None:
    """Make the ONNX file that `create_predictor` will need, if it will."""
    runtime = choose_runtime(str(infer.runtime), file, choose_device(infer.device))
    if file.network is not None and runtime in ("onnxruntime", "openvino"):
        cached_graph(file, tile, cache)


def cached_graph(file: NetworkFile, tile: Shape3D, cache: Path) -> Path:
    """Return a float32 ONNX file of a checkpoint, made when it is first needed."""
    assert file.network is not None
    path = cache / f"{file.sha256[:16]}-{'x'.join(map(str, tile))}{GRAPH_SUFFIX}"
    try:
        if read_manifest(path).sources[0]["sha256"] == file.sha256:
            return path
    except InputError:
        pass
    logger.info("making an ONNX file of %s in %s (once)", file.path.name, cache)
    export_onnx(file.network, path, tile)
    source = {"checkpoint": file.path.name, "sha256": file.sha256, "weight": 1.0}
    write_manifest(path, Manifest(file.card, [source], tile, "fp32"))
    return path


def inference_options(
    infer: DictConfig, tile: Shape3D, nms_radius: Mapping[str, float] | None = None
) -> InferenceOptions:
    """Build the options from ``conf/infer``; ``nms_radius`` is the checkpoint's, used where the key is null."""
    margin = shape_key(infer.margin, "infer.margin", least=0) or (0, 0, 0)
    stride = shape_key(infer.stride, "infer.stride")
    if stride is None:
        if not 0 <= infer.overlap < 1:
            raise InputError("key infer.overlap", "a share from 0 to below 1", str(infer.overlap), "lower it")
        d, h, w = (
            max(1, round((side - 2 * rim) * (1 - infer.overlap))) for side, rim in zip(tile, margin, strict=True)
        )
        stride = (d, h, w)
    radius: Any = (
        OmegaConf.to_container(infer.nms_radius) if isinstance(infer.nms_radius, DictConfig) else infer.nms_radius
    )
    return InferenceOptions(
        tile,
        stride,
        infer.window,
        margin,
        infer.batch_size,
        nms_radius if radius is None else radius,
        infer.floor,
        infer.refine,
    )


def shape_key(value: Any, key: str, least: int = 1) -> Shape3D | None:
    """Return a ``[D, H, W]`` key as a tuple."""
    if value is None:
        return None
    sides = list(value) if isinstance(value, list | tuple | ListConfig) else [value]
    if len(sides) != 3 or not all(isinstance(side, int) and side >= least for side in sides):
        raise InputError(f"key {key}", "[D, H, W] in whole voxels", str(value), "give three numbers")
    d, h, w = sides
    return d, h, w


def choose_thresholds(given: Any, cards: Sequence[ModelCard], particles: ParticleSet) -> dict[str, float]:
    """Return each particle's threshold: what the key says, else the mean of the checkpoints', else the default."""
    if isinstance(given, int | float):
        return dict.fromkeys(particles.names, float(given))
    if given is not None and not isinstance(given, Mapping | DictConfig):
        raise InputError("key thresholds", "a number, or numbers by particle", repr(given), "correct it")
    thresholds, unknown = {}, []
    for name in particles.names:
        known = [card.thresholds[name] for card in cards if card.thresholds and name in card.thresholds]
        thresholds[name] = sum(known) / len(known) if known else DEFAULT_THRESHOLD
        unknown += [] if known or name in (given or ()) else [name]
    if unknown:
        logger.info(
            "no checkpoint holds a threshold for %s: %g; see thresholds=...", ", ".join(unknown), DEFAULT_THRESHOLD
        )
    for name, value in (given or {}).items():
        particles.channel(str(name))
        if not isinstance(value, int | float):
            raise InputError(f"key thresholds.{name}", "a number", repr(value), "correct it")
        thresholds[str(name)] = float(value)
    return thresholds
