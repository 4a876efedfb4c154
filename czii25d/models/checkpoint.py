"""Checkpoints: weights, and a card that says how to rebuild the network and how to read its heatmaps."""

from __future__ import annotations

import inspect
import json
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from czii25d.contrast import Contrast
from czii25d.data.volumes import Normalization
from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import PUBLISHED_OFFSET_VOXEL, Shape3D, Spacing3D
from czii25d.models import ARCHITECTURES, create_model
from czii25d.particles import ParticleSet, load_particles

CARD_KEY = "czii25d"
ADDED = {"contrast"}  # fields that the cards of earlier versions lack
WEIGHT_PREFIXES = ("model_ema.module.", "model.", "")  # the average first: it is what was judged
SHAPING_KEYS = ("arch", "backbone", "in_channels", "class_num", "decoder_channels")
HEAD_PREFIX = "segmentation_head."  # its channels are class by class
NEEDED_KEYS = ("backbone", "in_channels", "class_num")
_PRETRAINED_KEYS = ("pretrained", "pretrained_path")


@dataclass(frozen=True)
class ModelCard:
    """What rebuilds a network and decodes its heatmaps; plain types, so it fits in JSON and in safe pickles.

    Parameters
    ----------
    model
        ``arch`` and the arguments of `czii25d.models.create_model`, without the pretrained ones.
    particles
        Fields by name, in channel order (`czii25d.particles.ParticleSet.to_config`).
    voxel_spacing
        Angstrom per voxel along z, y, x of the training tomograms; ``None``: not known.
    normalization
        ``"volume"``: z-scores of each tomogram; ``"global"``: the published constants
        (`czii25d.data.volumes.GLOBAL_MEAN`, ``GLOBAL_STD``).
    offset_voxel
        Added to peaks before they become angstroms, see `czii25d.geometry`.
    thresholds
        Least score of a pick by particle; ``None``: never fitted.
    nms_radius
        Angstrom within which only the best peak is kept, by particle; ``None``: the caller's.
    fold
        Names of the runs that were held out.
    czii25d_version
        That wrote it.
    contrast
        What protein is in the tomograms it knows: ``"dark"``, as in all volumes that 01 makes, or ``"bright"``.

    Raises
    ------
    InputError
        If a field is impossible, or they contradict each other.
    """

    model: dict[str, Any]
    particles: dict[str, dict[str, Any]]
    voxel_spacing: Spacing3D | None = None
    normalization: Normalization = "volume"
    offset_voxel: float = 0.0
    thresholds: dict[str, float] | None = None
    nms_radius: dict[str, float] | None = None
    fold: list[str] = field(default_factory=list)
    czii25d_version: str = field(default_factory=lambda: version("czii25d"))
    contrast: Contrast = "dark"

    def __post_init__(self) -> None:
        names = ParticleSet.from_config(self.particles, "model card: particles").names
        class_num = self.model.get("class_num")
        self._check("model", self.model.get("arch") in ARCHITECTURES, f"an arch of {', '.join(ARCHITECTURES)}")
        self._check("model", class_num == len(names), f"class_num {len(names)}, one for each of {', '.join(names)}")
        spacing = self.voxel_spacing
        self._check(
            "voxel_spacing", spacing is None or (len(spacing) == 3 and all(map(_is_positive, spacing))), "3 above 0"
        )
        known = get_args(Normalization)
        self._check("normalization", self.normalization in known, f"one of {', '.join(known)}")
        self._check("contrast", self.contrast in get_args(Contrast), f"one of {', '.join(get_args(Contrast))}")
        self._check("offset_voxel", math.isfinite(self.offset_voxel), "a number")
        for key in ("thresholds", "nms_radius"):
            table: Mapping[str, float] | None = getattr(self, key)
            valid = table is None or (set(table) <= set(names) and all(map(_is_number, table.values())))
            self._check(key, valid, f"numbers for some of {', '.join(names)}")

    @property
    def tile_shape(self) -> Shape3D:
        """``(D, H, W)`` of the tiles the network was trained on, voxels."""
        size = self.model["img_size"]
        return self.model["img_depth"], size, size

    def _check(self, key: str, valid: bool, expected: str) -> None:
        if not valid:
            raise InputError(f"model card: {key}", expected, repr(getattr(self, key)), "take another checkpoint")

    def to_dict(self) -> dict[str, Any]:
        """Return dictionaries, lists, strings and numbers only."""
        return json.loads(json.dumps(asdict(self), default=_plain_value))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: object = "model card") -> ModelCard:
        """Read what ``to_dict`` gave; ``where`` names its origin in errors."""
        known = {item.name for item in fields(cls)}
        if not isinstance(values, Mapping) or set(values) | ADDED != known:
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else repr(values)
            expected = f"a model card with {', '.join(sorted(known - ADDED))}"
            raise InputError(where, expected, found, "use the czii25d version that wrote it")
        spacing = values["voxel_spacing"]
        try:
            return cls(**{**values, "voxel_spacing": None if spacing is None else tuple(spacing)})
        except (TypeError, AttributeError) as error:
            raise InputError(where, "a model card", str(error), "take another checkpoint") from error


