"""From a network to an ONNX graph whose precision is what was asked for, node by node."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from czii25d.errors import InputError
from czii25d.files import write_aside
from czii25d.geometry import Shape3D
from czii25d.models.folding import fold

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}  # the first with bfloat16 convolutions is 22
INPUT_NAME, OUTPUT_NAME = "tiles", "heatmaps"
LARGEST_FILE = 2**31 - 2**24  # protobuf's 2 GiB, with room for the graph
COMPUTING_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
INSTALL = "pip install 'czii25d[export]'"


class FusedEnsemble(nn.Module):
    """Networks that take the same tiles, their weighted mean, in the common order of channels, as one network.

    Parameters
    ----------
    networks
        ``(B, 1, D, H, W) -> (B, C, D, H, W)``.
    channels
        Of each: which of its channels comes first, second, ... in the common order.
    weights
        Of each in the mean, above 0.
    """

    def __init__(
        self, networks: Sequence[nn.Module], channels: Sequence[Sequence[int]], weights: Sequence[float]
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._orders = [None if list(order) == sorted(order) else list(order) for order in channels]
        self._shares = [weight / sum(weights) for weight in weights]

    def forward(self, tiles: Tensor) -> Tensor:
        """Predict ``(B, C, D, H, W)``."""
        heatmaps = [
            (network(tiles) if order is None else network(tiles)[:, order]) * share
            for network, order, share in zip(self.networks, self._orders, self._shares, strict=True)
        ]
        return torch.stack(heatmaps).sum(0)


def in_precision(network: nn.Module, precision: Precision) -> nn.Module:
    """Return a copy of a network that computes in a precision; float32 tiles in, float32 heatmaps out.

    The decoder is folded (`czii25d.models.folding`). Normalisations that remain stay in float32, between casts: sums of
    squares overflow in float16. No autocast is used: what it does is lost in an exported graph.
    """
    if precision not in get_args(Precision):
        raise InputError("key export.precision", ", ".join(get_args(Precision)), repr(precision), "choose one")
    network = fold(network, "transposed").cpu()
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return network
    norms = [name for name, module in network.named_modules() if isinstance(module, NORMS)]
    network.to(dtype)
    for name in norms:
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, _InFloat32(network.get_submodule(name)))
    return _Cast(network, dtype)


class _InFloat32(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float()).to(x.dtype)


class _Cast(nn.Module):
    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, tiles: Tensor) -> Tensor:
        return self.network(tiles.to(self.dtype)).float()


def export_onnx(network: nn.Module, path: Path | str, tile_shape: Shape3D, precision: Precision = "fp32") -> None:
    """Write a network as an ONNX file with a free batch size, checked by `check_graph`.

    Parameters
    ----------
    network
        ``(B, 1, D, H, W) -> (B, C, D, H, W)``, on the CPU; left as it is.
    tile_shape
        ``(D, H, W)``, fixed in the graph.

    Raises
    ------
    InputError
        If onnx is not installed, the file would exceed 2 GB, or a node computes in another precision.
    """
    require_onnx()
    size = sum(weight.numel() for weight in network.parameters()) * DTYPES[precision].itemsize
    if size > LARGEST_FILE:
        raise InputError(
            path,
            "at most 2 GB, as an ONNX file can be",
            f"{size / 1e9:.1f} GB",
            "set export.precision=fp16 or fuse=false",
        )
    example = torch.zeros(2, 1, *tile_shape)
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            in_precision(network, precision),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=OPSETS[precision],
            verbose=False,
        )
    assert program is not None
    with write_aside(path) as partial:
        program.save(str(partial), external_data=False)
        check_graph(partial, precision, path)


def check_graph(path: Path | str, precision: Precision, name: Path | str | None = None) -> None:
    """Check an ONNX file: valid, every type inferred, and every convolution and product in the asked precision.

    Exporters are known to write float32 graphs where another precision was asked for, without a word.

    Parameters
    ----------
    name
        What errors call the file.

    Raises
    ------
    InputError
        If the graph is not valid, or a node of ``Conv, ConvTranspose, Gemm, MatMul`` computes in another precision.
    """
    onnx = require_onnx()
    name = name or path
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)
    except Exception as error:  # onnx has a kind of its own for each step
        raise InputError(name, "a valid ONNX graph", str(error), "report it: the export is at fault") from None
    types = {value.name: value.type.tensor_type.elem_type for value in _values(model.graph)}
    types |= {weight.name: weight.data_type for weight in model.graph.initializer}
    wanted = getattr(onnx.TensorProto, {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision])
    computing = [node for node in model.graph.node if node.op_type in COMPUTING_OPS]
    for node in computing:
        for value in (*node.input[:2], node.output[0]):
            found = types.get(value, onnx.TensorProto.UNDEFINED)
            if found != wanted:
                raise InputError(
                    f"{name}, node {node.name}",
                    f"a {node.op_type} in {precision}",
                    onnx.TensorProto.DataType.Name(found),
                    "export it again with export_trt.py",
                )
    if not computing:
        raise InputError(name, "a network with convolutions", "none", "export it again with export_trt.py")


def require_onnx() -> Any:
    """Return the onnx module; `InputError` if it, or what torch exports with, is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter is written in it
    except ImportError as error:
        raise InputError("export", "onnx and onnxscript installed", f"no {error.name}", INSTALL) from None
    return onnx


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.input
    yield from graph.output
    yield from graph.value_info


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
