"""Recording stand-ins of TensorRT 10 and 11, for machines without a GPU.

They hold the names that czii25d may use, and behave as the real ones do wherever that can break a caller: methods fail
with None or False instead of raising, engines load only where they belong, attributes that do not exist cannot be set.
That of 10 also holds the names that 11 has dropped, so that their use shows; that of 11 lacks them.

A graph is a JSON file: ``{"inputs": {name: shape}, "outputs": {name: shape}, "dtype": "HALF"}``. An engine computes
``heatmaps[:, c] = 2 * tiles + c`` on whatever tensors lie at the addresses it was given.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Callable
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch

REMOVED = {
    "BuilderFlag": [
        *("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS"),
        *("PREFER_PRECISION_CONSTRAINTS", "REJECT_EMPTY_ALGORITHMS", "WEIGHTLESS"),
    ],
    "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH"],
    "Builder": ["platform_has_fast_fp16", "platform_has_fast_int8", "platform_has_tf32"],
    "IBuilderConfig": ["int8_calibrator", "algorithm_selector"],
    "OnnxParser": ["supports_model"],
    "ICudaEngine": ["device_memory_size", "create_execution_context_without_device_memory"],
}
TORCH_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


def recorded(refusal: Any = None) -> Callable:
    """Note a method's call, and let it fail with ``refusal`` where the stand-in was told so."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            name = method.__name__
            self.trt.calls.append((name, *args, *kwargs.values()))
            if name in self.trt.refusing:
                self.trt.log_error(f"{name} failed")
                return refusal
            return method(self, *args, **kwargs)

        return call

    return decorate


class Bound:
    """An object of one stand-in; like those of pybind11, it takes no attributes that it does not have."""

    trt: ClassVar[StandIn]
    settable: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.settable:
            self.trt.calls.append((name, value))
        elif not name.startswith("_"):
            raise AttributeError(name)
        super().__setattr__(name, value)


