"""The sampler does what the pipeline does, a batch equals its singles, and gradients reach the policy."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from models.errors import BadImage, BadMask, ConfigError
from models.flux_fill.sampler import DECODED, Encoded, Sampler
from models.images import to_mask, to_tensor
from tests.models.tiny import tiny_picture, tiny_pipeline, tiny_transformer

SIZE, TOKENS = 64, 16


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny_pipeline())


def batch(count: int, size: int = SIZE):
    pairs = [tiny_picture(size, seed) for seed in range(count)]
    return torch.stack([to_tensor(image) for image, _ in pairs]), torch.stack([to_mask(mask) for _, mask in pairs])


@pytest.fixture(scope="module")
def encoded(sampler) -> Encoded:
    images, masks = batch(3)
    return sampler.encode(images, masks, ["a cup", "a cat", "a cup"], ["nsfw", None, "blurry"])


@pytest.mark.parametrize(
    "steps, strength, true_cfg, guidance_scale", [(4, 1.0, 1.0, 1.0), (4, 1.0, 4.0, 30.0), (5, 0.7, 2.5, 1.0), (4, 0.1, 4.0, 1.0)]
)
def test_it_reproduces_the_pipeline(sampler, monkeypatch, steps, strength, true_cfg, guidance_scale):
    # The pipeline samples posteriors; by their mode both start from the same condition, and the generator draws noise alone.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    image, mask = tiny_picture(SIZE)
    expected = sampler.pipe(
        prompt="a cup",
        negative_prompt="nsfw",
        image=image,
        mask_image=mask,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        strength=strength,
        true_cfg=true_cfg,
        guidance_scale=guidance_scale,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="pt",
    ).images
    coded = sampler.encode(*batch(1), ["a cup"], ["nsfw"])
    noise = sampler.noise([7], SIZE, SIZE)
    settings = {"steps": steps, "strength": strength, "true_cfg": true_cfg, "guidance_scale": guidance_scale}
    x0, sigma = sampler.denoise(sampler.pipe.transformer, coded, noise, **settings)
    assert sigma == 0.0
    torch.testing.assert_close(sampler.decode(x0, SIZE, SIZE), expected, atol=1e-5, rtol=0)


def test_it_reproduces_the_pipeline_at_another_size(sampler, monkeypatch):
    """Not square, and more tokens: another shift of the noise levels."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    images, masks = (part[..., :256, :] for part in batch(1, 512))
    expected = sampler.pipe(
        prompt="a cup",
        image=images,  # as a tensor: from PIL upstream runs the VAE in channels-last order, a thousand times less exact on a CPU
        mask_image=masks,
        height=256,
        width=512,
        num_inference_steps=2,
        max_sequence_length=32,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
    ).images
    coded = sampler.encode(images, masks, ["a cup"])
    assert coded.condition.shape == (1, 512, 320)
    with torch.no_grad():
        x0, _ = sampler.denoise(sampler.pipe.transformer, coded, sampler.noise([7], 256, 512), steps=2)
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)


def levels(sampler, size: int, strength: float = 1.0) -> torch.Tensor:
    """The noise level after each of four steps on a picture of `size`, the start first."""
    coded, noise = sampler.encode(*batch(1, size), ["a cup"]), sampler.noise([0], size, size)
    found: list[float] = []
    while not found or found[-1] > 0:
        found.append(sampler.denoise(sampler.pipe.transformer, coded, noise, steps=4, strength=strength, stop=len(found))[1])
    return torch.tensor(found)


@torch.no_grad()
def test_noise_levels_are_shifted_by_size_and_cut_by_strength(sampler):
    whole = levels(sampler, SIZE)
    mu = torch.tensor(0.5 - (256 - TOKENS) / (4096 - 256) * 0.65).exp()  # FLUX's line from (256, 0.5) to (4096, 1.15)
    flat = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(whole, torch.cat((mu / (mu + 1 / flat - 1), torch.zeros(1))))
    assert (levels(sampler, 2 * SIZE)[1:4] > whole[1:4]).all()
    torch.testing.assert_close(levels(sampler, SIZE, 0.5), whole[2:])
    torch.testing.assert_close(levels(sampler, SIZE, 0.01), whole[3:])


