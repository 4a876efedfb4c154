"""2D backbones of timm, cut into stages so that depth can be pooled between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session
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
            "model.backbone",
            "a model of timm",
            f"'{name}'{did_you_mean(base, timm.list_models())}",
            "see timm.list_models()",
        )
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{base}.*")]
        raise InputError(
            "model.backbone",
            f"one of the tags {', '.join(tags) or '(none)'} after {base}",
            repr(name),
            "correct the tag or omit it",
        )
    kwargs: dict[str, Any] = {"features_only": True, "in_chans": in_channels}
    if drop_path_rate:
        kwargs["drop_path_rate"] = drop_path_rate
    if pretrained_path is not None:
        return _create_from_file(name, Path(pretrained_path), kwargs)
    if pretrained:
        return _create_from_hub(name, kwargs)
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # some of timm's models have no features, or no stochastic depth
        raise InputError(
            "model.backbone", f"one that takes {', '.join(kwargs)}", f"{name}: {_reason(error)}", "choose another"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _create_from_hub(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build a backbone with weights from the hub, or from the cache of earlier downloads."""
    with _cache_only_if_offline() as offline:
        try:
            return timm.create_model(name, pretrained=True, **kwargs)
        except Exception as error:  # network, proxy, disk, or no weights of that name
            raise InputError(
                "model.pretrained",
                f"weights of {name} from timm's hub",
                "no connection to it, and none in its cache" if offline else _reason(error),
                "set model.pretrained=false, or model.pretrained_path=FILE to its weights (safetensors or pth)",
            ) from error


@contextmanager
def _cache_only_if_offline() -> Iterator[bool]:
    """Tell whether the hub is out of reach; if so, keep its client from retrying for a minute."""
    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of requests, httpx or the socket, by version
        constants.HF_HUB_OFFLINE = True
    try:
        yield constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before


def _create_from_file(name: str, path: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Build a backbone with the weights of a file, and make sure that they are all there."""
    cure = f"give a safetensors or pth file of {name}"
    if not path.is_file():
        raise InputError("model.pretrained_path", "a file", f"none at {path}", cure)
    try:
        stored = timm.models.load_state_dict(str(path), use_ema=False)
        backbone = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)
    except Exception as error:  # whatever timm makes of a file that is none of its own
        raise InputError(path, f"weights of {name}", _reason(error), cure) from error
    # timm loads what fits and is silent about the rest; only its input layer may differ from the file.
    known = {_fingerprint(tensor) for tensor in stored.values()}
    filters = [key for key, tensor in backbone.state_dict().items() if tensor.ndim > 1][1:]
    absent = [key for key in filters if _fingerprint(backbone.state_dict()[key]) not in known]
    if absent:
        raise InputError(path, f"weights of {name}", f"none for {len(absent)} of {len(filters)} layers", cure)
    return backbone


def _fingerprint(tensor: Tensor) -> tuple[int, ...]:
    return tensor.numel(), *tensor.flatten()[:16].float().view(torch.int32).tolist()


def features_by_stride(backbone: nn.Module) -> dict[int, tuple[str, int]]:
    """Return, by stride, the name of the module that yields a feature and the feature's channels."""
    info: Any = backbone.feature_info
    return dict(zip(info.reduction(), zip(info.module_name(), info.channels(), strict=True), strict=True))


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
    features = features_by_stride(backbone)
    if not set(STRIDES) <= set(features):
        raise InputError(
            "model.backbone",
            f"a backbone with features at strides {', '.join(map(str, STRIDES))}",
            f"{name} with {', '.join(map(str, features))}",
            "choose a ConvNeXt, ResNet or EfficientNet",
        )
    ends = [features[stride][0] for stride in STRIDES]
    stages: list[tuple[str, ...]] = []
    stage: list[str] = []
    for path in _chain(backbone, ends):
        stage.append(path)
        if len(stages) < len(ends) and path.replace(".", "_") == ends[len(stages)].replace(".", "_"):
            stages.append(tuple(stage))
            stage = []
    if len(stages) < len(STRIDES) or not _agree(backbone, stages, in_channels, size):
        raise InputError(
            "model.backbone",
            "a backbone that is a chain of convolutional stages",
            f"{name}, which is not",
            "choose a ConvNeXt, ResNet or EfficientNet",
        )
    return tuple(stages)


def _chain(backbone: nn.Module, ends: list[str]) -> list[str]:
    """Return the names of the backbone's modules in order; one that features lie within, module by module."""
    paths: list[str] = []
    for name, child in backbone.named_children():
        within = any(end.startswith(f"{name}.") for end in ends)
        paths += [f"{name}.{inner}" for inner, _ in child.named_children()] if within else [name]
    return paths


def drop_stages(backbone: nn.Module, stages: Iterable[tuple[str, ...]]) -> None:
    """Take the modules of stages that are not run out of a backbone, and with them their weights."""
    for path in (path for stage in stages for path in stage):
        parent, _, name = path.rpartition(".")
        delattr(backbone.get_submodule(parent), name)


def takes_channels_last(backbone: nn.Module, in_channels: int) -> bool:
    """Tell whether a backbone may be given channels-last input.

    On a CPU, the weight gradient of a strided 1 x 1 convolution crashes on odd numbers of channels in that layout
    (torch 2.15); RepVGG and its kin begin with one.
    """
    convolutions = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return all(conv.in_channels != in_channels or conv.kernel_size != (1, 1) for conv in convolutions)


def run_stage(backbone: nn.Module, stage: tuple[str, ...], x: Tensor) -> Tensor:
    """Run the modules of one stage, ``(N, C, H, W)`` to ``(N, C', H', W')``."""
    for path in stage:
        x = backbone.get_submodule(path)(x)
    return x


@torch.no_grad()
def _agree(backbone: nn.Module, stages: list[tuple[str, ...]], in_channels: int, size: int) -> bool:
    """Tell whether running stage by stage gives the backbone's own features, of the expected sizes."""
    x = torch.linspace(-1, 1, in_channels * size * size).view(1, in_channels, size, size)
    training = backbone.training
    backbone.eval()
    try:
        whole = dict(zip(features_by_stride(backbone), backbone(x), strict=True))
        for stride, stage in zip(STRIDES, stages, strict=True):
            x = run_stage(backbone, stage, x)
            if x.shape[2:] != (size // stride, size // stride) or not torch.equal(x, whole[stride]):
                return False
    except Exception:  # whatever a module raises that is no link of a chain
        return False
    finally:
        backbone.train(training)
    return True