def load_model(path: Path | str, **model_kwargs: Any) -> nn.Module:
    """Load a network for prediction; see `load_checkpoint`."""
    return load_checkpoint(path, **model_kwargs)[0]


def load_checkpoint(path: Path | str, **model_kwargs: Any) -> tuple[nn.Module, ModelCard]:
    """Load a network in evaluation mode, with its averaged weights if it has them, and its card.

    Takes Lightning checkpoints of this project and of the published code, plain ``state_dict`` files and safetensors.
    No code in a file is ever run. A file without a card is taken as a published one: its peaks lie half a voxel
    higher than ours, its input is normalised with the published constants, its channels are the first particles.

    Parameters
    ----------
    path
        The file.
    **model_kwargs
        Arguments of `czii25d.models.create_model`. Needed where the file holds none: ``backbone``, ``in_channels``
        and ``class_num`` (and ``decoder_channels``, if they are not the published ones). Those that shape weights
        must agree with the file's; the nominal tile and the stochastic depth may be other ones.

    Raises
    ------
    InputError
        If the file is missing, damaged, no checkpoint or would run code; if arguments are missing, or they or the
        weights do not fit the network.
    """
    path = Path(path)
    state, card_values, stored_kwargs = _read(path)
    card = ModelCard.from_dict(card_values, path) if card_values is not None else None
    stored = dict(card.model) if card else stored_kwargs
    wanted = {key: value for key, value in model_kwargs.items() if key not in _PRETRAINED_KEYS}
    _refuse_contradictions(path, stored, wanted)
    kwargs = {"arch": "timm3d3", **stored, **wanted}
    missing = [key for key in NEEDED_KEYS if key not in kwargs]
    if missing:
        raise InputError(path, f"keywords {', '.join(missing)}", "none, and the file does not hold them", "give them")
    model = create_model(**kwargs, pretrained=False)
    _load_strictly(path, model, state, kwargs["class_num"])
    if card is None:
        card = _published_card(model, kwargs)
    else:
        card = ModelCard.from_dict({**card.to_dict(), "model": kwargs}, path)
    return model.eval(), card


