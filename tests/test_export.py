"""export_trt.py and the runtimes: the same network everywhere, or a refusal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from conftest import SPACING, run_script
from test_predict_score import FLOOR, LOW, MODEL, PARTICLES, compose, save
from torch import nn

from czii25d.data.volumes import write_volume
from czii25d.errors import InputError
from czii25d.export.manifest import read_manifest
from czii25d.export.onnx import FusedEnsemble, check_graph, export_onnx, in_precision
from czii25d.export.tensorrt import EngineOptions
from czii25d.models import create_model
from czii25d.models.checkpoint import load_checkpoint, save_weights
from czii25d.particles import ParticleSet
from czii25d.picks import read_picks_csv
from czii25d.pipeline.export import export
from czii25d.pipeline.predict import predict
from czii25d.runtimes.onnxruntime import OnnxRuntimeNetwork
from czii25d.runtimes.openvino import OpenVinoNetwork
from czii25d.runtimes.torch import TorchNetwork

TILE = (16, 32, 32)
RUNTIMES = {"onnxruntime": OnnxRuntimeNetwork, "openvino": lambda path: OpenVinoNetwork(path, "fp32")}
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}


def network(seed: int = 0, **model: Any) -> nn.Module:
    torch.manual_seed(seed)
    net = create_model(**{**MODEL, **model}, pretrained=False).eval()
    for module in net.modules():  # statistics of a network that has seen something
        if isinstance(module, nn.BatchNorm3d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network in each precision. Read-only."""
    folder = tmp_path_factory.mktemp("graphs")
    for precision in TOLERANCE:
        export_onnx(network(), folder / f"{precision}.onnx", TILE, precision)  # type: ignore[arg-type]
    return {precision: folder / f"{precision}.onnx" for precision in TOLERANCE}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared volume, two checkpoints and their ONNX files. Read-only."""
    root = tmp_path_factory.mktemp("export")
    volume = np.random.default_rng(0).standard_normal((24, 40, 56)).astype(np.float32)
    write_volume(root / "output/volumes/test/TS_1", volume, SPACING, {})
    save(root / "folds/a.safetensors", 1, thresholds=dict.fromkeys(PARTICLES.names, 0.2))
    save(root / "folds/b.safetensors", 2, ParticleSet([PARTICLES[1], PARTICLES[0]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        export(compose("export", "checkpoints=folds", "export.precision=fp32"))
    return root


@pytest.fixture
def work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pick(*overrides: str) -> pd.DataFrame:
    config = compose("predict", FLOOR, LOW, *overrides)
    predict(config)
    return read_picks_csv(Path(config.predictions) / "scored_picks.csv", scored=True)


def assert_same_picks(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Compare as sets: picks of equal scores may come in either order."""
    order = ["particle", "x", "y", "z"]
    pairs = [frame.round(1).sort_values(order).reset_index(drop=True) for frame in (found, expected)]
    assert len(found) == len(expected) > 100
    pd.testing.assert_frame_equal(*pairs, atol=0.15, rtol=0)
    np.testing.assert_allclose(np.sort(found["score"]), np.sort(expected["score"]), atol=1e-3)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_graph_computes_what_torch_does(graphs: dict[str, Path], precision: str, runtime: str) -> None:
    if (precision, runtime) == ("bf16", "onnxruntime"):
        pytest.skip("ONNX Runtime has no bf16 convolution on a CPU")
    predictor = RUNTIMES[runtime](graphs[precision])
    assert predictor.tile_shape == TILE and predictor.class_num == 2
    for batch in (1, 2, 5):
        tiles = torch.randn(batch, 1, *TILE)
        expected, found = TorchNetwork(network())(tiles), predictor(tiles)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= TOLERANCE[precision] * (expected.max() - expected.min())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_later_calls_leave_results_alone(graphs: dict[str, Path], runtime: str) -> None:
    predictor = RUNTIMES[runtime](graphs["fp32"])
    first = predictor(torch.ones(2, 1, *TILE))
    kept = first.clone()
    predictor(torch.zeros(2, 1, *TILE))
    assert torch.equal(first, kept)


