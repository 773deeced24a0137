"""The mini judge: Qwen2_5_VLForConditionalGeneration at a fraction of a percent of the size, with a tokenizer trained on its queries.

    model, processor = build_judge(queries)
    Judge(model, processor, taxonomy).save(folder)

Patches of 8 pixels merged 2x2 turn a 64 px image into 4x4 tokens (the full size has 14 and 2x2). Weights are random: `onereward
pretrain-mini` trains them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from models.judge.processor import JudgeProcessor

ANSWERS = ("Yes", "No")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)  # Qwen2.5-VL's, in its order
# One turn is `<|im_start|>role\n...<|im_end|>\n`, an image `<|vision_start|><|image_pad|><|vision_end|>`. No default system turn:
# at this size its ten tokens would be a tenth of the sequence.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

PATCH, MERGE = 8, 2
HEAD = 32  # width of an attention head of the language model
MROPE = [4, 6, 6]  # HEAD / 2 frequencies over time, height, width, in the full size's proportion 16:24:24
MOST_TOKENS = 8192  # room for some 2,000 words; the vocabulary is as small as the texts allow


def build_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in which every word of `texts` is one token (and any other text still encodes, in pieces)."""
    untrained = Tokenizer(models.BPE())
    split = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    untrained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), min_frequency=1
    )
    untrained.train_from_iterator([*texts, *ANSWERS, "user\n", "assistant\n", "system\n"], trainer)
    trained = json.loads(untrained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_judge(
    texts: Sequence[str],
    *,
    hidden: int = 128,
    layers: int = 4,
    vision_hidden: int = 128,
    vision_depth: int = 4,
    image_size: int = 64,
    seed: int = 0,
) -> tuple[Qwen2_5_VLForConditionalGeneration, JudgeProcessor]:
    """A randomly initialised judge and its processor.

    Args:
        texts: every query it will be asked; their words become single tokens.
        hidden: width of the language model, a multiple of 32.
        layers: depth of the language model.
        vision_hidden: width of the vision tower, a multiple of 32.
        vision_depth: depth of the vision tower; every block attends over the whole image.
        image_size: side in pixels (a multiple of 16) at which square images pass unresized; others are brought near its area.
        seed: of the weights.
    """
    tokenizer = build_tokenizer(texts)
    special = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // HEAD,
            "num_key_value_heads": max(1, hidden // HEAD // 2),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": MROPE},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": max(1, vision_hidden // HEAD),
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": image_size,
            "fullatt_block_indexes": list(range(vision_depth)),
        },
        image_token_id=special["image_pad"],
        video_token_id=special["video_pad"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    pixels = image_size**2
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, min_pixels=pixels, max_pixels=pixels)
    return model.eval(), JudgeProcessor(tokenizer, images)
