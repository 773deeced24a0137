"""FLUX Fill with true classifier-free guidance: a negative prompt next to diffusers' FluxFillPipeline.

    pipe = FluxFillCFGPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe(prompt="a cup", negative_prompt="nsfw", image=image, mask_image=mask, height=1024, width=1024,
         guidance_scale=1.0, true_cfg=4.0, num_inference_steps=50, generator=torch.Generator("cpu").manual_seed(0)).images[0]

Semantics of the OneReward authors' inference repository (arXiv 2508.21066): above `true_cfg` 1 every step is one forward
of 2B rows ordered [negative, positive], combined as `v = v_neg + true_cfg * (v_pos - v_neg)`; at 1 or below the result is
bit-equal to FluxFillPipeline. Random draws are upstream's, in its order: posterior sample of the image, noise, posterior
sample of the masked image. Beyond the authors' class: one negative string serves N prompts, negatives may be embeddings,
and `true_cfg` may differ per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

Prompt = str | list[str]
Text = tuple[Tensor, Tensor]  # token embeddings [B, L, D], pooled embedding [B, P]
LONGEST_PROMPT = 512  # T5 tokens, as upstream and FLUX have it


def longest_prompt(pipe: FluxFillPipeline) -> int:
    """T5 tokens of every prompt, padded: what the pipeline's tokenizer takes, at most 512."""
    return min(LONGEST_PROMPT, pipe.tokenizer_2.model_max_length) if pipe.tokenizer_2 is not None else LONGEST_PROMPT


