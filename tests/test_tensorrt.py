"""TensorRT 10 and 11 are called as they want to be, and every failure is one line; on stand-ins, and on a GPU."""

from __future__ import annotations

import ast
import dataclasses
import gc
import itertools
import json
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stand_ins
import torch
from conftest import PROJECT
from tensorrt_stand_ins import REMOVED, StandIn
from torch.overrides import TorchFunctionMode

from czii25d.errors import InputError
from czii25d.export.tensorrt import EngineOptions, build_engine, engine_key
from czii25d.inference import ArrayVolume, InferenceOptions, predict_heatmap
from czii25d.runtimes.tensorrt import CudaStream, TensorRTNetwork, require_tensorrt, tensorrt_logger

VERSIONS = ["10.13.3", "11.4.0"]
TILE = (4, 6, 10)
CLASSES = 3
MODULES = [PROJECT / "czii25d" / folder / "tensorrt.py" for folder in ("export", "runtimes")]
OWN_HANDLE = 4711


class FakeStream:
    """A CUDA stream that notes what it waits for."""

    def __init__(self, name: str, handle: int, events: list[tuple]) -> None:
        self.name, self.cuda_stream, self.events = name, handle, events

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append((f"{self.name} waits for", other.name))


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that is imported as tensorrt, on a machine that says it has a GPU."""
    with installed(monkeypatch, request.param) as module:
        yield module


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> Iterator[StandIn]:
    module = StandIn(version)
    caller, own = FakeStream("caller", 0, module.calls), FakeStream("own", OWN_HANDLE, module.calls)

    @contextmanager
    def current(stream: FakeStream) -> Iterator[None]:
        module.calls.append(("enter", stream.name))
        yield
        module.calls.append(("exit", stream.name))

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Stream", lambda device: own)
        patch.setattr(torch.cuda, "current_stream", lambda device: caller)
        patch.setattr(torch.cuda, "stream", current)
        patch.setattr(
            torch.Tensor,
            "record_stream",
            lambda tensor, stream: module.calls.append(("record_stream", tuple(tensor.shape), stream.name)),
        )
        tensorrt_logger.cache_clear()
        yield module
    tensorrt_logger.cache_clear()


def write_graph(
    folder: Path,
    batch: int = -1,
    inputs: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    dtype: str = "FLOAT",
) -> Path:
    graph = {
        "inputs": inputs or {"tiles": [batch, 1, *TILE]},
        "outputs": outputs or {"heatmaps": [batch, CLASSES, *TILE]},
        "dtype": dtype,
    }
    path = folder / "graph.onnx"
    path.write_text(json.dumps(graph))
    return path


def load(engine: bytes | Path, **kwargs: Any) -> TensorRTNetwork:
    """Load an engine as on a GPU, except that its tensors lie on the CPU."""
    return TensorRTNetwork(engine, "cpu", stream=CudaStream(torch.device("cuda:0")), **kwargs)


def build_and_load(folder: Path, batch: tuple[int, int, int] = (1, 2, 4), dtype: str = "FLOAT") -> TensorRTNetwork:
    return load(build_engine(write_graph(folder, dtype=dtype), (1, *TILE), EngineOptions(batch)))


def random_tiles(batch: int, seed: int = 0) -> torch.Tensor:
    """Return tiles whose doubles are exact in every dtype."""
    return torch.randint(1, 30, (batch, 1, *TILE), generator=torch.Generator().manual_seed(seed)).float()


def expected_heatmaps(tiles: torch.Tensor) -> torch.Tensor:
    return 2 * tiles + torch.arange(CLASSES)[:, None, None, None]


@contextmanager
def one_line(*fragments: str) -> Iterator[None]:
    with pytest.raises(InputError) as caught:
        yield
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- building --------------------------------------------------------------------------------------------------------


def test_a_build_calls_tensorrt_in_order(trt: StandIn, tmp_path: Path) -> None:
    graph, cache = write_graph(tmp_path), tmp_path / "timing.cache"
    options = EngineOptions((2, 3, 5), 1.5, 4, "ampere_plus", True)
    engine = build_engine(graph, (1, *TILE), options, cache)
    calls = [call if call[0] in ("set_shape", "set_flag") else (call[0], *map(plain, call[1:])) for call in trt.calls]
    assert calls == [
        ("create_network", 2),
        ("parse_from_file", str(graph)),
        ("create_builder_config",),
        ("create_optimization_profile",),
        ("set_shape", "tiles", (2, 1, *TILE), (3, 1, *TILE), (5, 1, *TILE)),
        ("add_optimization_profile", "IOptimizationProfile"),
        ("set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 3 * 2**29),
        ("builder_optimization_level", 4),
        ("set_flag", trt.BuilderFlag.VERSION_COMPATIBLE),
        ("hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS),
        ("create_timing_cache", b""),
        ("set_timing_cache", "ITimingCache", False),
        ("build_serialized_network", "INetworkDefinition", "IBuilderConfig"),
        ("get_timing_cache",),
        ("serialize",),
    ]
    assert type(engine) is bytes and json.loads(engine)["version"] == trt.__version__


def plain(argument: Any) -> Any:
    return type(argument).__name__ if isinstance(argument, tensorrt_stand_ins.Bound) else argument


def test_what_is_not_asked_for_is_not_set(trt: StandIn, tmp_path: Path) -> None:
    build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions())
    assert trt.names() == [
        "create_network",
        "parse_from_file",
        "create_builder_config",
        "create_optimization_profile",
        "set_shape",
        "add_optimization_profile",
        "build_serialized_network",
    ]


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF", "BF16"])
def test_no_options_and_no_graph_set_a_precision(trt: StandIn, tmp_path: Path, dtype: str) -> None:
    graph = write_graph(tmp_path, dtype=dtype)
    for hardware, versions, level in itertools.product(
        ("none", "ampere_plus", "same_compute_capability"), (False, True), (None, 5)
    ):
        trt.calls.clear()
        build_engine(graph, (1, *TILE), EngineOptions((1, 1, 1), 2, level, hardware, versions))
        flags = [call[1] for call in trt.calls if call[0] == "set_flag"]
        assert flags == [trt.BuilderFlag.VERSION_COMPATIBLE] * versions
        assert trt.calls[0] == ("create_network", 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        levels = [call[1].name.lower() for call in trt.calls if call[0] == "hardware_compatibility_level"]
        assert levels == [hardware] * (hardware != "none")


def test_a_version_without_the_flag_is_strongly_typed_anyway(
    monkeypatch: pytest.MonkeyPatch, trt: StandIn, tmp_path: Path
) -> None:
    monkeypatch.setattr(trt, "NetworkDefinitionCreationFlag", type("Flags", (), {}))
    build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions())
    assert trt.calls[0] == ("create_network", 0)


def test_the_first_versions_10_know_fewer_hardware_levels(
    monkeypatch: pytest.MonkeyPatch, trt: StandIn, tmp_path: Path
) -> None:
    monkeypatch.setattr(trt, "HardwareCompatibilityLevel", type("Levels", (), {"AMPERE_PLUS": 1}))
    with one_line("key export.hardware_compatible", "same_compute_capability", "ampere_plus", trt.__version__):
        options = EngineOptions(hardware_compatible="same_compute_capability")
        build_engine(write_graph(tmp_path), (1, *TILE), options)


@pytest.mark.parametrize(
    "method, fragment",
    [
        ("parse_from_file", "a refusal without a reason"),
        ("add_optimization_profile", "key export.batch"),
        ("create_timing_cache", "timing.cache"),
        ("set_timing_cache", "timing.cache"),
        ("build_serialized_network", "no engine"),
        ("get_timing_cache", "timing.cache"),
        ("serialize", "timing.cache"),
    ],
)
def test_a_build_that_tensorrt_refuses_is_one_line(trt: StandIn, tmp_path: Path, method: str, fragment: str) -> None:
    trt.refusing = {method}
    with one_line(fragment):
        build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions(), tmp_path / "timing.cache")
    assert trt.names()[-1] == method  # nothing is tried after a refusal
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]


def test_the_parsers_errors_are_listed(trt: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_text("node 7:\n  no Foo here\n\nsecond\n\nthird\n\nfourth\n\nfifth")
    with one_line(str(path), "node 7: no Foo here; second; third and 2 more", trt.__version__):
        build_engine(path, (1, *TILE), EngineOptions())
    assert "build_serialized_network" not in trt.names()


@pytest.mark.parametrize(
    "graph, fragments",
    [
        ({"inputs": {"a": [-1, 1, *TILE], "b": [-1, 1, *TILE]}}, ["one input", "2 and 1"]),
        ({"outputs": {"a": [-1, 1, *TILE], "b": [-1, 1, *TILE]}}, ["one output", "1 and 2"]),
        ({"inputs": {"tiles": [-1, 1, 4, 10, 6]}}, ["(B, 1, 4, 6, 10)", "(-1, 1, 4, 10, 6)"]),
        ({"inputs": {"tiles": [-1, 1, 6, 10]}}, ["(B, 1, 4, 6, 10)", "(-1, 1, 6, 10)"]),
        ({"batch": 4}, ["batches of 1 to 8", "for 4 only", "export.batch=[4,4,4]"]),
    ],
)
def test_a_graph_that_is_not_what_was_said_is_refused(
    trt: StandIn, tmp_path: Path, graph: dict[str, Any], fragments: list[str]
) -> None:
    path = write_graph(tmp_path, **graph)
    with one_line(str(path), *fragments):
        build_engine(path, (1, *TILE), EngineOptions())
    assert "build_serialized_network" not in trt.names()


def test_a_graph_of_one_batch_is_built_for_that_batch(trt: StandIn, tmp_path: Path) -> None:
    network = load(build_engine(write_graph(tmp_path, batch=4), (1, *TILE), EngineOptions((4, 4, 4))))
    assert network.max_batch == 4
    tiles = random_tiles(5)
    torch.testing.assert_close(network(tiles), expected_heatmaps(tiles), rtol=0, atol=0)


def test_a_missing_graph_and_a_folder_as_cache_are_named(trt: StandIn, tmp_path: Path) -> None:
    with one_line(str(tmp_path / "no.onnx"), "nothing there"):
        build_engine(tmp_path / "no.onnx", (1, *TILE), EngineOptions())
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "precious").touch()
    with one_line(str(tmp_path / "caches"), "a folder"):
        build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions(), tmp_path / "caches")
    assert (tmp_path / "caches" / "precious").exists() and not trt.calls


def test_the_timing_cache_grows_and_is_whole_or_absent(
    trt: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, cache = write_graph(tmp_path), tmp_path / "caches" / "timing.cache"
    build_engine(graph, (1, *TILE), EngineOptions(), cache)
    assert cache.read_bytes() == b"measured;"
    build_engine(graph, (1, *TILE), EngineOptions(), cache)
    assert [call[1] for call in trt.calls if call[0] == "create_timing_cache"] == [b"", b"measured;"]
    assert cache.read_bytes() == b"measured;measured;"

    write_bytes = Path.write_bytes

    def write_half(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "write_bytes", write_half)
        build_engine(graph, (1, *TILE), EngineOptions(), cache)
    trt.refusing = {"build_serialized_network"}
    with one_line("no engine"):
        build_engine(graph, (1, *TILE), EngineOptions(), cache)
    assert cache.read_bytes() == b"measured;measured;"
    assert [path.name for path in cache.parent.iterdir()] == ["timing.cache"]


@pytest.mark.parametrize(
    "values, key",
    [
        ({"batch": (0, 1, 2)}, "batch"),
        ({"batch": (2, 1, 4)}, "batch"),
        ({"batch": (1, 5, 4)}, "batch"),
        ({"batch": (1, 4)}, "batch"),
        ({"batch": (1, 2.0, 4)}, "batch"),
        ({"batch": 4}, "batch"),
        ({"workspace_gib": 0}, "workspace_gib"),
        ({"workspace_gib": float("nan")}, "workspace_gib"),
        ({"workspace_gib": "4"}, "workspace_gib"),
        ({"optimization_level": 6}, "optimization_level"),
        ({"optimization_level": -1}, "optimization_level"),
        ({"optimization_level": True}, "optimization_level"),
        ({"hardware_compatible": "ampere"}, "hardware_compatible"),
        ({"hardware_compatible": True}, "hardware_compatible"),
        ({"version_compatible": "no"}, "version_compatible"),
    ],
)
def test_impossible_options_are_named(values: dict[str, Any], key: str) -> None:
    with one_line(f"key export.{key}:"):
        EngineOptions(**values)


def test_a_misspelt_level_is_guessed() -> None:
    with one_line("did you mean 'ampere_plus'?"):
        EngineOptions(hardware_compatible="ampere-plus")


def test_an_engines_key_changes_with_each_ingredient() -> None:
    other_options = [
        EngineOptions(**{name: value})
        for name, value in {
            "batch": (1, 4, 9),
            "workspace_gib": 2,
            "optimization_level": 0,
            "hardware_compatible": "ampere_plus",
            "version_compatible": True,
        }.items()
    ]
    assert len(other_options) == len(dataclasses.fields(EngineOptions))
    base: tuple = ("ab12", EngineOptions(), "NVIDIA H200", "10.13.3")
    keys = [
        engine_key(*base),
        engine_key("ab13", *base[1:]),
        *(engine_key("ab12", options, *base[2:]) for options in other_options),
        engine_key(*base[:2], "NVIDIA H100", "10.13.3"),
        engine_key(*base[:3], "11.4.0"),
    ]
    assert len(set(keys)) == len(keys) == 9
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in keys)


def test_an_engines_key_is_that_of_the_values_and_stays() -> None:
    from_configuration: Any = [1, 4, 8]
    keys = {
        engine_key("ab12", EngineOptions(batch, workspace), "NVIDIA H200", "10.13.3")
        for batch, workspace in [((1, 4, 8), 4), (from_configuration, 4.0)]
    }
    assert keys == {"dfaa70314dee3f54"}  # another one would rebuild every user's engines


# ---- what is missing -------------------------------------------------------------------------------------------------


class Tripwire:
    """Finder that lets nobody import TensorRT."""

    def find_spec(self, name: str, *_: object) -> None:
        assert name.partition(".")[0] != "tensorrt", "imported"


@pytest.mark.parametrize("use", ["require", "build", "load"])
def test_without_a_gpu_tensorrt_is_not_even_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use: str) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Tripwire(), *sys.meta_path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="imported"):
        import tensorrt  # noqa: F401
    with one_line("TensorRT: expected an NVIDIA GPU", "export.format=onnx"):
        if use == "require":
            require_tensorrt()
        elif use == "build":
            build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions())
        else:
            TensorRTNetwork(b"engine")


def test_without_tensorrt_the_cure_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with one_line("pip install 'czii25d[tensorrt]' --extra-index-url https://pypi.nvidia.com"):
        require_tensorrt()


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, "8.6.1"), one_line("version 10 or newer", "8.6.1"):
        require_tensorrt()


def test_require_returns_the_module(trt: StandIn) -> None:
    assert require_tensorrt() is trt


def test_warnings_and_errors_go_to_the_log(trt: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    bridge = tensorrt_logger()
    assert isinstance(bridge, trt.ILogger) and bridge.ready and tensorrt_logger() is bridge
    with caplog.at_level(logging.DEBUG):
        for severity in trt.ILogger.Severity:
            bridge.log(severity, f"this is {severity.name}")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "TensorRT: this is INTERNAL_ERROR"),
        ("ERROR", "TensorRT: this is ERROR"),
        ("WARNING", "TensorRT: this is WARNING"),
    ]


# ---- predicting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF", "BF16"])
@pytest.mark.parametrize("batch", [0, 1, 3, 4, 5, 9])
def test_any_number_of_tiles_is_predicted(trt: StandIn, tmp_path: Path, dtype: str, batch: int) -> None:
    network = build_and_load(tmp_path, (2, 3, 4), dtype)
    assert (network.tile_shape, network.class_num, network.max_batch) == (TILE, CLASSES, 4)
    tiles = random_tiles(batch)
    heatmaps = network(tiles)
    assert heatmaps.dtype == torch.float32 and heatmaps.device == network.device
    torch.testing.assert_close(heatmaps, expected_heatmaps(tiles), rtol=0, atol=0)
    assert {run.dtype for run in trt.executed} <= {tensorrt_stand_ins.TORCH_DTYPES[dtype]}


def test_batches_are_split_and_filled_up_with_nothing(trt: StandIn, tmp_path: Path) -> None:
    network = build_and_load(tmp_path, (2, 3, 4))
    network(random_tiles(9))
    assert [len(run) for run in trt.executed] == [4, 4, 2]
    assert (trt.executed[1] != 0).all() and (trt.executed[2][0] != 0).all()
    assert (trt.executed[2][1] == 0).all(), "tiles of an earlier batch"


def test_heatmaps_outlive_the_next_call(trt: StandIn, tmp_path: Path) -> None:
    network = build_and_load(tmp_path)
    tiles, others = random_tiles(3, seed=1), random_tiles(3, seed=2)
    heatmaps = network(tiles)
    network(others)
    torch.testing.assert_close(heatmaps, expected_heatmaps(tiles), rtol=0, atol=0)
    assert not torch.equal(tiles, others)


class CopyWatch(TorchFunctionMode):
    """Notes each write to a tensor among the other calls."""

    def __init__(self, calls: list[tuple]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.zero_):
            self.calls.append((func.__name__,))
        return func(*args, **(kwargs or {}))


def test_the_own_stream_lies_between_the_callers_work(trt: StandIn, tmp_path: Path) -> None:
    network = build_and_load(tmp_path, (2, 2, 2))
    trt.calls.clear()
    tiles = random_tiles(3)
    with CopyWatch(trt.calls):
        network(tiles)
    assert trt.calls == [
        ("own waits for", "caller"),
        ("enter", "own"),
        ("copy_",),
        ("zero_",),
        ("set_input_shape", "tiles", (2, 1, *TILE)),
        ("execute_async_v3", OWN_HANDLE),
        ("copy_",),  # of the stand-in's engine
        ("copy_",),
        ("copy_",),
        ("zero_",),
        ("set_input_shape", "tiles", (2, 1, *TILE)),
        ("execute_async_v3", OWN_HANDLE),
        ("copy_",),
        ("copy_",),
        ("exit", "own"),
        ("record_stream", (3, 1, *TILE), "own"),
        ("record_stream", (3, CLASSES, *TILE), "own"),
        ("caller waits for", "own"),
    ]


def test_an_engine_is_loaded_once_on_its_own_stream(trt: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "net.engine"
    path.write_bytes(build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions()))
    trt.calls.clear()
    network = load(path)
    names = trt.names()
    assert names == [
        "own waits for",
        "enter",
        "deserialize_cuda_engine",
        "create_execution_context",
        "set_tensor_address",
        "set_tensor_address",
        "exit",
        "caller waits for",
    ]
    addresses = [call[1:] for call in trt.calls if call[0] == "set_tensor_address"]
    assert [name for name, _ in addresses] == ["tiles", "heatmaps"] and addresses[0][1] != addresses[1][1]
    network(random_tiles(20))
    assert not {"deserialize_cuda_engine", "set_tensor_address"} & set(trt.names()[len(names) :])


def test_what_the_context_needs_is_kept(trt: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    born: list[weakref.ref] = []
    for kind in (trt.Runtime, trt.ICudaEngine, trt.IExecutionContext):
        init = kind.__init__

        def remembered(self: Any, *args: Any, init: Any = init) -> None:
            born.append(weakref.ref(self))
            init(self, *args)

        monkeypatch.setattr(kind, "__init__", remembered)
    network = build_and_load(tmp_path)
    gc.collect()
    assert len(born) == 3 and all(ref() is not None for ref in born)
    del network
    gc.collect()
    assert all(ref() is None for ref in born)


@pytest.mark.parametrize(
    "method, fragment",
    [
        ("deserialize_cuda_engine", "export it again here with export_trt.py"),
        ("create_execution_context", "memory"),
        ("set_tensor_address", "the buffer of its tensor tiles"),
    ],
)
def test_an_engine_that_does_not_load_is_one_line(
    trt: StandIn, tmp_path: Path, method: str, fragment: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "net.engine"
    path.write_bytes(build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions()))
    trt.refusing = {method}
    with one_line(str(path), fragment):
        load(path)
    assert f"TensorRT: {method} failed" in caplog.messages


@pytest.mark.parametrize("method, fragment", [("set_input_shape", "a batch of 3"), ("execute_async_v3", "to run")])
def test_a_run_that_tensorrt_refuses_is_one_line(trt: StandIn, tmp_path: Path, method: str, fragment: str) -> None:
    network = build_and_load(tmp_path)
    trt.calls.clear()
    trt.refusing = {method}
    with one_line("the engine", fragment):
        network(random_tiles(3))
    assert ("execute_async_v3" in trt.names()) == (method == "execute_async_v3")
    assert trt.calls[-1] == ("caller waits for", "own"), "the buffers may still be in use"
    trt.refusing = set()
    tiles = random_tiles(3)
    torch.testing.assert_close(network(tiles), expected_heatmaps(tiles), rtol=0, atol=0)


def test_bytes_that_are_no_engine_are_refused(trt: StandIn, tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 a checkpoint"):
        with one_line("the engine", "an engine of this GPU and TensorRT version", trt.__version__):
            load(content)
    with one_line(str(tmp_path / "no.engine"), "nothing there"):
        load(tmp_path / "no.engine")
    with one_line(str(tmp_path), "a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "graph, fragment",
    [
        ({"outputs": {"a": [-1, 1, *TILE], "b": [-1, 1, *TILE]}}, "b (-1, 1, 4, 6, 10)"),
        ({"inputs": {"tiles": [-1, 3, *TILE]}}, "tiles (-1, 3, 4, 6, 10)"),
        ({"outputs": {"heatmaps": [-1, 3, 2, 6, 10]}}, "heatmaps (-1, 3, 2, 6, 10)"),
        ({"outputs": {"scores": [-1, 3]}}, "scores (-1, 3)"),
        ({"dtype": "INT8"}, "float32, float16 or bfloat16"),
    ],
)
def test_an_engine_of_another_kind_is_refused(
    trt: StandIn, tmp_path: Path, graph: dict[str, Any], fragment: str
) -> None:
    content = json.loads(write_graph(tmp_path, **graph).read_text())
    shapes = [[batch, *next(iter(content["inputs"].values()))[1:]] for batch in (1, 2, 4)]
    plan = {
        "graph": content,
        "profile": {"tiles": shapes},
        "version": trt.__version__,
        "version_compatible": False,
    }
    with one_line("the engine", fragment):
        load(json.dumps(plan).encode())
    assert not trt.executed


@pytest.mark.parametrize("shape", [(2, 1, 4, 10, 6), (2, 3, *TILE), (1, *TILE), (2, 1, 8, 6, 10)])
def test_other_tiles_are_refused(trt: StandIn, tmp_path: Path, shape: tuple[int, ...]) -> None:
    network = build_and_load(tmp_path)
    with one_line("key infer.tile", "[4, 6, 10]"):
        network(torch.zeros(shape))
    assert not trt.executed


def test_a_cpu_is_refused(trt: StandIn) -> None:
    with one_line("key infer.device", "found cpu", "infer.device=cuda"):
        TensorRTNetwork(b"engine", "cpu")
    assert not trt.calls


@pytest.mark.parametrize("built, here", list(itertools.product(VERSIONS, VERSIONS)))
@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_compatible_engines_run_on_later_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: str, here: str, version_compatible: bool
) -> None:
    with installed(monkeypatch, built):
        options = EngineOptions((1, 2, 4), version_compatible=version_compatible)
        engine = build_engine(write_graph(tmp_path), (1, *TILE), options)
    with installed(monkeypatch, here) as trt:
        if built == here or (version_compatible and built < here):
            tiles = random_tiles(3)
            network = load(engine, version_compatible=version_compatible)
            torch.testing.assert_close(network(tiles), expected_heatmaps(tiles), rtol=0, atol=0)
        else:
            with one_line(f"TensorRT version ({here})"):
                load(engine, version_compatible=version_compatible)
        allowed = [call for call in trt.calls if call[0] == "engine_host_code_allowed"]
        assert allowed == [("engine_host_code_allowed", True)] * version_compatible


def test_code_in_an_engine_is_run_only_where_that_was_asked_for(trt: StandIn, tmp_path: Path) -> None:
    engine = build_engine(write_graph(tmp_path), (1, *TILE), EngineOptions(version_compatible=True))
    with one_line("export it again"):
        load(engine)
    load(engine, version_compatible=True)


def test_a_whole_volume_goes_through_it(trt: StandIn, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).standard_normal((7, 15, 22)).astype(np.float32)
    network = build_and_load(tmp_path, (2, 3, 4))
    options = InferenceOptions(tile_shape=TILE, stride=(3, 4, 7), batch_size=5)
    heatmap = predict_heatmap(ArrayVolume(volume), network, network.class_num, options)
    np.testing.assert_allclose(heatmap, expected_heatmaps(torch.from_numpy(volume)), atol=1e-5)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_stub_holds_what_both_versions_have() -> None:
    tree = ast.parse((PROJECT / "stubs/tensorrt/__init__.pyi").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names = {(kind.name, name) for kind in classes for name in member_names(kind)}
    assert len(names) > 50
    for version, (kind, name) in itertools.product(VERSIONS, sorted(names)):
        assert hasattr(getattr(StandIn(version), kind), name), f"{kind}.{name} in {version}"
    assert not names & {(kind, name) for kind, dropped in REMOVED.items() for name in dropped}


def member_names(kind: ast.ClassDef) -> Iterator[str]:
    for node in kind.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_the_stand_in_of_11_lacks_what_was_removed() -> None:
    old, new = (StandIn(version) for version in VERSIONS)
    for kind, names in REMOVED.items():
        for name in names:
            assert hasattr(getattr(old, kind), name) and not hasattr(getattr(new, kind), name), f"{kind}.{name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.parent.name)
def test_nothing_that_was_removed_is_named_and_nothing_is_imported_early(path: Path) -> None:
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    # What tensors hold is still said, in trt.DataType.BF16.
    named = {node.attr for node in attributes if not ast.unparse(node.value).endswith("DataType")}
    named |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    dropped = {name for names in REMOVED.values() for name in names}
    assert not named & dropped
    early = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert "tensorrt" not in early and "logging" in early


# ---- the real one ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of bindings that lag behind Python
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_real_engine_is_built_and_runs(tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt")
    onnx = pytest.importorskip("onnx")
    convolution = torch.nn.Conv3d(1, CLASSES, 3, padding=1).requires_grad_(False)
    path = tmp_path / "net.onnx"
    write_convolution(onnx, path, convolution, precision)
    options = EngineOptions((2, 3, 4), workspace_gib=1, optimization_level=1)
    cache = tmp_path / "timing.cache"
    engine = build_engine(path, (1, *TILE), options, cache)
    assert cache.stat().st_size > 0
    network = TensorRTNetwork(engine)
    assert (network.tile_shape, network.class_num, network.max_batch) == (TILE, CLASSES, 4)
    tolerance = 1e-2 if precision == "float16" else 5e-3  # TensorRT may use TF32 where the graph says float32
    results = []
    for batch in (1, 4, 9):
        tiles = torch.randn(batch, 1, *TILE)
        results.append((network(tiles.cuda()), convolution(tiles)))  # all kept, so that overwriting shows
    for heatmaps, expected in results:
        assert heatmaps.is_cuda and heatmaps.dtype == torch.float32
        torch.testing.assert_close(heatmaps.cpu(), expected, rtol=0, atol=tolerance)


def write_convolution(onnx: Any, path: Path, convolution: torch.nn.Conv3d, precision: str) -> None:
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(precision))
    weights = [
        onnx.numpy_helper.from_array(tensor.numpy().astype(precision), name)
        for name, tensor in (("weight", convolution.weight), ("bias", convolution.bias))
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["tiles", "weight", "bias"], ["heatmaps"], pads=[1] * 6)],
        "convolution",
        [onnx.helper.make_tensor_value_info("tiles", dtype, ["batch", 1, *TILE])],
        [onnx.helper.make_tensor_value_info("heatmaps", dtype, ["batch", CLASSES, *TILE])],
        weights,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
