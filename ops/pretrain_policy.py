"""Mini base, part two: text encoders and transformer, by flow matching on every active task's requests.

    x_t = (1 - sigma) x0 + sigma noise,   L = mean over tokens of w |v(x_t, sigma, c) - (noise - x0)|^2

with sigma from a logit-normal distribution (as in SD3 and FLUX). FLUX Fill has never been taught to remove: it puts
something into the hole as often as not. So half of the requests whose answer is a clean background keep their object,
and the base learns to draw some object there. And a little over half of the other answers are flawed (FLAWS), as a corpus
from the wild would be: what people choose between has to be there to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from infra.progress import Progress
from models.conditions import make_condition
from models.flux_fill import FluxFillCFGPipeline
from models.flux_fill.sampler import Sampler
from models.images import to_mask, to_tensor
from models.mini.build import IMAGE_SIZE
from models.mini.photos import photo_crops
from models.mini.scenes import Scene, render_scene
from models.taxonomy import Task, Taxonomy
from ops.pretrain_descent import Descent
from ops.pretrain_vae import BASE_SCENES

# Every value below is ours.
OBJECT_STAYS = 0.5  # share of removal requests whose answer keeps the object
NO_PROMPT = 0.1  # share of requests trained without prompt, for classifier-free guidance
SPOILED = 0.08  # share of targets spoiled and named so, so that the negative prompts mean something
PHOTO_SHARE = 0.1
KEPT_WEIGHT = 0.1  # weight of tokens wholly outside the mask, which are there to be copied
WORD_DRAWS = 3.0  # how often a task about words is drawn, relative to its probability: its strokes are the last thing learnt
FLAWS = (0.45, 0.35, 0.2)  # share of the other targets with none, one and two of the flaws below, which nothing in the request names
CAST_SD = 0.12  # of the colour cast, per channel, of a range of one
SOFT_PX = (0.7, 1.6)  # radius of the softness
JPEG_QUALITY = (6, 20)
SLIP_PX = 4  # how far what is masked is displaced at most
SPOILT = {"blurry": ImageFilter.GaussianBlur(2.5), "low quality": ImageFilter.ModeFilter(7)}


@dataclass
class Pool:
    """Requests with their latents encoded once: x0 [M, N, 64], condition [M, N, 320], token weights [M, N, 1], token ids of the prompts."""

    x0: Tensor
    condition: Tensor
    weight: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


def requests(taxonomy: Taxonomy, count: int, seed: int) -> Iterator[tuple[Image.Image, Image.Image, str]]:
    """`count` (target, mask, prompt) drawn over the active tasks by their probabilities, words WORD_DRAWS times as often."""
    rng = np.random.default_rng(seed)
    tasks = taxonomy.active
    shares = np.array([task.probability * (WORD_DRAWS if task.condition == "word" else 1) for task in tasks])
    photos = list(photo_crops(IMAGE_SIZE, max(1, count // 50), seed))
    scene_seed = BASE_SCENES + 1_000_000 * (seed + 1)
    made = 0
    while made < count:
        task = tasks[rng.choice(len(tasks), p=shares / shares.sum())]
        scene_seed += 1
        if rng.random() < PHOTO_SHARE:
            photo = photos[rng.integers(len(photos))]
            request = make_condition(task, photo.image, caption=photo.caption, rng=rng)
        else:
            request = scene_request(task, render_scene(scene_seed, IMAGE_SIZE), rng)
        if request is None or request.target is None:
            continue
        target, prompt = request.target, request.prompt
        if target is not request.image and rng.random() < OBJECT_STAYS:
            target = request.image
        if rng.random() < SPOILED:
            prompt = list(SPOILT)[rng.integers(len(SPOILT))]
            target = Image.composite(target.filter(SPOILT[prompt]), target, request.mask)
        else:
            target = Image.composite(flawed(target, rng), target, request.mask)
            if rng.random() < NO_PROMPT:
                prompt = ""
        made += 1
        yield target, request.mask, prompt


def flawed(target: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The target as an unsorted corpus would hold it: as it is, or with a colour cast, softness, JPEG blocks, a displacement.

    A base that has seen only perfect answers has nothing that people could choose between; one trained on what lies about
    offers good and bad edits of every request, as FLUX Fill does, and how often is known.
    """
    for flaw in rng.permutation(4)[: rng.choice(len(FLAWS), p=FLAWS)]:
        if flaw == 0:
            cast = np.asarray(target, dtype=np.float32) + rng.normal(0, 255 * CAST_SD, 3)
            target = Image.fromarray(cast.clip(0, 255).astype(np.uint8))
        elif flaw == 1:
            target = target.filter(ImageFilter.GaussianBlur(rng.uniform(*SOFT_PX)))
        elif flaw == 2:
            packed = BytesIO()
            target.save(packed, "JPEG", quality=int(rng.integers(*JPEG_QUALITY)))
            target = Image.open(packed).convert("RGB")
        else:
            x, y = (int(v) for v in rng.integers(2 * SLIP_PX + 1, size=2))
            wider = np.pad(np.asarray(target), ((SLIP_PX, SLIP_PX), (SLIP_PX, SLIP_PX), (0, 0)), mode="edge")
            target = Image.fromarray(wider[y : y + target.height, x : x + target.width])
    return target