def guided_velocity(
    transformer: FluxTransformer2DModel,
    latents: Tensor,  # [B, N, 64]
    condition: Tensor,  # [B, N, 320]
    timestep: Tensor,  # scalar, sigma * 1000
    positive: Text,
    negative: Text | None,
    *,
    img_ids: Tensor,  # [N, 3]
    true_cfg: Tensor,  # [B], float32; not read without a negative
    guidance_scale: float | None,  # None for a network without guidance embedding
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Velocity [B, N, 64] at `timestep`: one forward of B rows without `negative`, of 2B rows [negative, positive] with it.

    A row whose `true_cfg` is 1 or less gets its positive velocity unchanged.
    """
    hidden = torch.cat((latents, condition), dim=2)  # [B, N, 384]
    embeds, pooled = positive
    if negative is not None:
        hidden = torch.cat((hidden, hidden))  # [2B, N, 384]
        embeds, pooled = torch.cat((negative[0], embeds)), torch.cat((negative[1], pooled))
    rows = len(hidden)
    guidance = None
    if guidance_scale is not None:
        guidance = torch.full([1], guidance_scale, device=hidden.device, dtype=torch.float32).expand(rows)
    velocity = transformer(
        hidden_states=hidden,
        timestep=timestep.expand(rows).to(latents.dtype) / 1000,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype),
        img_ids=img_ids,
        joint_attention_kwargs=joint_attention_kwargs,
        return_dict=False,
    )[0]
    if negative is None:
        return velocity
    away, towards = velocity.chunk(2)
    scale = true_cfg[:, None, None]
    # The product is rounded to the network's dtype before the sum, as a plain number times a tensor is.
    guided = away + (scale * (towards - away)).to(towards.dtype)
    return torch.where(scale > 1, guided, towards)


class FluxFillCFGPipeline(FluxFillPipeline):
    """FluxFillPipeline plus `negative_prompt` and `true_cfg`; everything else is inherited, but for one default.

    A call takes FluxFillPipeline's arguments and, behind them:
        negative_prompt: what the picture is pushed away from, one string for all prompts or one per prompt; the empty
            prompt where missing. Not used while guidance is off.
        negative_prompt_2: the same for T5; `negative_prompt` where missing.
        true_cfg: strength of the push, one number or one per prompt; on only above 1.
        negative_prompt_embeds: token embeddings [1, L, D] or [B, L, D] instead of `negative_prompt`, with L as in the prompt.
        negative_pooled_prompt_embeds: pooled embeddings [1, P] or [B, P]; goes with `negative_prompt_embeds`.
    Without `max_sequence_length` a prompt has as many T5 tokens as the tokenizer takes, which is what the weights have seen, 512 at most
    (upstream: always 512, FLUX's own).
    `masked_image_latents` is refused, as upstream refuses it: beside `image` by its checks, without `image` by its preprocessing.
    Several images with `num_images_per_prompt` above 1 are tiled by upstream while prompts are repeated, so image and
    prompt of a row differ; kept for bit-equality: repeat the images yourself, or call once per image.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (upstream's signature)
        max_sequence_length: int | None = None,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        true_cfg: float | Sequence[float] | Tensor = 1.0,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> FluxPipelineOutput | tuple:
        """Fill the white part of `mask_image`. Raises ValueError as upstream does, and for negatives or `true_cfg` that do not fit."""
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        max_sequence_length = max_sequence_length or longest_prompt(self)
        self.check_inputs(
            *(prompt, prompt_2, strength, height, width, prompt_embeds, pooled_prompt_embeds, callback_on_step_end_tensor_inputs),
            *(max_sequence_length, image, mask_image, masked_image_latents),
        )
        self._guidance_scale, self._joint_attention_kwargs, self._interrupt = guidance_scale, joint_attention_kwargs, False
        given: Any = prompt_embeds if prompt is None else prompt
        batch, count = 1 if isinstance(given, str) else len(given), num_images_per_prompt or 1

        positive = self._encode(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, batch, count, max_sequence_length)
        scale = _per_prompt(torch.as_tensor(true_cfg, dtype=torch.float32).reshape(-1), batch, count, "true_cfg")
        negative = None
        if bool((scale > 1).any()):
            away = self._negative_inputs(negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds, batch)
            negative = self._encode(*away, batch, count, max_sequence_length)
            if negative[0].shape != positive[0].shape or negative[1].shape != positive[1].shape:
                raise ValueError(f"Negative embeddings {[*negative[0].shape]} do not fit the prompt's {[*positive[0].shape]}.")

        timesteps = self._timesteps(num_inference_steps, sigmas, strength, height, width)
        shape = (batch, count, height, width)
        latents, condition, img_ids = self._prepare(image, mask_image, latents, generator, timesteps, positive[0].dtype, *shape)
        velocity = partial(
            guided_velocity,
            self.transformer,
            condition=condition,
            negative=negative,
            img_ids=img_ids,
            true_cfg=scale.to(latents.device),
            guidance_scale=guidance_scale if self.transformer.config.guidance_embeds else None,
            joint_attention_kwargs=self.joint_attention_kwargs,
        )
        latents = self._denoise(latents, timesteps, positive, velocity, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = latents if output_type == "latent" else self._decode(latents, height, width, output_type)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    def _encode(
        self,
        prompt: Prompt | None,
        prompt_2: Prompt | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        batch: int,
        count: int,
        max_sequence_length: int,
    ) -> Text:
        """Embeddings of `batch` prompts, `count` rows each, from text or from embeddings."""
        given = embeds is not None
        embeds, pooled, _ = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            device=self._execution_device,
            num_images_per_prompt=count,
            max_sequence_length=max_sequence_length,
            lora_scale=(self.joint_attention_kwargs or {}).get("scale"),
        )
        if given:  # upstream repeats only what it encoded itself
            device = self._execution_device
            embeds = _per_prompt(embeds.to(device), batch, count, "embeddings")
            pooled = _per_prompt(pooled.to(device), batch, count, "pooled embeddings")
        return embeds, pooled

    def _negative_inputs(
        self, prompt: Prompt | None, prompt_2: Prompt | None, embeds: Tensor | None, pooled: Tensor | None, batch: int
    ) -> tuple[Prompt | None, Prompt | None, Tensor | None, Tensor | None]:
        """The negative as `_encode` takes it: embeddings alone, or one string per prompt (empty where missing)."""
        if embeds is not None or pooled is not None:
            if embeds is None or pooled is None:
                raise ValueError("`negative_prompt_embeds` and `negative_pooled_prompt_embeds` go together; only one was passed.")
            if prompt is not None or prompt_2 is not None:
                raise ValueError("Pass a negative prompt as text or as embeddings, not as both.")
            return None, None, embeds, pooled
        if self.text_encoder is None or self.text_encoder_2 is None:
            raise ValueError("Without text encoders guidance needs `negative_prompt_embeds` and `negative_pooled_prompt_embeds`.")
        texts = {"negative_prompt": prompt or "", "negative_prompt_2": prompt_2 or prompt or ""}
        for name, text in texts.items():
            texts[name] = [text] * batch if isinstance(text, str) else text
            if len(texts[name]) != batch:
                raise ValueError(f"`{name}` has {len(texts[name])} entries for {batch} prompts; pass one string or one per prompt.")
        return texts["negative_prompt"], texts["negative_prompt_2"], None, None

    def _timesteps(self, steps: int, sigmas: list[float] | None, strength: float, height: int, width: int) -> Tensor:
        """Timesteps still to go; leaves the scheduler ready for the first of them."""
        tokens = (int(height) // self.vae_scale_factor // 2) * (int(width) // self.vae_scale_factor // 2)
        levels = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        retrieve_timesteps(self.scheduler, steps, self._execution_device, sigmas=levels, mu=shift_mu(self.scheduler, tokens))
        timesteps, left = self.get_timesteps(len(levels), strength, self._execution_device)
        if left < 1:
            raise ValueError(f"`strength` {strength} leaves none of the {len(levels)} `num_inference_steps` to run.")
        return timesteps

    def _prepare(
        self,
        image: Any,
        mask_image: Any,
        latents: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        timesteps: Tensor,
        dtype: torch.dtype,
        batch: int,
        count: int,
        height: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents to start from [B, N, 64], condition [B, N, 320] and ids of the image tokens [N, 3]; makes every random draw."""
        device, channels = self._execution_device, self.vae.config.latent_channels
        pixels = self.image_processor.preprocess(image, height=height, width=width).to(dtype=torch.float32)
        rows, at = batch * count, timesteps[:1].repeat(batch * count)
        latents, img_ids = self.prepare_latents(pixels, at, rows, channels, height, width, dtype, device, generator, latents)
        mask = self.mask_processor.preprocess(mask_image, height=height, width=width)  # [B, 1, H, W]
        masked = (pixels * (1 - mask)).to(device=device, dtype=dtype)
        height, width = pixels.shape[-2:]
        mask, masked = self.prepare_mask_latents(mask, masked, batch, channels, count, height, width, dtype, device, generator)
        return latents, torch.cat((masked, mask), dim=-1), img_ids

    def _denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        positive: Text,
        velocity: Callable[..., Tensor],
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: list[str],
    ) -> Tensor:
        """Every Euler step, with upstream's progress bar, interruption and callback."""
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                v = velocity(latents=latents, timestep=t, positive=positive)
                latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
                if callback is not None:
                    shown = {"latents": latents, "prompt_embeds": positive[0]}
                    changed = callback(self, i, t, {name: shown[name] for name in callback_inputs})
                    latents = changed.pop("latents", latents)
                    positive = (changed.pop("prompt_embeds", positive[0]), positive[1])
                bar.update()
        return latents

    def _decode(self, latents: Tensor, height: int, width: int, output_type: str | None) -> Any:
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.image_processor.postprocess(self.vae.decode(latents, return_dict=False)[0], output_type=output_type)


def shift_mu(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """FLUX's timestep shift for a picture of `tokens` packed latents."""
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def _per_prompt(values: Tensor, batch: int, count: int, name: str) -> Tensor:
    """One row per picture [batch * count, ...], a prompt's pictures side by side, from one row or one per prompt."""
    if len(values) not in (1, batch):
        raise ValueError(f"{name}: {len(values)} rows for {batch} prompts; pass one or one per prompt.")
    return values.expand(batch, *values.shape[1:]).repeat_interleave(count, dim=0)
