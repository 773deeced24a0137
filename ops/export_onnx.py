"""Export a policy's transformer to ONNX and measure how far ONNX Runtime is from PyTorch.

The graph is FLUX's velocity network v(x_t, sigma_t, c) with a dynamic batch, image and text length. Two parts of
diffusers' forward are taken out of half precision, because an argument of sin and cos in the hundreds dominates the
error and overflows float16 above 65.5:
- the sinusoids of 1000 * sigma and 1000 * guidance are inputs (`timestep_proj`, `guidance_proj`), made by `feed`;
- rotary tables are computed in float32 from the position ids (diffusers uses float64, which TensorRT does not know).

    metrics = export_onnx(OnnxConfig(), base=Path("data/base"), policy=Path("policy"), out=Path("onnx"), progress=Progress(print))
    metrics = verify_onnx(Path("onnx/transformer.onnx"), load_transformer("data/base", Path("policy"), torch.float32))
"""

from __future__ import annotations

import math
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime
import pydantic
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from matplotlib.figure import Figure
from torch import Tensor, nn

from infra.progress import Progress
from models.config import OpConfig
from models.errors import ExportError
from models.flux_fill.loading import load_transformer
from ops.folders import save_picture, write_metrics
from ops.pictures import SERIES, stacked_bars

FILE = "transformer.onnx"
OUTPUT = "velocity"
OPSET = 20
PROTOBUF_LIMIT = 2**31  # bytes; protobuf cannot hold more in one file
FREQUENCIES = 256  # channels of FLUX's time and guidance sinusoids
Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]
EXTRA = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "gpu"}

# Which axes vary, by input. The names are kept in the file; ops/build_engine.py reads its ranges by them.
BATCH, IMAGE, TEXT = "batch", "image_tokens", "text_tokens"
AXES: dict[str, dict[int, str]] = {
    "hidden_states": {0: BATCH, 1: IMAGE},  # [B, N, 384]
    "encoder_hidden_states": {0: BATCH, 1: TEXT},  # [B, L, D]
    "pooled_projections": {0: BATCH},  # [B, P]
    "timestep_proj": {0: BATCH},  # [B, 256]
    "guidance_proj": {0: BATCH},  # [B, 256]
    "img_ids": {0: IMAGE},  # [N, 3]
    "txt_ids": {0: TEXT},  # [L, 3]
}


class OnnxConfig(OpConfig):
    """How the transformer is exported and at which shapes its parity is measured."""

    dtype: Literal["float32", "float16"] = pydantic.Field(
        "float32", description="Precision of the graph; bfloat16 has no MatMul in ONNX Runtime's CPU provider (ours)."
    )
    provider: Provider = pydantic.Field("CPUExecutionProvider", description="ONNX Runtime provider that parity is measured with (ours).")
    batches: list[int] = pydantic.Field([2, 1, 3], description="Batch of each shape measured; the first shape is the traced one (ours).")
    rows: list[int] = pydantic.Field([4, 6, 3], description="Rows of image tokens of each shape; columns are one more (ours).")
    texts: list[int] = pydantic.Field([10, 7, 16], description="Text tokens of each shape (ours).")
    seed: int = pydantic.Field(0, description="Seed of the inputs that parity is measured on (ours).")

    @pydantic.model_validator(mode="after")
    def _shapes(self) -> OnnxConfig:
        if not len(self.batches) == len(self.rows) == len(self.texts) >= 2:
            raise ValueError("batches, rows and texts list the same shapes, two at least")
        if min(self.batches + self.rows + self.texts) < 1 or min(self.batches[0], self.rows[0], self.texts[0]) < 2:
            raise ValueError("every size is 1 or more, and 2 or more in the first shape: tracing turns a 1 into a constant")
        return self


