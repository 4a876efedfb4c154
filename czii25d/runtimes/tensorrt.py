"""TensorRT engines as predictors.

TensorRT is imported inside functions, so that all else works without it. The names are those which versions 10 and
11 share (``stubs/tensorrt``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from czii25d.errors import InputError
from czii25d.geometry import Shape3D

if TYPE_CHECKING:
    from types import ModuleType

    import tensorrt

logger = logging.getLogger(__name__)

OLDEST_VERSION = 10  # the first with strong typing and named tensors throughout


def require_tensorrt() -> ModuleType:
    """Import TensorRT, or say in one line why it cannot be used here.

    Returns
    -------
    tensorrt
        Of version 10 or newer.

    Raises
    ------
    InputError
        If torch sees no GPU (in that case TensorRT is not even imported), or TensorRT is not installed or too old.
    """
    # First, because TensorRT's runtime ends the process with a segmentation fault where there is no GPU.
    if not torch.cuda.is_available():
        raise InputError(
            "TensorRT",
            "an NVIDIA GPU that torch can use",
            "none",
            "run it on a machine with one, or set export.format=onnx and infer.runtime=auto",
        )
    cure = "pip install 'czii25d[tensorrt]' --extra-index-url https://pypi.nvidia.com"
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: the bindings are there, NVIDIA's libraries are not
        raise InputError("TensorRT", "an installed one", f"none ({error})", cure) from error
    if int(tensorrt.__version__.split(".")[0]) < OLDEST_VERSION:
        raise InputError("TensorRT", f"version {OLDEST_VERSION} or newer", tensorrt.__version__, cure)
    return tensorrt


@functools.cache  # TensorRT keeps the first logger it is given for the whole process
def tensorrt_logger() -> tensorrt.ILogger:
    """Return TensorRT's logger, which passes warnings and errors on to Python's."""
    import tensorrt as trt

    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
    }

    class Bridge(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base called by name, not through super()

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in levels:
                logger.log(levels[severity], "TensorRT: %s", msg)

    return Bridge()


class CudaStream:
    """A stream of one's own, whose work comes after the caller's so far and before the caller's next.

    Parameters
    ----------
    device
        A CUDA device.

    Raises
    ------
    InputError
        If it is another one.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise InputError("key infer.device", "a GPU, for a TensorRT engine", str(device), "set infer.device=cuda")
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def between_callers_work(self, *tensors: Tensor) -> Iterator[int]:
        """Yield the stream's handle; it and its device are the current ones inside the block.

        ``tensors`` are those of other streams that the block uses: their memory is not given away before the work on
        them is done, even when their owner drops them at once.
        """
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield self._stream.cuda_stream
        finally:
            for tensor in tensors:
                tensor.record_stream(self._stream)
            caller.wait_stream(self._stream)


