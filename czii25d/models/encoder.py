"""2D backbones of timm, cut into stages so that depth can be pooled between them."""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from czii25d.errors import InputError, did_you_mean

STRIDES = (4, 8, 16, 32)  # in y and x, of the four features


def create_backbone(
    name: str,
    in_channels: int,
    pretrained: bool = False,
    pretrained_path: str | None = None,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Build a timm backbone ``(N, in_channels, H, W) -> list of features``.

    Parameters
    ----------
    name
        Of timm, with or without the tag of its weights, e.g. ``"convnext_nano.in12k_ft_in1k"``.
    in_channels
        timm sums or repeats pretrained filters to this number of channels.
    pretrained
        Take timm's weights, downloaded at first use.
    pretrained_path
        A safetensors or pth file of this backbone's weights, used in place of a download.
    drop_path_rate
        Of stochastic depth.

    Raises
    ------
    InputError
        If timm does not know the backbone or its features, or the weights cannot be had or do not fit.
    """
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise InputError(
            "model.backbone", "a model of timm", f"'{name}'{did_you_mean(base, timm.list_models())}", "see timm.list_models()"
        )
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{base}.*")]
        raise InputError(
            "model.backbone", f"one of the tags {', '.join(tags) or '(none)'} after {base}", repr(name), "correct the tag or omit it"
        )
    kwargs = {"features_only": True, "in_chans": in_channels}
    if drop_path_rate:
        kwargs["drop_path_rate"] = drop_path_rate
    if pretrained_path is not None:
        return _create_from_file(name, Path(pretrained_path), kwargs)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        if pretrained:
            raise InputError(
                "model.pretrained",
                f"weights of {name} from timm's hub",
                reason,
                "set model.pretrained=false, or model.pretrained_path=FILE to a safetensors or pth file of this backbone",
            ) from error
        raise InputError("model.backbone", "a backbone with features", f"{name} ({reason})", "choose another") from error


def _create_from_file(name: str, path: Path, kwargs: dict[str, object]) -> nn.Module:
    """Build a backbone with the weights of a file, and make sure that they are all there."""
    cure = f"give a safetensors or pth file of {name}"
    if not path.is_file():
        raise InputError("model.pretrained_path", "a file", f"none at {path}", cure)
    try:
        stored = timm.models.load_state_dict(str(path), use_ema=False)
        backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    except Exception as error:  # whatever timm makes of a file that is none of its own
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(path, f"weights of {name}", reason, cure) from error
    # timm loads what fits and is silent about the rest; only its input layer may differ from the file.
    known = {_fingerprint(tensor) for tensor in stored.values()}
    filters = [key for key, tensor in backbone.state_dict().items() if tensor.ndim > 1][1:]
    absent = [key for key in filters if _fingerprint(backbone.state_dict()[key]) not in known]
    if absent:
        raise InputError(path, f"weights of {name}", f"none for {len(absent)} of {len(filters)} layers", cure)
    return backbone


def _fingerprint(tensor: Tensor) -> tuple[int, ...]:
    return tensor.numel(), *tensor.flatten()[:16].float().view(torch.int32).tolist()


def split_stages(backbone: nn.Module, name: str, in_channels: int, size: int) -> tuple[tuple[str, ...], ...]:
    """Return, for each of the four strides, the names of the modules that lead to its feature.

    Names, not modules: whoever replaces a module (for synchronised batch statistics, say) replaces it here too.

    Parameters
    ----------
    backbone
        From `create_backbone`.
    name
        For messages.
    in_channels
        Of its input.
    size
        Height and width of the tile on which the stages are compared with the backbone as a whole.

    Raises
    ------
    InputError
        If the backbone has other strides, or is not a chain of modules.
    """
    info = backbone.feature_info
    last = {reduction: module for reduction, module in zip(info.reduction(), info.module_name(), strict=True)}
    if not set(STRIDES) <= set(last):
        raise InputError(
            "model.backbone",
            f"a backbone with features at strides {', '.join(map(str, STRIDES))}",
            f"{name} with {', '.join(map(str, info.reduction()))}",
            "choose a ConvNeXt, ResNet or EfficientNet",
        )
    ends = [last[stride].replace(".", "_") for stride in STRIDES]
    stages: list[tuple[str, ...]] = []
    stage: list[str] = []
    for path in _chain(backbone):
        stage.append(path)
        if len(stages) < len(ends) and path.replace(".", "_") == ends[len(stages)]:
            stages.append(tuple(stage))
            stage = []
    if len(stages) < len(STRIDES) or not _agree(backbone, stages, torch.zeros(1, in_channels, size, size)):
        raise InputError(
            "model.backbone",
            "a backbone that is a chain of convolutional stages",
            f"{name}, which is not",
            "choose a ConvNeXt, ResNet or EfficientNet",
        )
    return tuple(stages)


def _chain(backbone: nn.Module) -> list[str]:
    """Return the names of the backbone's modules in order, those of a ``Sequential`` one by one."""
    paths = []
    for name, child in backbone.named_children():
        paths += [f"{name}.{inner}" for inner, _ in child.named_children()] if name == "blocks" else [name]
    return paths


def run_stage(backbone: nn.Module, stage: tuple[str, ...], x: Tensor) -> Tensor:
    """Run the modules of one stage, ``(N, C, H, W)`` to ``(N, C', H', W')``."""
    for path in stage:
        x = backbone.get_submodule(path)(x)
    return x


@torch.no_grad()
def _agree(backbone: nn.Module, stages: list[tuple[str, ...]], x: Tensor) -> bool:
    """Tell whether running stage by stage gives the backbone's own features, of the expected sizes."""
    training, size = backbone.training, x.shape[-1]
    backbone.eval()
    try:
        whole = dict(zip(backbone.feature_info.reduction(), backbone(x), strict=True))
        for stride, stage in zip(STRIDES, stages, strict=True):
            x = run_stage(backbone, stage, x)
            if x.shape[2:] != (size // stride, size // stride) or not torch.equal(x, whole[stride]):
                return False
    except Exception:  # whatever a module raises that is no link of a chain
        return False
    finally:
        backbone.train(training)
    return True
