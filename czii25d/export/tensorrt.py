"""Build TensorRT engines from ONNX graphs, with TensorRT 10 and 11 alike.

The network is strongly typed: every layer runs in the precision that the graph states, and nothing here chooses one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from czii25d.errors import InputError, did_you_mean
from czii25d.files import write_aside
from czii25d.runtimes.tensorrt import require_tensorrt, tensorrt_logger

if TYPE_CHECKING:
    import tensorrt

__all__ = ["EngineOptions", "build_engine", "engine_key", "require_tensorrt"]

logger = logging.getLogger(__name__)

HARDWARE_LEVELS = ("none", "ampere_plus", "same_compute_capability")
SHOWN_ERRORS = 3


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built; the keys of ``export``.

    Parameters
    ----------
    batch
        Smallest, most usual and largest number of tiles at once. The engine is tuned for the second.
    workspace_gib
        GiB of GPU memory that a layer may use while it runs; ``None``: all there is.
    optimization_level
        0 (built at once) to 5 (runs fastest); ``None``: TensorRT's own.
    hardware_compatible
        GPUs that the engine runs on: ``none``, only those like the one it is built on; ``same_compute_capability``;
        ``ampere_plus``, all since Ampere, at some cost in speed.
    version_compatible
        Whether later versions of TensorRT can load it too.

    Raises
    ------
    InputError
        If a value is impossible.
    """

    batch: tuple[int, int, int] = (1, 4, 8)
    workspace_gib: float | None = None
    optimization_level: int | None = None
    hardware_compatible: str = "none"
    version_compatible: bool = False

    def __post_init__(self) -> None:
        batch, workspace, level = self.batch, self.workspace_gib, self.optimization_level
        in_order = (
            isinstance(batch, Sequence)
            and len(batch) == 3
            and all(_is_whole(number) for number in batch)
            and 1 <= batch[0] <= batch[1] <= batch[2]
        )
        _check("batch", batch, in_order, "three whole numbers, 1 <= min <= opt <= max", "correct them")
        limited = workspace is None or (_is_number(workspace) and math.isfinite(workspace) and workspace > 0)
        _check("workspace_gib", workspace, limited, "GiB above 0, or null", "correct it")
        graded = level is None or (_is_whole(level) and 0 <= level <= 5)
        _check("optimization_level", level, graded, "0 to 5, or null", "correct it")
        hardware = self.hardware_compatible
        _check(
            "hardware_compatible",
            f"{hardware}{did_you_mean(str(hardware), HARDWARE_LEVELS)}",
            hardware in HARDWARE_LEVELS,
            f"one of {', '.join(HARDWARE_LEVELS)}",
            "choose one",
        )
        versions = self.version_compatible
        _check("version_compatible", versions, isinstance(versions, bool), "true or false", "choose one")
        # Lists and whole numbers of GiB come from configurations; equal options are to have equal keys.
        object.__setattr__(self, "batch", tuple(batch))
        object.__setattr__(self, "workspace_gib", None if workspace is None else float(workspace))


def engine_key(graph_sha256: str, options: EngineOptions, gpu_name: str, tensorrt_version: str) -> str:
    """Return 16 hexadecimal digits that differ wherever an engine has to be built anew.

    Parameters
    ----------
    graph_sha256
        Of the ONNX file.
    options
        How the engine is built.
    gpu_name, tensorrt_version
        As ``torch.cuda.get_device_name()`` and ``tensorrt.__version__`` give them.
    """
    ingredients = [graph_sha256, asdict(options), gpu_name, tensorrt_version]
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:16]


