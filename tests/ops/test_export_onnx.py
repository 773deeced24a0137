"""ONNX export: parity at shapes other than the traced one, half precision at high guidance, and files that cannot be used."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import onnx
import onnxruntime
import pydantic
import pytest
import torch
from diffusers import FluxTransformer2DModel

from infra.progress import Progress
from models.errors import ExportError, MissingWeights
from models.flux_fill.loading import load_transformer
from ops.export_onnx import OnnxConfig, export_onnx, feed, open_session, providers, run_session, verify_onnx
from ops.folders import read_metrics
from tests.models.tiny import tiny_transformer


def test_agrees_with_the_network_at_every_shape(exported_onnx: Path) -> None:
    metrics = read_metrics(exported_onnx)
    assert metrics["relative_error"] < 1e-5
    assert metrics["relative_error"] == max(shape["relative_error"] for shape in metrics["shapes"])
    assert [(s["batch"], s["image_tokens"], s["text_tokens"]) for s in metrics["shapes"]] == [(2, 20, 10), (1, 42, 7), (3, 12, 16)]
    assert (metrics["opset"], metrics["provider"], metrics["dtype"]) == (20, "CPUExecutionProvider", "float32")
    assert metrics["bytes"] == (exported_onnx / "transformer.onnx").stat().st_size


def test_it_is_the_policy_that_was_exported(exported_onnx: Path, tiny_base: Path, tiny_policy: Path) -> None:
    assert verify_onnx(exported_onnx / "transformer.onnx", load_transformer(tiny_base, tiny_policy, torch.float32)) == read_metrics(
        exported_onnx
    )
    assert verify_onnx(exported_onnx / "transformer.onnx", load_transformer(tiny_base, None, torch.float32))["relative_error"] > 0.1


def test_tells_nothing_about_the_machine(exported_onnx: Path) -> None:
    text = (exported_onnx / "transformer.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in text
    assert str(Path(__file__).parents[2]).encode() not in text


def test_half_precision_survives_guidance_beyond_its_range(tmp_path: Path) -> None:
    network = FluxTransformer2DModel.from_config({**tiny_transformer().config, "num_layers": 0})  # half the tracing
    network.save_pretrained(tmp_path / "base" / "transformer")
    metrics = export_onnx(OnnxConfig(dtype="float16"), tmp_path / "base", None, tmp_path, Progress())
    assert metrics["dtype"] == "float16" and metrics["relative_error"] < 5e-3
    transformer = load_transformer(tmp_path / "base", None, torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 6, 384),
        "encoder_hidden_states": torch.randn(1, 5, transformer.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([80.0]),  # times 1000 is infinite in float16
        "img_ids": torch.cartesian_prod(torch.arange(1.0), torch.arange(2.0), torch.arange(3.0)),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        reference = transformer(**inputs, return_dict=False)[0]
    velocity = run_session(open_session(tmp_path / "transformer.onnx"), feed(**inputs, dtype=torch.float16))
    torch.testing.assert_close(velocity, reference, rtol=0.02, atol=0.02 * reference.abs().max().item())


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_cut_file_is_named(exported_onnx: Path, tiny_base: Path, tmp_path: Path, keep: float) -> None:
    whole = (exported_onnx / "transformer.onnx").read_bytes()
    cut = tmp_path / "transformer.onnx"
    cut.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ExportError, match=str(cut)):
        verify_onnx(cut, load_transformer(tiny_base, None, torch.float32))


def test_a_cut_weights_file_beside_the_graph_is_named(exported_onnx: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "transformer.onnx"
    onnx.save(onnx.load(exported_onnx / "transformer.onnx"), path, save_as_external_data=True, location="transformer.onnx.data")
    assert verify_onnx(path, load_transformer(tiny_base, None, torch.float32))["bytes"] == sum(f.stat().st_size for f in tmp_path.iterdir())
    data = tmp_path / "transformer.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ExportError, match=str(path)):
        verify_onnx(path, load_transformer(tiny_base, None, torch.float32))


def test_an_absent_file_is_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent.onnx does not exist"):
        verify_onnx(tmp_path / "absent.onnx", load_transformer(tiny_base, None, torch.float32))


def test_weights_that_are_not_numbers_are_no_parity(exported_onnx: Path, tiny_base: Path, tmp_path: Path) -> None:
    model = onnx.load(exported_onnx / "transformer.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith("proj_out.bias"))
    tensor.raw_data = b"\xff" * len(tensor.raw_data)
    onnx.save(model, tmp_path / "transformer.onnx")
    with pytest.raises(ExportError, match="no comparable numbers"):
        verify_onnx(tmp_path / "transformer.onnx", load_transformer(tiny_base, None, torch.float32))


def test_another_network_does_not_run(exported_onnx: Path) -> None:
    shape = tiny_transformer().config
    wider = FluxTransformer2DModel.from_config({**shape, "joint_attention_dim": shape.joint_attention_dim + 8}).eval()
    with pytest.raises(ExportError, match="does not run at batch 2, 20 image and 10 text tokens"):
        verify_onnx(exported_onnx / "transformer.onnx", wider)


def test_missing_weights_are_reported_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights):
        export_onnx(OnnxConfig(), tmp_path / "nowhere", None, tmp_path, Progress())
    assert not list(tmp_path.iterdir())


def test_a_provider_that_is_absent_is_an_error_not_a_fallback() -> None:
    assert providers() == ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ExportError, match=r"no CUDAExecutionProvider here.*extra `gpu`"):
        providers("CUDAExecutionProvider")


def test_a_provider_that_fell_back_is_an_error(exported_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ExportError, match=r"transformer.onnx"):
        open_session(exported_onnx / "transformer.onnx", "CUDAExecutionProvider")


def test_both_runtimes_installed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "onnxruntime_gpu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("onnxruntime-gpu") == "1.0"
    with pytest.raises(ExportError, match="overwrite each other"):
        providers()


@pytest.mark.parametrize("wrong", [{"batches": [1, 2, 3]}, {"rows": [4]}, {"texts": [10, 0, 3]}, {"dtype": "bfloat16"}])
def test_shapes_that_cannot_be_traced_or_measured_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        OnnxConfig(**wrong)  # type: ignore[arg-type]