def save_weights(path: Path | str, model: nn.Module, card: ModelCard) -> None:
    """Write the network's weights and its card as safetensors, whole or not at all."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with write_aside(path) as partial:
        safetensors.torch.save_file(tensors, partial, {CARD_KEY: json.dumps(card.to_dict())})


def copy_weights(
    source: nn.Module, source_names: Sequence[str], target: nn.Module, target_names: Sequence[str]
) -> list[str]:
    """Copy all weights of one network into another of the same architecture that may find other particles.

    Parameters
    ----------
    source, target
        Networks that differ at most in ``class_num``.
    source_names, target_names
        Their particles in the order of their channels.

    Returns
    -------
    kept
        Particles of the target that have got the source's head; the other heads stay as they are.
    """
    state, own = source.state_dict(), target.state_dict()
    kept = [name for name in target_names if name in source_names]
    for key in (key for key in own if key.startswith(HEAD_PREFIX)):
        heads, new = state[key].unflatten(0, (len(source_names), -1)), own[key].clone()
        for name in kept:
            new.unflatten(0, (len(target_names), -1))[target_names.index(name)] = heads[source_names.index(name)]
        state[key] = new
    target.load_state_dict(state)
    return kept


def read_card(path: Path | str) -> ModelCard | None:
    """Return the card in a file without building its network; ``None``: it has none. Raises as `load_checkpoint`."""
    values = _read(Path(path))[1]
    return None if values is None else ModelCard.from_dict(values, path)


def store_thresholds(path: Path | str, thresholds: Mapping[str, float]) -> ModelCard:
    """Replace the thresholds in a file's card, whole or not at all, and return the card.

    Weights and whatever else the file holds, as the optimizer's state, keep their values. A file that already holds
    these thresholds is not touched.

    Parameters
    ----------
    path
        A Lightning checkpoint of this project, or safetensors, with a card.
    thresholds
        Least score of a pick by particle.

    Raises
    ------
    InputError
        If there is no card, a threshold is of an unknown particle, or the file cannot be written again without running
        code in it.
    """
    path = Path(path)
    card = read_card(path)
    if card is None:
        raise InputError(path, "a checkpoint with a card", "none", "give one that 11_train.py or save_weights wrote")
    if card.thresholds == thresholds:
        return card
    card = replace(card, thresholds=dict(thresholds))
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            metadata = {**file.metadata(), CARD_KEY: json.dumps(card.to_dict())}
        tensors = safetensors.torch.load_file(path)
        with write_aside(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata)
        return card
    try:  # without stand-ins: what they stand for would be lost
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            path,
            "tensors and plain values besides the weights",
            "objects of other libraries",
            "store the thresholds in a copy that save_weights makes",
        ) from error
    with write_aside(path) as partial:
        torch.save({**content, CARD_KEY: card.to_dict()}, partial)
    return card


def _published_card(model: nn.Module, kwargs: dict[str, Any]) -> ModelCard:
    """Return the card that published checkpoints lack."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(type(model)).parameters.items()
        if key not in _PRETRAINED_KEYS
    }
    return ModelCard(
        model=json.loads(json.dumps({**defaults, **kwargs}, default=_plain_value)),
        particles=load_particles().first(kwargs["class_num"]).to_config(),
        normalization="global",
        offset_voxel=PUBLISHED_OFFSET_VOXEL,
    )


def _refuse_contradictions(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in SHAPING_KEYS:
        if key in stored and key in wanted and _comparable(key, stored[key]) != _comparable(key, wanted[key]):
            raise InputError(
                path,
                f"model.{key} {stored[key]}, as in the file",
                str(wanted[key]),
                "drop the key or take another file",
            )


def _comparable(key: str, value: Any) -> Any:
    if key == "backbone":
        return str(value).partition(".")[0]  # the tag names pretrained weights, not a shape
    return list(value) if isinstance(value, list | tuple) else value


def _load_strictly(path: Path, model: nn.Module, state: Mapping[str, Tensor], class_num: int) -> None:
    own = model.state_dict()
    head = f"{HEAD_PREFIX}weight"
    if head in own and head in state and (channels := len(state[head])) != len(own[head]):
        voxels = len(own[head]) // class_num
        raise InputError(
            path,
            f"weights for model.class_num {class_num}",
            f"weights for {channels // voxels}",
            f"set model.class_num={channels // voxels}",
        )
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in own]
    wrong += [
        f"{key} is {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            path,
            "weights of this network",
            "; ".join(wrong[:3]) + more,
            "correct model.backbone, model.in_channels or model.decoder_channels",
        )
    model.load_state_dict(state)


