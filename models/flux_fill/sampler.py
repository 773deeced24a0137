"""The one sampler of candidates, training and evaluation: the pipeline's maths on tensors, in pieces that gradients pass.

    sampler = Sampler(load_pipeline(path))
    encoded = sampler.encode(images, masks, prompts, negative_prompts)
    pictures = sampler.sample(transformer, encoded, seeds, steps=28, true_cfg=4.0)

    with torch.no_grad():                                          # the policy's turn in Algorithm 1, arXiv 2508.21066
        x_t, sigma_t = sampler.denoise(policy, encoded, sampler.noise(seeds, 64, 64), steps=28, stop=20)
    x0 = sampler.predict_x0(policy, x_t, sigma_t, encoded)          # x0 = x_t - sigma_t * v(x_t, sigma_t, c)
    pictures = sampler.decode(x0, 64, 64)

Unlike the pipeline it encodes conditions by the mode of the posterior and draws noise per sample, so a row of a batch
equals the same row alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from models.errors import BadImage, BadMask, ConfigError
from models.flux_fill.pipeline import FluxFillCFGPipeline, Text, guided_velocity, longest_prompt, shift_mu

DECODED = 16  # ours: latents decoded at once: more fall out of a CPU's cache, and at full size each takes much memory


@dataclass(frozen=True, eq=False)
class Encoded:
    """Conditions c of B edits of one size, as the transformer takes them."""

    prompt_embeds: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    negative_embeds: Tensor | None  # [B, L, D]; None: encoded without negatives, guidance cannot be on
    negative_pooled: Tensor | None  # [B, P]
    condition: Tensor  # [B, N, 320]: 64 of the masked image's latents, 256 of the mask's pixels
    image_latents: Tensor  # [B, N, 64], what strength < 1 starts from
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.condition)

    def select(self, indices: Sequence[int]) -> Encoded:
        """The rows `indices`, in that order; a row may come more than once."""
        rows = torch.as_tensor(indices, device=self.condition.device)
        values: list[Any] = [value[rows] if isinstance(value, Tensor) else value for value in vars(self).values()]
        return Encoded(*values)


class Sampler:
    """Samples edits with any transformer of `pipe`'s geometry. Freezes the VAE and the text encoders of `pipe`."""

    def __init__(self, pipe: FluxFillCFGPipeline):
        self.pipe = pipe
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            part.requires_grad_(False).eval()
        pipe.vae.to(memory_format=torch.channels_last)  # its convolutions take half the time on CPUs, and suit tensor cores

    @torch.no_grad()
    def encode(self, images: Tensor, masks: Tensor, prompts: list[str], negative_prompts: Sequence[str | None] | None = None) -> Encoded:
        """Encode B edits, deterministically.

        Args:
            images: [B, 3, H, W] in [0, 1], sides divisible by 16.
            masks: [B, 1, H, W], one where pixels are to be made.
            prompts: B strings.
            negative_prompts: B strings, the empty prompt where None. Without the list no negative is encoded.

        Raises:
            BadImage: a side is not divisible by 16. BadMask: masks of another size. ValueError: lists of another length.
        """
        pipe, (height, width) = self.pipe, images.shape[-2:]
        unit = 2 * pipe.vae_scale_factor
        if height % unit or width % unit:
            raise BadImage(f"Images of {width} x {height} pixels cannot be packed.", f"Resize them to multiples of {unit}.")
        if masks.shape != (len(images), 1, height, width):
            raise BadMask(
                f"Masks of shape {list(masks.shape)} do not fit images {list(images.shape)}.", "Give one mask per image, of its size."
            )
        texts = [*prompts, *(text or "" for text in negative_prompts or [])]
        if len(texts) not in (len(images), 2 * len(images)) or len(prompts) != len(images):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(texts) - len(prompts)} negative prompts.")
        embeds, pooled = self._encode_texts(texts)
        count, negative = len(prompts), negative_prompts is not None

        pixels = (images * 2 - 1).to(pipe.device)
        masks = (masks >= 0.5).to(pixels)
        latents = self._encode_pixels(pixels)  # [B, 16, H/8, W/8]
        masked = self._encode_pixels(pixels * (1 - masks))
        channels = pipe.vae.config.latent_channels
        # Latents instead of pixels: upstream then only normalises and packs, and draws nothing.
        packed_mask, packed = pipe.prepare_mask_latents(masks, masked, count, channels, 1, height, width, embeds.dtype, embeds.device, None)
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return Encoded(
            prompt_embeds=embeds[:count],
            pooled=pooled[:count],
            negative_embeds=embeds[count:] if negative else None,
            negative_pooled=pooled[count:] if negative else None,
            condition=torch.cat((packed, packed_mask), dim=-1),
            image_latents=pipe._pack_latents(latents, count, channels, *latents.shape[-2:]).to(embeds.dtype),
            height=height,
            width=width,
        )

    @torch.no_grad()
    def with_negatives(self, encoded: Encoded, negative_prompts: Sequence[str]) -> Encoded:
        """The same B edits with other negative prompts: pictures are not encoded again."""
        embeds, pooled = self._encode_texts(list(negative_prompts))
        return replace(encoded, negative_embeds=embeds, negative_pooled=pooled)

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Gaussian noise [B, N, 64], row i from `seeds[i]` alone (CPU generators: the same on every device)."""
        pipe, channels = self.pipe, self.pipe.vae.config.latent_channels
        shape = (1, channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        return pipe._pack_latents(torch.cat(rows), len(rows), *shape[1:]).to(pipe.device, pipe.text_encoder_2.dtype)

    def denoise(
        self,
        transformer: FluxTransformer2DModel,
        encoded: Encoded,
        noise: Tensor,
        *,
        steps: int,
        true_cfg: float | Sequence[float] = 1.0,
        guidance_scale: float = 1.0,
        strength: float = 1.0,
        stop: int | None = None,
    ) -> tuple[Tensor, float]:
        """Run the first `stop` of K steps (all by default), over noise levels that FLUX shifts by the number of tokens N.

        Args:
            steps: number of levels; below strength 1 the first `int(steps - steps * strength)` are skipped, so K < steps.
            noise: [B, N, 64]; below strength 1 the start is `(1 - sigma) * image_latents + sigma * noise`.
            true_cfg: classifier-free guidance, one number or one per row; on only above 1.
            guidance_scale: FLUX's distilled guidance, an input of the network.

        Returns:
            x_t [B, N, 64] and its noise level sigma_t (0 when all steps ran). Gradients flow unless the caller forbids it.

        Raises:
            ConfigError: `stop` outside 0..K, no step left to run, or guidance without encoded negatives.
        """
        scheduler = self._scheduler(steps, strength, noise.shape[1])
        timesteps = scheduler.timesteps[scheduler.begin_index :]
        stop = len(timesteps) if stop is None else stop
        if not 0 <= stop <= len(timesteps):
            raise ConfigError(f"Stop step {stop} is outside 0..{len(timesteps)}.", "Choose one of the steps that are run.")
        x = scheduler.scale_noise(encoded.image_latents, timesteps[:1].expand(len(noise)), noise)
        for t in timesteps[:stop]:
            v = self._velocity(transformer, x, t, encoded, true_cfg, guidance_scale)
            x = scheduler.step(v.to(x.dtype), t, x, return_dict=False)[0]
        return x, float(scheduler.sigmas[scheduler.begin_index + stop])

    def predict_x0(
        self,
        transformer: FluxTransformer2DModel,
        x_t: Tensor,
        sigma_t: float,
        encoded: Encoded,
        *,
        true_cfg: float | Sequence[float] = 1.0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """One-step estimate of the clean latents [B, N, 64]: `x0 = x_t - sigma_t * v(x_t, sigma_t, c)`. Gradients flow."""
        t = torch.tensor(sigma_t, device=x_t.device) * self.pipe.scheduler.config.num_train_timesteps
        v = self._velocity(transformer, x_t, t, encoded, true_cfg, guidance_scale)
        return (x_t.float() - sigma_t * v.float()).to(x_t.dtype)

    def decode(self, x0: Tensor, height: int, width: int) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], float32, of packed latents [B, N, 64].

        Values are clamped but gradients pass as if they were not: a pixel pushed out of range must find its way back.
        """
        vae = self.pipe.vae
        latents = self.pipe._unpack_latents(x0, height, width, self.pipe.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        pictures = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        return pictures + (pictures.clamp(0, 1) - pictures).detach()

    @torch.no_grad()
    def sample(
        self,
        transformer: FluxTransformer2DModel,
        encoded: Encoded,
        seeds: Sequence[int],
        *,
        steps: int | Sequence[int],
        true_cfg: float | Sequence[float] = 1.0,
        guidance_scale: float = 1.0,
        strength: float | Sequence[float] = 1.0,
        stop: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] in the order of `encoded`; steps, guidance, strength and stop per row or for all.

        A row with a stop is denoised for so many steps and then predicted in one, as the policy's turn in training; without, it runs
        to the end. Rows of equal steps, strength and stop run as one batch. Raises ConfigError as `denoise`.
        """
        count = len(encoded)
        every_cfg = _each(true_cfg, count)
        groups: dict[tuple[int, float, int | None], list[int]] = defaultdict(list)
        for row, setting in enumerate(zip(_each(steps, count), _each(strength, count), _each(stop, count), strict=True)):
            groups[setting].append(row)
        noise = self.noise(seeds, encoded.height, encoded.width)
        pictures = torch.empty(count, 3, encoded.height, encoded.width, device=noise.device)
        for (group_steps, group_strength, group_stop), rows in groups.items():
            part = encoded.select(rows)
            guidance: dict[str, Any] = {"true_cfg": [every_cfg[row] for row in rows], "guidance_scale": guidance_scale}
            x, sigma = self.denoise(transformer, part, noise[rows], steps=group_steps, strength=group_strength, stop=group_stop, **guidance)
            x0 = x if group_stop is None else self.predict_x0(transformer, x, sigma, part, **guidance)
            pictures[rows] = torch.cat([self.decode(few, encoded.height, encoded.width) for few in x0.split(DECODED)])
        return pictures

    def _velocity(
        self,
        transformer: FluxTransformer2DModel,
        x: Tensor,
        t: Tensor,
        encoded: Encoded,
        true_cfg: float | Sequence[float],
        guidance_scale: float,
    ) -> Tensor:
        scale = torch.tensor(_each(true_cfg, len(x)), dtype=torch.float32)
        negative: Text | None = None
        if bool((scale > 1).any()):
            if encoded.negative_embeds is None or encoded.negative_pooled is None:
                raise ConfigError(
                    f"Guidance {scale.max():g} needs a negative prompt, but none was encoded.", "Give `encode` negative prompts."
                )
            negative = (encoded.negative_embeds, encoded.negative_pooled)
        unit = 2 * self.pipe.vae_scale_factor
        img_ids = self.pipe._prepare_latent_image_ids(len(x), encoded.height // unit, encoded.width // unit, x.device, x.dtype)  # [N, 3]
        return guided_velocity(
            transformer,
            x,
            encoded.condition,
            t,
            (encoded.prompt_embeds, encoded.pooled),
            negative,
            img_ids=img_ids,
            true_cfg=scale.to(x.device),
            guidance_scale=guidance_scale if self.pipe.transformer.config.guidance_embeds else None,
        )

    def _scheduler(self, steps: int, strength: float, tokens: int) -> FlowMatchEulerDiscreteScheduler:
        """A scheduler of its own (they carry state), set where `strength` starts."""
        if steps < 1 or not 0 < strength <= 1:
            raise ConfigError(
                f"{steps} steps at strength {strength} leave nothing to run.", "Take at least one step and a strength in (0, 1]."
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        levels = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=levels, mu=shift_mu(scheduler, tokens), device=self.pipe.device)
        scheduler.set_begin_index(int(max(steps - min(steps * strength, steps), 0)))
        return scheduler

    def _encode_texts(self, texts: list[str]) -> Text:
        """[T, L, D] and [T, P]. Each different text is encoded once: most negatives are alike, and T5-XXL is slow."""
        different = list(dict.fromkeys(texts))
        embeds, pooled, _ = self.pipe.encode_prompt(different, device=self.pipe.device, max_sequence_length=longest_prompt(self.pipe))
        rows = [different.index(text) for text in texts]
        return embeds[rows], pooled[rows]

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels.to(self.pipe.vae.dtype)).latent_dist.mode()


def _each(value: Any, count: int) -> list:
    """One value per row from one for all or a list of them."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{len(values)} values for {count} rows.", "Give one value, or one per row.")
    return values
