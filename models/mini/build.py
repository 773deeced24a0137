"""The mini FLUX Fill: production classes and FLUX's geometry at a size that two CPU cores can train.

    pipe = build_flux_fill(texts)      # untrained FluxFillCFGPipeline; `ops/pretrain_mini.py` trains it

Kept from FLUX.1-Fill-dev: 16 latent channels, factor 8, 2x2 packing (transformer 384 in, 64 out), guidance embedding,
CLIP pooled and T5 token conditioning, flow matching with dynamic shifting. Every width and depth is ours.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from models.flux_fill import FluxFillCFGPipeline

IMAGE_SIZE = 64
TEXT_TOKENS = 16  # prompt length of both text encoders; FLUX has 77 and 512
TEXT_WIDTH = 96


def build_vae() -> AutoencoderKL:
    """Untrained 16-channel, factor-8 autoencoder.

    The last convolution of every residual block starts at zero and the path around the blocks is orthogonal, so that
    training starts from a linear codec: from the default initialisation it stays 10 dB behind.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=IMAGE_SIZE,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and ("sampler" in name or name.endswith(("conv_in", "conv_out"))):
            nn.init.orthogonal_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return vae


def build_transformer() -> FluxTransformer2DModel:
    """Untrained transformer: 2 double and 4 single blocks of width 160 (FLUX: 19, 38, 3072)."""
    return FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_clip(texts: Sequence[str]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Untrained one-layer CLIP text encoder with a BPE tokenizer in which every word of `texts` is one token."""
    untrained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    untrained.normalizer = normalizers.Lowercase()
    untrained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    untrained.train_from_iterator(
        [*texts, " ".join(string.printable)], trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    )
    trained = json.loads(untrained.to_str())["model"]
    vocab = dict(trained["vocab"])
    for word in (*string.ascii_lowercase, *string.digits, *string.punctuation, "<|startoftext|>", "<|endoftext|>"):
        for spelling in (word,) if word.startswith("<|") else (word, f"{word}</w>"):
            vocab.setdefault(spelling, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]], model_max_length=TEXT_TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    return CLIPTextModel(config), tokenizer


def build_t5(texts: Sequence[str]) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Untrained one-layer T5 encoder whose tokenizer holds every word of `texts` whole and falls back to characters."""
    words = sorted({word for text in texts for word in text.replace(",", " ,").replace('"', ' " ').split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in words] + [(word, -3.0) for word in words if len(word) > 1]
    pieces += [(character, -6.0) for character in string.ascii_letters + string.digits + string.punctuation]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config), tokenizer


def build_flux_fill(texts: Sequence[str]) -> FluxFillCFGPipeline:
    """The whole pipeline with random weights. `texts` are the prompts its tokenizers should know word by word."""
    text_encoder, tokenizer = build_clip(texts)
    text_encoder_2, tokenizer_2 = build_t5(texts)
    return FluxFillCFGPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=build_transformer(),
    )