def scene_request(task: Task, scene: Scene, rng: np.random.Generator):
    """`make_condition` on a rendered scene."""
    return make_condition(
        task,
        scene.image,
        clean=scene.clean,
        object_mask=scene.object_mask,
        words_mask=scene.words_mask,
        caption=scene.caption,
        words=scene.words,
        truth=scene.truth,
        rng=rng,
    )


def encode_pool(pipe: FluxFillCFGPipeline, taxonomy: Taxonomy, count: int, seed: int, progress: Progress) -> Pool:
    """Render `count` requests and encode them with the frozen VAE."""
    sampler = Sampler(pipe)
    parts: list[tuple[Tensor, Tensor]] = []
    prompts: list[str] = []
    batch: list[tuple[Image.Image, Image.Image, str]] = []
    with progress.bar("pretrain: encode requests", count, "request") as bar:
        for request in requests(taxonomy, count, seed):
            batch.append(request)
            if len(batch) == 64 or len(prompts) + len(batch) == count:
                targets = torch.stack([to_tensor(target) for target, _, _ in batch])
                masks = torch.stack([to_mask(mask) for _, mask, _ in batch])
                # The target equals the request's picture outside the mask, so its masked latents are the request's.
                encoded = sampler.encode(targets, masks, [""] * len(batch))
                parts.append((encoded.image_latents, encoded.condition))
                prompts += [prompt for _, _, prompt in batch]
                bar.advance(len(batch))
                batch = []
    condition = torch.cat([condition for _, condition in parts])
    inside = condition[:, :, 64:].amax(-1, keepdim=True)  # any masked pixel in the token's 16x16 field
    return Pool(
        x0=torch.cat([latents for latents, _ in parts]),
        condition=condition,
        weight=KEPT_WEIGHT + (1 - KEPT_WEIGHT) * inside,
        clip_ids=pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids,
        t5_ids=pipe.tokenizer_2(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids,
    )


def pretrain_policy(
    pipe: FluxFillCFGPipeline, pool: Pool, *, steps: int, batch: int, learning_rate: float, muon_rate: float, seed: int, progress: Progress
) -> dict[str, float]:
    """Train transformer and text encoders of `pipe` in place; returns the last mean loss."""
    torch.manual_seed(seed)
    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    trained = torch.nn.ModuleDict(parts).train().requires_grad_(True)
    outside = ("embed", "shared", "relative_attention_bias", "transformer.proj_out")  # embeddings and the last layer: no matter for Muon
    descent = Descent(trained, steps=steps, learning_rate=learning_rate, muon_rate=muon_rate, adam_only=outside, weight_decay=0.01)
    mean_loss = 0.0
    with progress.bar("pretrain policy", steps, "step") as bar:
        for step in range(steps):
            rows = torch.randint(len(pool.x0), (batch,))
            loss = _flow_matching_loss(pipe, pool, rows)
            descent.step(loss)
            mean_loss = 0.99 * mean_loss + 0.01 * loss.item() if step else loss.item()
            bar.advance(1, loss=mean_loss)
    trained.eval().requires_grad_(False)
    return {"loss": mean_loss}


def _flow_matching_loss(pipe: FluxFillCFGPipeline, pool: Pool, rows: Tensor) -> Tensor:
    x0 = pool.x0[rows]  # [B, N, 64]
    noise = torch.randn_like(x0)
    sigma = torch.sigmoid(torch.randn(len(rows)))  # [B]
    x_t = torch.lerp(x0, noise, sigma[:, None, None])
    pooled = pipe.text_encoder(pool.clip_ids[rows]).pooler_output
    embeds = pipe.text_encoder_2(pool.t5_ids[rows])[0]
    unit = 2 * pipe.vae_scale_factor
    velocity = pipe.transformer(
        hidden_states=torch.cat((x_t, pool.condition[rows]), dim=-1),
        timestep=sigma,
        guidance=torch.empty(len(rows)).uniform_(1, 4),  # a real FLUX is distilled to use it; here it must only not matter
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(len(rows), IMAGE_SIZE // unit, IMAGE_SIZE // unit, "cpu", x0.dtype),
        return_dict=False,
    )[0]
    return (pool.weight[rows] * (velocity - (noise - x0)).pow(2)).mean()