class Velocity(nn.Module):
    """FluxTransformer2DModel's forward with the sinusoids as inputs; parameters are shared, not copied."""

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.transformer = transformer
        for axis, width in enumerate(transformer.config.axes_dims_rope):
            frequencies = transformer.pos_embed.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            self.register_buffer(f"frequencies_{axis}", frequencies.float())  # [width / 2]

    def rotary(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Position ids [S, 3] to cosines and sines [S, head width], each value twice in a row."""
        angles = [ids[:, axis, None] * self.get_buffer(f"frequencies_{axis}") for axis in range(3)]
        angle = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # [S, head width]
        return angle.cos(), angle.sin()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep_proj: Tensor,
        guidance_proj: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        """Inputs as in AXES; the ids are float32 and the rest has the graph's dtype. Returns the velocity [B, N, 64]."""
        network, embed = self.transformer, self.transformer.time_text_embed
        temb = (
            embed.timestep_embedder(timestep_proj) + embed.guidance_embedder(guidance_proj) + embed.text_embedder(pooled_projections)
        )  # [B, W]
        image, text = network.x_embedder(hidden_states), network.context_embedder(encoder_hidden_states)
        rotary = self.rotary(torch.cat([txt_ids, img_ids]))
        for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        return network.proj_out(network.norm_out(image, temb))


def feed(
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    guidance: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The transformer's own arguments as the graph's inputs.

    `timestep` [B] is sigma in [0, 1] and `guidance` [B] the distilled scale, both before the factor 1000.
    """

    def sinusoid(values: Tensor) -> Tensor:
        return get_timestep_embedding(values.float() * 1000, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)  # [B, 256]

    return {
        "hidden_states": hidden_states.to(dtype),
        "encoder_hidden_states": encoder_hidden_states.to(dtype),
        "pooled_projections": pooled_projections.to(dtype),
        "timestep_proj": sinusoid(timestep).to(dtype),
        "guidance_proj": sinusoid(guidance).to(dtype),
        "img_ids": img_ids.float(),
        "txt_ids": txt_ids.float(),
    }


def probes(shape: FluxTransformer2DModel, config: OnnxConfig) -> list[dict[str, Tensor]]:
    """Random arguments of the transformer's forward at each of the config's shapes, guidance up to 100."""
    generator = torch.Generator().manual_seed(config.seed)
    made = []
    for batch, rows, text in zip(config.batches, config.rows, config.texts, strict=True):
        grid = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(rows + 1.0))  # [N, 3]
        made.append(
            {
                "hidden_states": torch.randn(batch, len(grid), shape.config.in_channels, generator=generator),
                "encoder_hidden_states": torch.randn(batch, text, shape.config.joint_attention_dim, generator=generator),
                "pooled_projections": torch.randn(batch, shape.config.pooled_projection_dim, generator=generator),
                "timestep": torch.rand(batch, generator=generator),
                "guidance": 1 + 99 * torch.rand(batch, generator=generator),
                "img_ids": grid,
                "txt_ids": torch.zeros(text, 3),
            }
        )
    return made


def providers(wanted: Provider = "CPUExecutionProvider") -> list[str]:
    """`[wanted]` when this ONNX Runtime has it. Raises ExportError: ONNX Runtime itself would fall back without a word."""
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        raise ExportError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files.",
            "Uninstall both, then install one of the extras `cpu` and `gpu`, not both.",
        )
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise ExportError(
            f"ONNX Runtime has no {wanted} here, only {', '.join(available)}.",
            f"Install the extra `{EXTRA[wanted]}` in a fresh environment.",
        )
    return [wanted]


def open_session(path: Path, provider: Provider = "CPUExecutionProvider") -> onnxruntime.InferenceSession:
    """Check an ONNX file and load it, on that provider and no other. Raises ExportError naming the file."""
    wanted = providers(provider)
    if not path.is_file():
        raise ExportError(f"{path} does not exist.", "Export the policy again.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised below; the runtime need not print them too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # onnx, protobuf and ONNX Runtime raise a dozen classes with no common base
        raise ExportError(f"{path} is not a usable ONNX file: {error}.", "It is cut or altered; export the policy again.") from error
    if session.get_providers()[0] != provider:
        raise ExportError(
            f"{path} was loaded by {session.get_providers()[0]} instead of {provider}.",
            f"Check the driver, or set the provider to {session.get_providers()[0]}.",
        )
    return session


def run_session(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    """The velocity [B, N, 64] in float32."""
    (velocity,) = session.run([OUTPUT], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(velocity).float()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||, in float64. Infinite for another shape, not-a-number for values that are."""
    if value.shape != reference.shape:
        return math.inf
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def verify_onnx(path: Path, transformer: FluxTransformer2DModel, config: OnnxConfig | None = None) -> dict[str, Any]:
    """Compare an ONNX file with the network it should be, at every shape of the config.

    `transformer` is in float32. Returns `relative_error` (the worst shape's), `shapes`, `opset`, `bytes`, `provider`,
    `dtype`. Raises ExportError naming the file when it is cut, does not load, does not run or gives no finite numbers.
    """
    config = config or OnnxConfig()
    arguments = probes(transformer, config)
    return _compare(path, arguments, [transformer(**probe, return_dict=False)[0] for probe in arguments], config)


def _compare(path: Path, arguments: list[dict[str, Tensor]], references: list[Tensor], config: OnnxConfig) -> dict[str, Any]:
    session = open_session(path, config.provider)
    dtype = torch.float16 if session.get_inputs()[0].type == "tensor(float16)" else torch.float32
    shapes = []
    for probe, reference in zip(arguments, references, strict=True):
        (batch, image, _), text = probe["hidden_states"].shape, len(probe["txt_ids"])
        try:
            error = relative_error(run_session(session, feed(**probe, dtype=dtype)), reference)
        except Exception as failure:  # ONNX Runtime's classes have no common base
            raise ExportError(
                f"{path} does not run at batch {batch}, {image} image and {text} text tokens: {failure}.", "Export the policy again."
            ) from failure
        if not math.isfinite(error):
            raise ExportError(
                f"{path} gives no comparable numbers at batch {batch}, {image} image and {text} text tokens.",
                "Export the policy again, in float32.",
            )
        shapes.append({"batch": batch, "image_tokens": image, "text_tokens": text, "relative_error": error})
    opsets = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}
    return {
        "relative_error": max(shape["relative_error"] for shape in shapes),
        "shapes": shapes,
        "opset": opsets[""],
        "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        "provider": session.get_providers()[0],
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write(module: Velocity, example: dict[str, Tensor], path: Path) -> None:
    sizes = {name: torch.export.Dim(name) for name in (BATCH, IMAGE, TEXT)}
    dynamic = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in AXES.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*shares the same shape constraints")  # that is what a shared Dim is for
            program = torch.onnx.export(
                module,
                (),
                kwargs=example,
                input_names=list(AXES),
                output_names=[OUTPUT],
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"The transformer does not export to ONNX: {error}.", "Report it with the diffusers and torch versions."
        ) from error
    assert program is not None
    for part in (program.model, program.model.graph, *program.model.graph):
        part.metadata_props.clear()  # the exporter leaves stack traces with this machine's paths
        part.doc_string = None
    size = sum(parameter.nbytes for parameter in module.parameters())
    program.save(str(path), external_data=size > PROTOBUF_LIMIT // 2)


@torch.no_grad()
def export_onnx(config: OnnxConfig, base: Path, policy: Path | None, out: Path, progress: Progress) -> dict[str, Any]:
    """Write `out/transformer.onnx` (and `.data` beyond 1 GiB of weights) of a base's or a policy's transformer, and its parity.

    Returns `verify_onnx`'s figures. Raises MissingWeights, BrokenWeights, or ExportError.
    """
    transformer = load_transformer(base, policy, torch.float32).eval()
    arguments = probes(transformer, config)
    # float32 answers first: half precision replaces the weights, so that one copy of a 12 B network is enough.
    references = [transformer(**probe, return_dict=False)[0] for probe in arguments]
    dtype = getattr(torch, config.dtype)
    transformer.to(dtype)
    progress.say(
        f"onnx: exporting {sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters, opset {OPSET}, {config.dtype}"
    )
    _write(Velocity(transformer).eval(), feed(**arguments[0], dtype=dtype), out / FILE)
    metrics = _compare(out / FILE, arguments, references, config)
    size, worst = metrics["bytes"] / 1e6, metrics["relative_error"]
    progress.say(f"onnx: {size:.1f} MB, relative error {worst:.2e} at the worst of {len(metrics['shapes'])} shapes")
    save_picture(out, "error", _error_plot(metrics["shapes"]))
    write_metrics(out, metrics)
    return metrics


def _error_plot(shapes: list[dict[str, Any]]) -> Figure:
    labels = [f"batch {row['batch']}, {row['image_tokens']} image and {row['text_tokens']} text tokens" for row in shapes]
    errors = {"error": ([row["relative_error"] for row in shapes], SERIES[0])}
    figure = stacked_bars(labels, errors, x="relative error of the velocity against torch")
    figure.axes[0].locator_params(axis="x", nbins=4)
    figure.axes[0].xaxis.set_major_formatter("{x:.1e}")
    return figure