# ---- reading files, of which nothing is trusted ----------------------------------------------------------------------


class _Inert(dict[str, Any]):
    """Stands in for a class of other libraries: holds what the file says and does nothing."""

    def __init__(self, *_: object) -> None:
        super().__init__()


# What a hyper-parameter entry of Lightning is made of. The file's names are bound to `_Inert`, the classes themselves
# are not imported, so no interpolation is resolved and no constructor runs.
_STAND_INS = [
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Union", "Optional")),
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    "collections.defaultdict",
    "argparse.Namespace",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
]


def _read(path: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    """Return a file's weights, its card (``None``: it has none) and, in place of a card, its model arguments."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise InputError(path, "a checkpoint file", found, "correct the path")
    if path.stat().st_size == 0:
        raise InputError(path, "a checkpoint file", "an empty one", "copy or download it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(path, "a checkpoint", f"a {type(content).__name__}", "give a Lightning or state_dict file")
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(path, "weights by name", "something else", "give a Lightning or state_dict file")
    prefix = next(p for p in WEIGHT_PREFIXES if any(key.startswith(p) for key in state))
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    has_config = state is not content
    card = content.get(CARD_KEY) if has_config else None
    return weights, card, _model_kwargs(content.get("hyper_parameters")) if has_config else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD_KEY, "null"))
        return safetensors.torch.load_file(path), card, {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(path, "a safetensors file", str(error), "copy or download it again") from error


def _read_pickle(path: Path) -> Any:
    stand_ins: list[Any] = [(_Inert, name) for name in _STAND_INS]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles, which are judged below
            # Mapped, because of a Lightning file less than half is needed.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler raises anything, down to KeyError
        refused = re.search(r"(?:GLOBAL|function|but got) (<.+?>|\S+)", str(error))
        called = refused[1] if refused else _first_global(path)
        if called:
            raise InputError(
                path,
                "a checkpoint of tensors and plain values",
                f"one that would run code when loaded ({called})",
                "do not load it; ask its author for the state_dict alone",
            ) from error
        raise InputError(
            path, "a checkpoint", "a damaged file or none written by torch", "copy or download it again"
        ) from error


def _first_global(path: Path) -> str:
    """Return the first thing that a bare pickle imports, also of a protocol which torch does not read."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, UnicodeDecodeError):  # no pickle
        pass
    return ""


def _model_kwargs(hyper_parameters: Any) -> dict[str, Any]:
    """Return the model's arguments among Lightning's hyper-parameters; interpolations are left out."""
    section = _find_section(_plain_tree(hyper_parameters))
    known = {"arch", *inspect.signature(ARCHITECTURES["timm3d3"]).parameters} - set(_PRETRAINED_KEYS)
    return {
        key: value
        for key, value in section.items()
        if key in known and value is not None and not (isinstance(value, str) and ("${" in value or value == "???"))
    }


def _plain_tree(value: Any) -> Any:
    """Turn stand-ins of configuration nodes into what they hold."""
    if isinstance(value, _Inert):
        held = vars(value)
        if "_content" in held or "_val" in held:
            return _plain_tree(held["_content"] if "_content" in held else held["_val"])
        value = {**value, **held}
    if isinstance(value, Mapping):
        return {key: _plain_tree(item) for key, item in value.items()}
    return [_plain_tree(item) for item in value] if isinstance(value, list | tuple) else value


def _find_section(tree: Any) -> dict[str, Any]:
    """Return the first dictionary that names a backbone."""
    if not isinstance(tree, dict):
        return {}
    if isinstance(tree.get("backbone"), str):
        return tree
    return next((found for branch in tree.values() if (found := _find_section(branch))), {})


def _plain_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0