def build_engine(
    onnx_path: Path,
    input_shape: tuple[int, int, int, int],
    options: EngineOptions,
    timing_cache: Path | None = None,
) -> bytes:
    """Build an engine on the current GPU.

    Parameters
    ----------
    onnx_path
        A graph ``(B, 1, D, H, W) -> (B, C, D, H, W)`` that states its precision itself.
    input_shape
        ``(1, D, H, W)``: the input's without its batch.
    options
        How to build it.
    timing_cache
        File of measured kernels that makes the next build faster; read where it is there, and written whole after a
        build that succeeded. It belongs to one GPU and TensorRT version.

    Returns
    -------
    engine
        For `czii25d.runtimes.tensorrt.TensorRTNetwork`, or to be written to a file.

    Raises
    ------
    InputError
        If TensorRT or a GPU is missing, the graph is not what was said, or TensorRT gives up; its reasons are logged.
    """
    require_tensorrt()
    import tensorrt as trt

    if not onnx_path.is_file():
        raise InputError(onnx_path, "an ONNX file", "nothing there", "correct the path")
    if timing_cache is not None and timing_cache.is_dir():
        raise InputError(timing_cache, "a file for the timing cache", "a folder", "name a file in it")
    # TensorRT refers to these objects without owning them: they stay in scope until the engine is built.
    builder = trt.Builder(tensorrt_logger())
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, tensorrt_logger())
    if not parser.parse_from_file(str(onnx_path)):  # by path: large weights lie beside the graph
        raise InputError(
            onnx_path,
            f"a graph that TensorRT {trt.__version__} reads",
            _parser_errors(parser),
            "export it again, or use infer.runtime=onnxruntime",
        )
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    name = _input_name(onnx_path, network, input_shape, options)
    smallest, usual, largest = ((batch, *input_shape) for batch in options.batch)
    profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise InputError("key export.batch", "batches that TensorRT takes", str(options.batch), "correct them")
    _configure(config, options)
    if timing_cache is not None:
        _read_timing_cache(config, timing_cache)
    logger.info("building a TensorRT %s engine of %s; this takes minutes", trt.__version__, onnx_path)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise InputError(
            onnx_path,
            f"a graph that TensorRT {trt.__version__} builds",
            "no engine, for the reason logged above",
            "free GPU memory, raise export.workspace_gib, or use infer.runtime=onnxruntime",
        )
    if timing_cache is not None:
        _write_timing_cache(config, timing_cache)
    return bytes(serialized)


def _network_flags() -> int:
    """Ask for strong typing: 10 has to be told, 11 knows nothing else and later versions may drop the flag."""
    import tensorrt as trt

    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _parser_errors(parser: tensorrt.OnnxParser) -> str:
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    more = f" and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
    return "; ".join(errors[:SHOWN_ERRORS]) + more if errors else "a refusal without a reason"


def _input_name(
    onnx_path: Path, network: tensorrt.INetworkDefinition, input_shape: Sequence[int], options: EngineOptions
) -> str:
    """Return the name of the graph's only input, once it has the shape that was said and takes these batches."""
    counts = (network.num_inputs, network.num_outputs)
    if counts != (1, 1):
        found = f"{counts[0]} and {counts[1]}"
        raise InputError(onnx_path, "a graph of one input and one output", found, "give one that export_trt.py made")
    tensor = network.get_input(0)
    batch, *shape = tensor.shape
    if shape != list(input_shape):
        raise InputError(
            onnx_path, f"an input (B, {str(tuple(input_shape))[1:]}", str(tuple(tensor.shape)), "export it again"
        )
    if batch != -1 and options.batch != (batch,) * 3:
        raise InputError(
            onnx_path,
            f"a graph that takes batches of {options.batch[0]} to {options.batch[2]}",
            f"one for {batch} only",
            f"export it with a dynamic batch, or set export.batch=[{batch},{batch},{batch}]",
        )
    return tensor.name


def _configure(config: tensorrt.IBuilderConfig, options: EngineOptions) -> None:
    """Set what was asked for; whatever was not stays TensorRT's own."""
    import tensorrt as trt

    if options.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = trt.HardwareCompatibilityLevel
    if options.hardware_compatible == "ampere_plus":
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    elif options.hardware_compatible == "same_compute_capability":
        if not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):  # the first versions 10 do not have it
            raise InputError(
                "key export.hardware_compatible",
                "none or ampere_plus",
                f"same_compute_capability, which TensorRT {trt.__version__} does not know",
                "choose one of the two, or install a newer TensorRT",
            )
        config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY


def _read_timing_cache(config: tensorrt.IBuilderConfig, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # A mismatch is not ignored: kernels timed on another GPU would be chosen for this one.
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise InputError(
            path,
            "a timing cache of this GPU and TensorRT version",
            "another one",
            "delete it, or name another file",
        )


def _write_timing_cache(config: tensorrt.IBuilderConfig, path: Path) -> None:
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is None:
        raise InputError(path, "a timing cache to write", "none from TensorRT", "build without one")
    with write_aside(path) as partial:
        partial.write_bytes(bytes(content))


def _check(key: str, value: object, valid: bool, expected: str, cure: str) -> None:
    if not valid:
        raise InputError(f"key export.{key}", expected, str(value), cure)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)
