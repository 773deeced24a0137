"""FLUX.1-Fill-dev in its own on-disk layout at toy size, built in code (no network, under three seconds).

    folder = save_tiny_flux(tmp_path / "flux")
    pipe = FluxFillCFGPipeline.from_pretrained(folder)

Random weights: the pictures are noise, every shape and every code path is the full-size model's. `python -m
tests.models.tiny FOLDER` writes one by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from models.flux_fill import FluxFillCFGPipeline

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
CLIP_WIDTH, T5_WIDTH = 32, 24  # different on purpose: a swapped pair of embeddings cannot pass


def tiny_transformer(seed: int = 0) -> FluxTransformer2DModel:
    """384 channels in (64 noisy, 64 masked image, 256 mask), 64 out, one block of each kind."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """16 latent channels, factor 8, FLUX's scaling and shift."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def tiny_clip(seed: int = 0) -> tuple[CLIPTextModel, CLIPTokenizer]:
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=CLIP_WIDTH,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return CLIPTextModel(config), tokenizer


def tiny_t5(seed: int = 0) -> tuple[T5EncoderModel, T5TokenizerFast]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)  # FLUX's is 512
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config), tokenizer


def tiny_pipeline(seed: int = 0) -> FluxFillCFGPipeline:
    """The whole pipeline in memory, float32, in evaluation mode."""
    text_encoder, tokenizer = tiny_clip(seed)
    text_encoder_2, tokenizer_2 = tiny_t5(seed)
    pipe = FluxFillCFGPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_vae(seed).eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=tiny_transformer(seed).eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_tiny_flux(folder: Path, seed: int = 0) -> Path:
    """Write the pipeline to `folder` in FLUX.1-Fill-dev's layout, class name included, and return it."""
    FluxFillPipeline(**tiny_pipeline(seed).components).save_pretrained(folder)
    return folder


def tiny_picture(size: int = 64, seed: int = 0) -> tuple[Image.Image, Image.Image]:
    """A random RGB picture and an L mask, 255 on a rectangle off the middle."""
    values = torch.randint(0, 256, (size // 8, size // 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (size // 4, size // 8, size - size // 8, size // 2))
    return Image.fromarray(values.numpy()).resize((size, size), Image.Resampling.BICUBIC), mask


if __name__ == "__main__":
    print(save_tiny_flux(Path(sys.argv[1])))