@pytest.mark.parametrize("steps, strength", [(0, 1.0), (4, 0.0), (4, 1.1)])
def test_settings_that_leave_nothing_to_run_are_refused(sampler, encoded, steps, strength):
    with pytest.raises(ConfigError, match="leave nothing to run"):
        sampler.sample(sampler.pipe.transformer, encoded, [1, 2, 3], steps=steps, strength=strength)


def test_encoding_is_deterministic_and_a_batch_equals_its_singles(sampler, encoded):
    images, masks = batch(3)
    for i, (prompt, negative) in enumerate([("a cup", "nsfw"), ("a cat", ""), ("a cup", "blurry")]):
        single = sampler.encode(images[i : i + 1], masks[i : i + 1], [prompt], [negative])
        row = encoded.select([i])
        for name in ("prompt_embeds", "pooled", "negative_embeds", "negative_pooled", "condition", "image_latents"):
            torch.testing.assert_close(getattr(row, name), getattr(single, name), atol=1e-5, rtol=0)
    assert encoded.condition.shape == (3, TOKENS, 320) and encoded.image_latents.shape == (3, TOKENS, 64)


def test_the_mask_lies_in_the_condition_as_upstream_packs_it(sampler):
    images, masks = batch(1)
    masks.zero_()[..., :16, 16:32] = 1  # exactly the second token
    packed = sampler.encode(images, masks, ["a cup"]).condition[0, :, 64:]
    assert packed[1].min() == 1 and packed.sum() == 256


def test_masked_pixels_do_not_reach_the_condition(sampler):
    images, masks = batch(1)
    other = torch.where(masks > 0, 1 - images, images)
    first, second = sampler.encode(images, masks, ["a cup"]), sampler.encode(other, masks, ["a cup"])
    assert torch.equal(first.condition, second.condition)
    assert not torch.equal(first.image_latents, second.image_latents)


def test_noise_depends_on_its_seed_alone(sampler):
    noise = sampler.noise([5, 9, 5], SIZE, SIZE)
    assert noise.shape == (3, TOKENS, 64)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], sampler.noise([9], SIZE, SIZE))


def test_sampling_with_settings_per_row_equals_each_row_alone(sampler, encoded):
    settings = {"steps": [2, 3, 2], "true_cfg": [4.0, 1.0, 1.0], "strength": [1.0, 0.6, 1.0]}
    together = sampler.sample(sampler.pipe.transformer, encoded, [1, 2, 3], guidance_scale=2.0, **settings)
    assert together.shape == (3, 3, SIZE, SIZE) and together.min() >= 0 and together.max() <= 1
    for i in range(3):
        own = {name: values[i] for name, values in settings.items()}
        alone = sampler.sample(sampler.pipe.transformer, encoded.select([i]), [i + 1], guidance_scale=2.0, **own)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_more_rows_than_are_decoded_at_once_keep_their_order(sampler, encoded):
    count = DECODED + 2
    many = sampler.sample(sampler.pipe.transformer, encoded.select([0] * count), range(count), steps=2)
    assert many.shape == (count, 3, SIZE, SIZE)
    for place in (0, DECODED - 1, DECODED, count - 1):
        alone = sampler.sample(sampler.pipe.transformer, encoded.select([0]), [place], steps=2)
        torch.testing.assert_close(many[place : place + 1], alone, atol=1e-5, rtol=0)