class TensorRTNetwork:
    """A TensorRT engine as a `czii25d.inference.Predictor`, for one thread at a time.

    Tiles and heatmaps stay on the GPU. Any number of tiles is taken: more than the engine's largest batch are split,
    fewer than its smallest are filled up with empty ones.

    Parameters
    ----------
    engine
        What `czii25d.export.tensorrt.build_engine` returned, or the file that holds it.
    device
        The GPU, of the kind that the engine was built on.
    version_compatible
        Whether the engine was built so. Such an engine brings code of its own along, which is run only where this is
        set: do so for engines of known origin.
    stream
        Where the engine's work goes; absent: a new stream of ``device``.

    Attributes
    ----------
    device
        Where heatmaps are returned.
    tile_shape
        ``(D, H, W)`` voxels, the only one that the engine takes.
    class_num
        Channels ``C`` of the heatmaps.
    max_batch
        Tiles that go through the engine at once.

    Raises
    ------
    InputError
        If TensorRT or a GPU is missing, the file is none or of another GPU or TensorRT, or the engine is not one of
        `czii25d`'s networks.
    """

    def __init__(
        self,
        engine: bytes | Path,
        device: torch.device | str = "cuda:0",
        version_compatible: bool = False,
        stream: CudaStream | None = None,
    ) -> None:
        require_tensorrt()
        import tensorrt as trt

        self.device = torch.device(device)
        self._where = engine if isinstance(engine, Path) else "the engine"
        serialized = _read_engine(engine) if isinstance(engine, Path) else engine
        self._stream = CudaStream(self.device) if stream is None else stream
        # The three are kept, because each needs the one before. Made inside the block, because TensorRT uses the
        # current device; the buffers, because they then belong to the stream that uses them.
        with self._stream.between_callers_work():
            self._runtime = trt.Runtime(tensorrt_logger())
            if version_compatible:
                self._runtime.engine_host_code_allowed = True
            loaded = self._runtime.deserialize_cuda_engine(serialized)
            if loaded is None:
                raise InputError(
                    self._where,
                    f"an engine of this GPU and TensorRT version ({trt.__version__})",
                    "one that TensorRT does not load, for the reason logged above",
                    "export it again here with export_trt.py",
                )
            self._engine = loaded
            self._read_signature()
            context = self._engine.create_execution_context()
            if context is None:
                raise InputError(
                    self._where,
                    f"memory for it on {self.device}",
                    "too little",
                    "free some, or export with a smaller export.batch",
                )
            self._context = context
            shape = (self.max_batch, 1, *self.tile_shape)
            self._tiles = torch.zeros(shape, dtype=self._dtype(self._input), device=self.device)
            shape = (self.max_batch, self.class_num, *self.tile_shape)
            self._heatmaps = torch.empty(shape, dtype=self._dtype(self._output), device=self.device)
            for name, buffer in ((self._input, self._tiles), (self._output, self._heatmaps)):
                if not self._context.set_tensor_address(name, buffer.data_ptr()):
                    raise self._refusal(f"the buffer of its tensor {name}")

    @torch.inference_mode()
    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict heatmaps.

        Parameters
        ----------
        tiles
            ``(B, 1, D, H, W)`` float32 on ``device``.

        Returns
        -------
        heatmaps
            ``(B, C, D, H, W)`` float32 on ``device``, not touched by later calls.

        Raises
        ------
        InputError
            If the tiles have another shape than the engine's, or TensorRT refuses to run.
        """
        if tiles.shape[1:] != (1, *self.tile_shape):
            raise InputError(
                "key infer.tile",
                f"{list(self.tile_shape)}, as in {self._where}",
                str(list(tiles.shape[2:])),
                "correct it, or export an engine of that tile",
            )
        tiles = tiles.to(self.device)
        heatmaps = torch.empty(len(tiles), self.class_num, *self.tile_shape, device=self.device)
        with self._stream.between_callers_work(tiles, heatmaps) as handle:
            for first in range(0, len(tiles), self.max_batch):
                batch = slice(first, first + self.max_batch)
                self._run(tiles[batch], heatmaps[batch], handle)
        return heatmaps

    def _run(self, tiles: Tensor, heatmaps: Tensor, stream_handle: int) -> None:
        """Predict at most ``max_batch`` tiles, into ``heatmaps``; copies convert to and from the engine's dtype."""
        batch = max(len(tiles), self._min_batch)
        self._tiles[: len(tiles)].copy_(tiles)
        self._tiles[len(tiles) : batch].zero_()
        if not self._context.set_input_shape(self._input, (batch, 1, *self.tile_shape)):
            raise self._refusal(f"a batch of {batch}")
        if not self._context.execute_async_v3(stream_handle):
            raise self._refusal(f"to run a batch of {batch}")
        heatmaps.copy_(self._heatmaps[: len(tiles)])

    def _read_signature(self) -> None:
        """Find the engine's two tensors, its tile, its classes and its batches."""
        import tensorrt as trt

        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        if (
            len(inputs) != 1
            or len(outputs) != 1
            or [len(shape) for shape in shapes.values()] != [5, 5]
            or shapes[inputs[0]][1] != 1
            or shapes[inputs[0]][2:] != shapes[outputs[0]][2:]
        ):
            raise InputError(
                self._where,
                "one input (B, 1, D, H, W) and one output (B, C, D, H, W)",
                ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
                "give an engine that export_trt.py made",
            )
        [self._input], [self._output] = inputs, outputs
        _, _, depth, height, width = shapes[self._input]
        self.tile_shape: Shape3D = (depth, height, width)
        self.class_num: int = shapes[self._output][1]
        smallest, _, largest = self._engine.get_tensor_profile_shape(self._input, 0)
        self._min_batch: int = smallest[0]
        self.max_batch: int = largest[0]

    def _dtype(self, name: str) -> torch.dtype:
        import tensorrt as trt

        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        dtype = self._engine.get_tensor_dtype(name)
        if dtype not in dtypes:
            raise InputError(
                self._where,
                f"{name} in float32, float16 or bfloat16",
                str(dtype),
                "export it again with export.precision=fp16",
            )
        return dtypes[dtype]

    def _refusal(self, what: str) -> InputError:
        return InputError(
            self._where,
            f"TensorRT to take {what}",
            "a refusal, for the reason logged above",
            "free GPU memory, or export it again here with export_trt.py",
        )


def _read_engine(path: Path) -> bytes:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise InputError(path, "a TensorRT engine", found, "correct the path, or make one with export_trt.py")
    return path.read_bytes()