def test_signals_find_their_stack_when_another_thread_drops_openvino(graphs: dict[str, Path]) -> None:
    """OpenVINO's plugin would take the memory of the signal stack with it: dead by SIGSEGV, without a word."""
    code = """
import faulthandler, gc, os, signal, sys, threading
faulthandler.enable()
from czii25d.runtimes.openvino import OpenVinoNetwork
networks = [OpenVinoNetwork(sys.argv[1])]
dropping = threading.Thread(target=lambda: (networks.clear(), gc.collect()))
dropping.start(), dropping.join()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    told = subprocess.run([sys.executable, "-c", code, graphs["fp32"]], capture_output=True, text=True, timeout=300)
    assert (told.returncode, told.stdout) == (0, "heard\n"), told.stderr


def test_every_computing_node_has_the_asked_type(graphs: dict[str, Path]) -> None:
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    for precision, path in graphs.items():
        model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        types = {weight.name: weight.data_type for weight in model.graph.initializer}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        assert len(convolutions) > 10
        assert {types[node.input[1]] for node in convolutions} == {wanted[precision]}
        for other in set(TOLERANCE) - {precision}:
            with pytest.raises(InputError, match=f"Conv in {other}|Gemm in {other}|MatMul in {other}"):
                check_graph(path, other)  # type: ignore[arg-type]


def test_a_single_convolution_of_another_type_is_found(graphs: dict[str, Path], tmp_path: Path) -> None:
    """One convolution in float32 among those in float16, as exporters leave it behind without a word."""
    model = onnx.load(graphs["fp16"])
    node = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    place = list(model.graph.node).index(node)
    casts = [onnx.helper.make_node("Cast", [name], [f"{name}_32"], to=float32) for name in node.input]
    back = onnx.helper.make_node("Cast", [f"{node.output[0]}_32"], [node.output[0]], to=float16)
    node.input[:] = [f"{name}_32" for name in node.input]
    node.output[0] = f"{node.output[0]}_32"
    model.graph.node.insert(place + 1, back)
    for cast in reversed(casts):
        model.graph.node.insert(place, cast)
    onnx.save(model, tmp_path / "mixed.onnx")
    with pytest.raises(InputError, match="Conv in fp16, found FLOAT"):
        check_graph(tmp_path / "mixed.onnx", "fp16")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no graph at all")
    for read in (lambda path: check_graph(path, "fp32"), *RUNTIMES.values()):
        with pytest.raises(InputError, match=r"no\.onnx") as caught:
            read(tmp_path / "no.onnx")
        assert "\n" not in str(caught.value)


def test_the_network_itself_stays_as_it_was() -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    converted = in_precision(net, "fp16")
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float16, torch.float32}
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(InputError, match=r"export\.precision"):
        in_precision(net, "int8")  # type: ignore[arg-type]


def test_a_fused_ensemble_is_the_weighted_mean_in_the_common_order(tmp_path: Path) -> None:
    nets = [network(1), network(2)]
    fused = FusedEnsemble(nets, [[0, 1], [1, 0]], [1.0, 3.0])
    export_onnx(fused, tmp_path / "fused.onnx", TILE)
    tiles = torch.randn(3, 1, *TILE)
    with torch.inference_mode():
        expected = 0.25 * nets[0](tiles) + 0.75 * nets[1](tiles)[:, [1, 0]]
    torch.testing.assert_close(OnnxRuntimeNetwork(tmp_path / "fused.onnx")(tiles), expected, atol=1e-4, rtol=0)


def test_a_backbone_with_batch_normalisation_is_exported_too(tmp_path: Path) -> None:
    net = network(0, backbone="test_resnet")
    for precision in ("fp32", "fp16"):
        export_onnx(net, tmp_path / f"{precision}.onnx", TILE, precision)  # type: ignore[arg-type]
        tiles = torch.randn(2, 1, *TILE)
        expected = TorchNetwork(net)(tiles)
        error = (OnnxRuntimeNetwork(tmp_path / f"{precision}.onnx")(tiles) - expected).abs().max()
        assert error <= TOLERANCE[precision] * (expected.max() - expected.min())


# ---- export_trt.py ---------------------------------------------------------------------------------------------------


def test_what_is_exported_says_what_it_is(work: Path) -> None:
    _, card = load_checkpoint("folds/a.safetensors")
    manifest = read_manifest("output/engines/a.fp32.onnx")
    assert manifest.card == card and manifest.tile_shape == TILE and manifest.precision == "fp32"
    assert [source["checkpoint"] for source in manifest.sources] == ["a.safetensors"]
    kinds = {f"{runtime}, {kind} tiles" for runtime in RUNTIMES for kind in ("random", "real")}
    assert set(manifest.largest_error) == kinds and max(manifest.largest_error.values()) < 1e-4
    assert manifest.versions["torch"] == torch.__version__.split("+")[0] or manifest.versions["torch"]
    assert {path.name for path in (work / "output/engines").iterdir()} == {
        f"{name}.fp32.onnx{suffix}" for name in "ab" for suffix in ("", ".json")
    }


def test_what_is_up_to_date_is_not_made_again(work: Path) -> None:
    path = work / "output/engines/a.fp32.onnx"
    before = path.stat().st_mtime_ns
    export(compose("export", "checkpoints=folds/a.safetensors", "export.precision=fp32"))
    assert path.stat().st_mtime_ns == before
    save(work / "folds/a.safetensors", 7)
    export(compose("export", "checkpoints=folds/a.safetensors", "export.precision=fp32"))
    assert path.stat().st_mtime_ns != before


def test_a_graph_that_does_not_agree_is_not_kept(work: Path) -> None:
    with pytest.raises(InputError, match=r"a\.fp16\.onnx.*within 1e-09.*nothing was kept"):
        export(compose("export", "checkpoints=folds/a.safetensors", "export.atol=1e-9", "engines=new"))
    assert not list(Path("new").rglob("*.onnx*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoints=nowhere.ckpt"], "key checkpoints"),
        (["checkpoints=output/engines/a.fp32.onnx"], "a checkpoint, found an export"),
        (["export.precision=int8"], "export.precision"),
        (["export.format=trt"], "export.format"),
        (["export.batch=[4,2,8]"], "export.batch"),
        (["export.tile=[16,40,32]"], "export.tile"),
        (["export.weights=[1,2,3]"], "3|weights"),
    ],
)
def test_bad_keys_are_one_clear_line(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(compose("export", "checkpoints=folds/a.safetensors", "engines=new", *overrides))
    assert not Path("new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_without_a_gpu_is_an_error_and_auto_falls_back_to_onnx(work: Path) -> None:
    result = run_script(
        "export_trt.py", "checkpoints=folds/a.safetensors", "export.format=engine", cwd=work, check=False
    )
    assert result.stderr.count("\n") == 1 and "NVIDIA GPU" in result.stderr
    result = run_script("export_trt.py", "checkpoints=folds/a.safetensors", "engines=new", cwd=work)
    assert "ONNX files only" in result.stderr and (work / "new/a.fp16.onnx.json").is_file()


# ---- 21 with exports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_a_checkpoint_and_an_ensemble_give_the_same_picks_by_every_runtime(work: Path, runtime: str) -> None:
    for checkpoints in ("folds/a.safetensors", "folds"):
        expected = pick(f"checkpoints={checkpoints}", "infer.runtime=torch", "infer.precision=fp32")
        found = pick(f"checkpoints={checkpoints}", f"infer.runtime={runtime}", "infer.precision=fp32")
        assert_same_picks(found, expected)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_onnx_file_gives_the_picks_of_its_checkpoint(work: Path, runtime: str) -> None:
    keys = f"infer.runtime={runtime}", "infer.precision=fp32"
    expected = pick("checkpoints=folds/a.safetensors", "infer.runtime=torch", "infer.precision=fp32")
    assert_same_picks(pick("checkpoints=output/engines/a.fp32.onnx", *keys), expected)
    both = pick("checkpoints=folds", "infer.runtime=torch", "infer.precision=fp32")
    assert_same_picks(pick("checkpoints=[folds/a.safetensors,output/engines/b.fp32.onnx]", *keys), both)
    export(compose("export", "checkpoints=folds", "export.precision=fp32", "export.fuse=true", "engines=fused"))
    assert_same_picks(pick("checkpoints=fused", *keys), both)


def test_thresholds_come_with_the_onnx_file(work: Path) -> None:
    predict(compose("predict", "checkpoints=output/engines/a.fp32.onnx", FLOOR))
    scored = read_picks_csv("output/predictions/scored_picks.csv", scored=True)
    assert len(read_picks_csv("output/predictions/submission.csv")) == (scored["score"] >= 0.2).sum() > 0


def test_members_of_different_tiles_are_averaged(work: Path) -> None:
    expected = pick("checkpoints=folds", "infer.runtime=torch", "infer.tile=[16,32,32]")
    wide = create_model(**{**MODEL, "img_size": 64}, pretrained=False)
    net, card = load_checkpoint("folds/b.safetensors")
    wide.load_state_dict(net.state_dict())
    save_weights("folds/b.safetensors", wide, replace(card, model={**card.model, "img_size": 64}))
    mixed = pick("checkpoints=folds", "infer.runtime=torch")
    assert len(mixed) != 0 and not mixed.equals(expected)
    assert_same_picks(pick("checkpoints=folds", "infer.runtime=torch", "infer.tile=[16,32,32]"), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoints=output/engines/a.fp32.onnx", "infer.runtime=torch"], "onnxruntime.*found torch"),
        (["checkpoints=output/engines/a.fp32.onnx", "infer.runtime=tensorrt"], "make an engine of it"),
        (["checkpoints=output/engines/a.fp32.onnx", "infer.tile=[16,64,64]"], r"\[16, 32, 32\], the tile of"),
        (["checkpoints=folds", "infer.runtime=jax"], "infer.runtime"),
        (["checkpoints=folds", "infer.weights=[1,0]"], "infer.weights"),
        (["checkpoints=folds", "infer.tta=[mirror]"], "infer.tta"),
        (["checkpoints=folds", "infer.shard=2/2"], "infer.shard"),
        (["checkpoints=folds", "infer.compile=fast", "infer.runtime=torch"], "infer.compile"),
        (["checkpoints=folds", "infer.tile=[16,40,32]"], "infer.tile"),
        (["checkpoints=folds", "source=cloud"], "key source"),
    ],
)
def test_bad_keys_of_prediction_are_one_clear_line(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pick(*overrides)


def test_a_manifest_that_is_missing_or_of_another_file_is_refused(work: Path) -> None:
    shutil.copy("output/engines/a.fp32.onnx.json", "output/engines/b.fp32.onnx.json")
    with pytest.raises(InputError, match=r"b\.fp32\.onnx\.json.*that of another file"):
        pick("checkpoints=output/engines/b.fp32.onnx")
    Path("output/engines/b.fp32.onnx.json").unlink()
    with pytest.raises(InputError, match=r"b\.fp32\.onnx\.json.*no file"):
        pick("checkpoints=output/engines/b.fp32.onnx")
    content = json.loads(Path("output/engines/a.fp32.onnx.json").read_text())
    for damage in ("{", "[]", json.dumps({**content, "format_version": 99}), json.dumps({**content, "card": {}})):
        Path("output/engines/a.fp32.onnx.json").write_text(damage)
        with pytest.raises(InputError, match=r"a\.fp32\.onnx\.json"):
            pick("checkpoints=output/engines/a.fp32.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_an_engine_without_a_gpu_is_refused_before_it_is_touched(work: Path) -> None:
    for suffix in ("", ".json"):
        shutil.copy(f"output/engines/a.fp32.onnx{suffix}", f"output/engines/a.fp32.engine{suffix}")
    with pytest.raises(InputError, match="NVIDIA GPU"):
        pick("checkpoints=output/engines/a.fp32.engine")


# ---- engines, with stand-ins for TensorRT and the GPU ----------------------------------------------------------------


class StandInEngine(TorchNetwork):
    """Runs the network that was exported last, as an engine of it would; ``error`` is added to its heatmaps."""

    network: nn.Module
    error = 0.0

    def __init__(self, engine: Path, device: str, version_compatible: bool) -> None:
        assert engine.read_bytes() == b"an engine"
        super().__init__(StandInEngine.network)

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        return super().__call__(tiles) + StandInEngine.error


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, work: Path) -> list[Any]:
    """A machine that seems to have TensorRT 10.9 and an H200; returns the engines that are built."""
    built: list[Any] = []

    def build(graph: Path, shape: tuple[int, ...], options: EngineOptions, timing: Path) -> bytes:
        built.append((graph.name, shape, options, timing.name))
        return b"an engine"

    trt = SimpleNamespace(__version__="10.9.0")
    StandInEngine.network, StandInEngine.error = load_checkpoint("folds/a.safetensors")[0], 0.0
    monkeypatch.setattr("czii25d.runtimes.tensorrt.require_tensorrt", lambda: trt)
    monkeypatch.setattr("czii25d.runtimes.tensorrt.TensorRTNetwork", StandInEngine)
    monkeypatch.setattr("czii25d.pipeline.export.build_engine", build)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return built


def test_an_engine_comes_with_all_that_it_depends_on(gpu: list[Any]) -> None:
    keys = "checkpoints=folds/a.safetensors", "engines=new", "export.format=engine", "export.precision=fp32"
    [path] = export(compose("export", *keys, "export.batch=[1,2,16]"))
    assert path == Path("new/a.fp32.engine") and path.read_bytes() == b"an engine"
    assert gpu == [("a.fp32.onnx", (1, *TILE), EngineOptions((1, 2, 16)), "timing-NVIDIA-H200-10.9.0.cache")]
    manifest = read_manifest(path)
    assert manifest.gpu == "NVIDIA H200" and manifest.versions["tensorrt"] == "10.9.0" and manifest.batch == (1, 2, 16)
    assert {"tensorrt, random tiles", "tensorrt, real tiles", "openvino, real tiles"} <= set(manifest.largest_error)
    export(compose("export", *keys, "export.batch=[1,2,16]"))
    assert len(gpu) == 1  # up to date
    export(compose("export", *keys, "export.batch=[1,2,8]"))
    assert len(gpu) == 2  # other options


def test_an_engine_that_does_not_agree_is_not_kept(gpu: list[Any]) -> None:
    StandInEngine.error = 0.5
    with pytest.raises(InputError, match=r"a\.fp32\.engine.*tensorrt on random tiles; nothing was kept"):
        export(compose("export", "checkpoints=folds/a.safetensors", "engines=new", "export.precision=fp32"))
    assert {path.name for path in Path("new").iterdir()} == {"a.fp32.onnx", "a.fp32.onnx.json"}


def test_engines_give_the_picks_of_their_checkpoint_and_those_of_elsewhere_are_refused(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = export(compose("export", "checkpoints=folds/a.safetensors", "engines=new", "export.precision=fp32"))
    expected = pick("checkpoints=folds/a.safetensors", "infer.runtime=torch", "infer.precision=fp32")
    for runtime in ("auto", "tensorrt"):
        assert_same_picks(pick("checkpoints=new", f"infer.runtime={runtime}", "predictions=engines"), expected)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(InputError, match=r"engine of Tesla T4, found one of NVIDIA H200; export it again here"):
        pick("checkpoints=new", "predictions=other")
    monkeypatch.setattr("czii25d.runtimes.tensorrt.require_tensorrt", lambda: SimpleNamespace(__version__="11.0.1"))
    with pytest.raises(InputError, match=r"engine of TensorRT 11\.0\.1, found one of 10\.9\.0"):
        pick("checkpoints=new", "predictions=other")
    path.write_bytes(b"another engine")
    with pytest.raises(InputError, match="that of another file"):
        pick("checkpoints=new", "predictions=other")