def test_a_row_with_a_stop_is_predicted_in_one_step_from_there(sampler, encoded):
    pipe = sampler.pipe
    mixed = sampler.sample(pipe.transformer, encoded, [1, 2, 3], steps=3, stop=[None, 1, 2])
    whole = sampler.sample(pipe.transformer, encoded, [1, 2, 3], steps=3)
    torch.testing.assert_close(mixed[0], whole[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        part = encoded.select([1])
        x, sigma = sampler.denoise(pipe.transformer, part, sampler.noise([2], SIZE, SIZE), steps=3, stop=1)
        expected = sampler.decode(sampler.predict_x0(pipe.transformer, x, sigma, part), SIZE, SIZE)[0]
    torch.testing.assert_close(mixed[1], expected, atol=1e-5, rtol=0)
    assert (mixed[1] - whole[1]).abs().max() > 1e-4


def test_rows_without_guidance_in_a_guided_group_stay_unguided(sampler, encoded):
    mixed = sampler.sample(sampler.pipe.transformer, encoded, [1, 2, 3], steps=2, true_cfg=[4.0, 1.0, 0.5])
    plain = sampler.sample(sampler.pipe.transformer, encoded, [1, 2, 3], steps=2)
    torch.testing.assert_close(mixed[1:], plain[1:], atol=1e-5, rtol=0)
    assert (mixed[0] - plain[0]).abs().max() > 1e-3


def test_partial_denoise_continues_to_the_full_one(sampler, encoded):
    """Stopping one step early and predicting x0 is the last Euler step; stopping at 0 is the start."""
    noise = sampler.noise([1, 2, 3], SIZE, SIZE)
    settings = {"true_cfg": 3.0, "guidance_scale": 2.0}
    with torch.no_grad():
        full, _ = sampler.denoise(sampler.pipe.transformer, encoded, noise, steps=4, **settings)
        x_t, sigma = sampler.denoise(sampler.pipe.transformer, encoded, noise, steps=4, stop=3, **settings)
        x0 = sampler.predict_x0(sampler.pipe.transformer, x_t, sigma, encoded, **settings)
    torch.testing.assert_close(x0, full, atol=1e-5, rtol=0)

    start, sigma = sampler.denoise(sampler.pipe.transformer, encoded, noise, steps=4, strength=0.5, stop=0)
    assert 0 < sigma < 1
    torch.testing.assert_close(start, (1 - sigma) * encoded.image_latents + sigma * noise)
    with pytest.raises(ConfigError, match="Stop step 5"):
        sampler.denoise(sampler.pipe.transformer, encoded, noise, steps=4, stop=5)


def test_gradients_run_from_pixels_to_the_policy_and_stop_at_the_frozen_parts(sampler, encoded):
    policy = tiny_transformer(seed=1)
    with torch.no_grad():
        x_t, sigma = sampler.denoise(policy, encoded, sampler.noise([1, 2, 3], SIZE, SIZE), steps=4, stop=2)
    pictures = sampler.decode(sampler.predict_x0(policy, x_t, sigma, encoded, true_cfg=2.0), SIZE, SIZE)
    pictures.mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in policy.parameters())
    assert policy.proj_out.weight.grad.abs().sum() > 0
    frozen = [sampler.pipe.vae, sampler.pipe.text_encoder, sampler.pipe.text_encoder_2]
    assert not any(weight.requires_grad for part in frozen for weight in part.parameters())


def test_clamped_pixels_keep_their_gradient(sampler):
    x0 = torch.full((1, TOKENS, 64), 1e3, requires_grad=True)  # far outside what the VAE has seen
    bias = sampler.pipe.vae.decoder.conv_out.bias
    before = bias.data.clone()
    bias.data += 100.0  # every pixel far above one
    try:
        pictures = sampler.decode(x0, SIZE, SIZE)
        assert pictures.min() == pictures.max() == 1
        pictures.sum().backward()
    finally:
        bias.data = before
    assert x0.grad.abs().sum() > 0


def test_guidance_without_negatives_is_refused(sampler):
    coded = sampler.encode(*batch(1), ["a cup"])
    with pytest.raises(ConfigError, match="needs a negative prompt"):
        sampler.sample(sampler.pipe.transformer, coded, [0], steps=1, true_cfg=2.0)


def test_shapes_that_do_not_fit_are_refused(sampler):
    images, masks = batch(2)
    with pytest.raises(BadImage, match="64 x 40"):
        sampler.encode(images[:, :, :40], masks[:, :, :40], ["a", "b"])
    with pytest.raises(BadMask):
        sampler.encode(images, masks[:1], ["a", "b"])
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        sampler.encode(images, masks, ["a"])
    with pytest.raises(ConfigError, match="2 values for 3 rows"):
        coded = sampler.encode(images, masks, ["a", "b"]).select([0, 1, 0])
        sampler.sample(sampler.pipe.transformer, coded, [0, 1, 2], steps=[1, 2])