class ILogger:
    Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    def __init__(self) -> None:
        self.ready = True  # pybind11 refuses loggers whose base was never called

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IHostMemory:
    """Bytes that only `bytes` can read, as the real ones have no methods of bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class ITensor:
    def __init__(self, name: str, shape: list[int]) -> None:
        self._name, self._shape = name, shape

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._shape)


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class INetworkDefinition(Bound):
    def __init__(self) -> None:
        self._graph: dict[str, Any] = {"inputs": {}, "outputs": {}}

    @property
    def num_inputs(self) -> int:
        return len(self._graph["inputs"])

    @property
    def num_outputs(self) -> int:
        return len(self._graph["outputs"])

    def get_input(self, index: int) -> ITensor:
        return ITensor(*list(self._graph["inputs"].items())[index])


class IOptimizationProfile(Bound):
    _shapes: dict[str, list[tuple[int, ...]]]

    @recorded()
    def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:
        self._shapes = {input: [min, opt, max]}


class ITimingCache(Bound):
    def __init__(self, content: bytes) -> None:
        self._content = content

    @recorded()
    def serialize(self) -> IHostMemory | None:
        return IHostMemory(self._content)


class IBuilderConfig(Bound):
    settable = ("builder_optimization_level", "hardware_compatibility_level")
    builder_optimization_level = 3
    hardware_compatibility_level: Any = None
    _cache: ITimingCache | None = None

    def __init__(self) -> None:
        self._flags: list[str] = []
        self._profiles: list[IOptimizationProfile] = []

    @recorded()
    def set_flag(self, flag: Enum) -> None:
        self._flags.append(flag.name)

    @recorded()
    def set_memory_pool_limit(self, pool: Enum, pool_size: int) -> None:
        assert isinstance(pool_size, int)

    @recorded(refusal=-1)
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return 0 if hasattr(profile, "_shapes") else -1

    @recorded()
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return self.trt.ITimingCache(serialized_timing_cache)

    @recorded(refusal=False)
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    @recorded()
    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder(Bound):
    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.trt.loggers.append(logger)

    @recorded()
    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return self.trt.INetworkDefinition()

    @recorded()
    def create_builder_config(self) -> IBuilderConfig:
        return self.trt.IBuilderConfig()

    @recorded()
    def create_optimization_profile(self) -> IOptimizationProfile:
        return self.trt.IOptimizationProfile()

    @recorded()
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        [profile] = config._profiles
        if config._cache is not None:
            config._cache._content += b"measured;"
        plan = {
            "graph": network._graph,
            "profile": profile._shapes,
            "version": self.trt.__version__,
            "version_compatible": "VERSION_COMPATIBLE" in config._flags,
        }
        return IHostMemory(json.dumps(plan).encode())


class OnnxParser(Bound):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert logger.ready
        self._network, self._errors = network, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    @recorded(refusal=False)
    def parse_from_file(self, model: str) -> bool:
        try:
            self._network._graph = json.loads(Path(model).read_text())
        except json.JSONDecodeError:  # the file's lines are the errors that are to be reported
            self._errors = [ParserError(line) for line in Path(model).read_text().split("\n\n")]
            return False
        return True

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IExecutionContext(Bound):
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._shape, self._addresses = engine, (), {}

    @recorded(refusal=False)
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine._plan["profile"][name]
        self._shape = shape
        return smallest[0] <= shape[0] <= largest[0] and list(shape[1:]) == list(smallest[1:])

    @recorded(refusal=False)
    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    @recorded(refusal=False)
    def execute_async_v3(self, stream_handle: int) -> bool:
        graph = self._engine._plan["graph"]
        [source], [(target, shape)] = graph["inputs"], graph["outputs"].items()
        tiles = self._tensor(source, self._shape)
        heatmaps = self._tensor(target, (self._shape[0], *shape[1:]))
        self.trt.executed.append(tiles.clone())
        heatmaps.copy_(2 * tiles + torch.arange(shape[1])[:, None, None, None])
        return True

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = TORCH_DTYPES[self._engine._plan["graph"]["dtype"]]
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class ICudaEngine(Bound):
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._shapes = {**plan["graph"]["inputs"], **plan["graph"]["outputs"]}

    @property
    def num_io_tensors(self) -> int:
        return len(self._shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[::-1][index]  # outputs first: callers are not to count on an order

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.trt.TensorIOMode
        return modes.INPUT if name in self._plan["graph"]["inputs"] else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[self._plan["graph"]["dtype"]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self._shapes[name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert profile_index == 0
        return self._plan["profile"][name]

    @recorded()
    def create_execution_context(self) -> IExecutionContext | None:
        return self.trt.IExecutionContext(self)


class Runtime(Bound):
    settable = ("engine_host_code_allowed",)
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None:
        assert logger.ready
        self.trt.loggers.append(logger)

    @recorded()
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self.trt.log_error("not a plan")
            return None
        built, here = (tuple(map(int, version.split("."))) for version in (plan["version"], self.trt.__version__))
        if plan["version_compatible"]:
            loads = built <= here and self.engine_host_code_allowed
        else:
            loads = built == here
        if not loads:
            self.trt.log_error(f"the plan is of version {plan['version']}")
        return self.trt.ICudaEngine(plan) if loads else None


class StandIn(ModuleType):
    """A stand-in of one version.

    Attributes
    ----------
    calls
        Each call and each setting of an attribute: its name and its arguments.
    refusing
        Names of methods that are to fail.
    executed
        What was in the input's buffer, run by run.
    """

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", loader=None)  # others look for it in the meantime
        self.__version__ = version
        self.calls: list[tuple] = []
        self.refusing: set[str] = set()
        self.executed: list[torch.Tensor] = []
        self.loggers: list[ILogger] = []
        self.ILogger = ILogger
        self.IHostMemory, self.ITensor, self.ParserError = IHostMemory, ITensor, ParserError
        for kind in Bound.__subclasses__():
            if kind.__module__ == __name__:
                setattr(self, kind.__name__, type(kind.__name__, (kind,), {"trt": self, "__module__": "stand-in"}))
        old = version.startswith("10.")
        dropped = REMOVED if old else {name: [] for name in REMOVED}
        self.DataType = Enum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BF16"])
        self.TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        self.MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE", "TACTIC_SHARED_MEMORY"])
        self.BuilderFlag = Enum("BuilderFlag", ["REFIT", "TF32", "VERSION_COMPATIBLE", *dropped["BuilderFlag"]])
        self.NetworkDefinitionCreationFlag = IntEnum(
            "NetworkDefinitionCreationFlag", {**({"EXPLICIT_BATCH": 0} if old else {}), "STRONGLY_TYPED": 1}
        )
        self.HardwareCompatibilityLevel = Enum(
            "HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]
        )
        for kind, names in dropped.items():
            for name in names:
                if not hasattr(getattr(self, kind), name):
                    setattr(getattr(self, kind), name, True)

    def log_error(self, text: str) -> None:
        """Say why something fails, as TensorRT does: to the first logger it was given."""
        self.loggers[0].log(ILogger.Severity.ERROR, text)

    def names(self) -> list[str]:
        """Return the names of the calls so far."""
        return [call[0] for call in self.calls]
