"""FluxFillCFGPipeline: bit-equal to upstream when off, the authors' formula when on, and diffusers' contract for pipelines."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from diffusers.utils import load_image
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict

from models.flux_fill import FluxFillCFGPipeline
from tests.models.tiny import save_tiny_flux, tiny_picture, tiny_pipeline, tiny_transformer

SIZE = 64


@pytest.fixture(scope="module")
def pipe() -> FluxFillCFGPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux") / "FLUX.1-Fill-dev")


def seeded(*seeds: int):
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def arguments(**changes):
    image, mask = tiny_picture(SIZE)
    base = {
        "prompt": "a red cup",
        "image": image,
        "mask_image": mask,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
        "generator": seeded(0),
        "output_type": "pt",
    }
    return base | changes


def guided(**changes):
    return arguments(negative_prompt="nsfw", true_cfg=4.0) | changes


def rows(count: int, **changes):
    """Arguments of `count` different edits with one generator each."""
    images, masks = zip(*(tiny_picture(SIZE, seed) for seed in range(count)), strict=True)
    each = {
        "prompt": [f"cup {i}" for i in range(count)],
        "image": list(images),
        "mask_image": list(masks),
        "generator": seeded(*range(count)),
    }
    return arguments(**each) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"true_cfg": 1.0, "negative_prompt": "nsfw"},
        {"true_cfg": 0.5, "negative_prompt": "nsfw"},
        {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 30.0},
        {"num_images_per_prompt": 2},
        {"prompt_2": "another text"},
        {"sigmas": [1.0, 0.6, 0.3]},
        {"output_type": "latent"},
        {"latents": torch.ones(1, 16, 64)},
        {"prompt": ["a", "b"], "num_images_per_prompt": 2},
    ],
)
def test_off_it_is_bit_equal_to_upstream(pipe, changes):
    upstream = FluxFillPipeline(**pipe.components)
    upstream.set_progress_bar_config(disable=True)
    ours = pipe(**arguments(**changes)).images
    theirs = upstream(**arguments(**{key: value for key, value in changes.items() if key not in ("true_cfg", "negative_prompt")})).images
    assert torch.equal(ours, theirs)


def test_a_prompt_has_as_many_tokens_as_the_tokenizer_takes(pipe):
    """Of tiny T5 32, FLUX's 512: weights that have seen 32 would be shown mostly padding."""
    assert torch.equal(pipe(**guided(max_sequence_length=None)).images, pipe(**guided(max_sequence_length=32)).images)
    assert not torch.equal(pipe(**guided(max_sequence_length=None)).images, pipe(**guided(max_sequence_length=16)).images)


def test_off_it_is_bit_equal_to_upstream_in_batches_and_bfloat16():
    pipe = tiny_pipeline().to(torch.bfloat16)
    upstream = FluxFillPipeline(**pipe.components)
    ours, theirs = pipe(**rows(2)).images, upstream(**rows(2)).images
    assert torch.equal(ours, theirs)


def test_upstreams_arguments_come_first_with_their_defaults_but_for_the_prompts_length():
    theirs, ours = (list(inspect.signature(kind.__call__).parameters.values()) for kind in (FluxFillPipeline, FluxFillCFGPipeline))
    defaults = {p.name: p.default for p in theirs} | {"max_sequence_length": None}
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == list(defaults.items())


def test_formula_and_order_of_random_draws(pipe):
    """One step by hand: image posterior, noise, masked-image posterior from one generator; v = neg + s * (pos - neg)."""
    done = pipe(**guided(num_inference_steps=2, strength=0.5, guidance_scale=3.0, output_type="latent")).images

    generator = seeded(0)
    image, mask = tiny_picture(SIZE)
    pixels = pipe.image_processor.preprocess(image, height=SIZE, width=SIZE)
    mask = pipe.mask_processor.preprocess(mask, height=SIZE, width=SIZE)

    def latents_of(pixels):
        return (pipe.vae.encode(pixels).latent_dist.sample(generator) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    with torch.no_grad():
        first = latents_of(pixels)
        noise = randn_tensor((1, 16, 8, 8), generator=generator)
        masked = pipe._pack_latents(latents_of(pixels * (1 - mask)), 1, 16, 8, 8)
        squares = mask.view(1, 8, 8, 8, 8).permute(0, 2, 4, 1, 3).reshape(1, 64, 8, 8)
        condition = torch.cat((masked, pipe._pack_latents(squares, 1, 64, 8, 8)), -1)
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5 - 240 / 3840 * 0.65)  # 16 tokens on the line from (256, .5) to (4096, 1.15)
        sigma, timestep = pipe.scheduler.sigmas[1], pipe.scheduler.timesteps[1]
        x = pipe._pack_latents((1 - sigma) * first + sigma * noise, 1, 16, 8, 8)

        def velocity(text):
            embeds, pooled, text_ids = pipe.encode_prompt(text, max_sequence_length=16)
            return pipe.transformer(
                hidden_states=torch.cat((x, condition), -1),
                timestep=timestep[None] / 1000,
                guidance=torch.tensor([3.0]),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
            ).sample

        away = velocity("nsfw")
        expected = x - sigma * (away + 4.0 * (velocity("a red cup") - away))
    torch.testing.assert_close(done, expected, atol=1e-5, rtol=1e-4)


def test_one_forward_of_twice_the_batch_per_step_negative_first(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        pipe(**guided(prompt=["a", "b"], num_inference_steps=3, guidance_scale=2.5))
        pipe(**arguments(prompt=["a", "b"]))
    finally:
        handle.remove()
    on, off = seen[:3], seen[3:]
    assert [len(kwargs["hidden_states"]) for kwargs in seen] == [4, 4, 4, 2, 2]
    negative, _, _ = pipe.encode_prompt("nsfw", max_sequence_length=16)
    for kwargs in on:
        assert torch.equal(kwargs["guidance"], torch.full([4], 2.5))
        torch.testing.assert_close(kwargs["encoder_hidden_states"][:2], negative.expand(2, -1, -1))
        assert torch.equal(kwargs["encoder_hidden_states"][2:], off[0]["encoder_hidden_states"])


def test_a_missing_negative_is_the_empty_prompt(pipe):
    missing = pipe(**guided(negative_prompt=None)).images
    assert torch.equal(missing, pipe(**guided(negative_prompt="")).images)
    assert not torch.equal(missing, pipe(**guided()).images)
    assert not torch.equal(missing, pipe(**arguments()).images)


def test_the_second_negative_goes_to_t5_alone(pipe):
    both, second = pipe(**guided()).images, pipe(**guided(negative_prompt_2="blurry")).images
    assert not torch.equal(both, second)
    assert torch.equal(both, pipe(**guided(negative_prompt_2="nsfw")).images)


def test_one_string_negative_serves_many_prompts(pipe):
    string = pipe(**rows(3, negative_prompt="nsfw", true_cfg=4.0)).images
    listed = pipe(**rows(3, negative_prompt=["nsfw"] * 3, true_cfg=4.0)).images
    assert torch.equal(string, listed)


@pytest.mark.parametrize("true_cfg", [4.0, [4.0, 1.0, 2.5], torch.tensor([0.0, 3.0, 1.5])])
def test_a_batch_equals_its_singles(pipe, true_cfg):
    negatives = ["nsfw", "blurry", "low quality"]
    batch = pipe(**rows(3, negative_prompt=negatives, true_cfg=true_cfg)).images
    for i in range(3):
        image, mask = tiny_picture(SIZE, i)
        scale = true_cfg if isinstance(true_cfg, float) else float(true_cfg[i])
        changes = {"prompt": f"cup {i}", "image": image, "mask_image": mask, "generator": seeded(i)}
        single = pipe(**arguments(negative_prompt=negatives[i], true_cfg=scale, **changes)).images
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-5, rtol=1e-4)


def test_pictures_per_prompt_share_prompt_negative_and_cfg(pipe):
    """[4, 1] over two prompts of two pictures each: the second prompt's pictures are those without guidance."""
    common = {"prompt": ["a", "b"], "num_images_per_prompt": 2, "output_type": "latent"}
    on = pipe(**arguments(**common, negative_prompt=["nsfw", "blurry"], true_cfg=[4.0, 1.0])).images
    off = pipe(**arguments(**common)).images
    assert on.shape == (4, 16, 64)
    torch.testing.assert_close(on[2:], off[2:], atol=1e-5, rtol=1e-4)
    assert (on[:2] - off[:2]).abs().amax() > 1e-3


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2])
def test_negatives_and_prompts_as_embeddings(pipe, prompts, count):
    texts = ["a red cup", "a cat"][:prompts]
    embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=16)
    negative, negative_pooled, _ = pipe.encode_prompt("nsfw", max_sequence_length=16)  # one row for all prompts
    common = {"num_images_per_prompt": count}
    as_text = pipe(**guided(prompt=texts, **common)).images
    negatives = {"negative_prompt": None, "negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    mixed = pipe(**guided(prompt=texts, **negatives, **common)).images
    as_embeddings = pipe(**guided(prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, **negatives, **common)).images
    torch.testing.assert_close(mixed, as_text, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(as_embeddings, as_text, atol=1e-5, rtol=1e-4)


def test_encode_prompt_in_isolation(pipe, folder):
    """Encode with the text encoders alone, generate without them."""
    encoders = FluxFillCFGPipeline.from_pretrained(folder, transformer=None, vae=None)
    embeds, pooled, _ = encoders.encode_prompt("a red cup", max_sequence_length=16)
    negative, negative_pooled, _ = encoders.encode_prompt("nsfw", max_sequence_length=16)
    rest = FluxFillCFGPipeline.from_pretrained(folder, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    rest.set_progress_bar_config(disable=True)
    positives = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    negatives = {"negative_prompt": None, "negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    alone = rest(**guided(**positives, **negatives)).images
    torch.testing.assert_close(alone, pipe(**guided()).images, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        rest(**guided(**positives))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"negative_prompt": ["a", "b", "c"]}, "3 entries for 2 prompts"),
        ({"true_cfg": [2.0, 3.0, 4.0]}, "true_cfg: 3 rows for 2 prompts"),
        ({"negative_prompt_embeds": torch.zeros(1, 16, 24), "negative_prompt": None}, "go together"),
        ({"negative_prompt_embeds": torch.zeros(1, 16, 24), "negative_pooled_prompt_embeds": torch.zeros(1, 32)}, "not as both"),
        (
            {"negative_prompt": None, "negative_prompt_embeds": torch.zeros(1, 9, 24), "negative_pooled_prompt_embeds": torch.zeros(1, 32)},
            "do not fit",
        ),
        ({"strength": 0.0}, "leaves none"),
        ({"strength": 1.5}, "strength"),
        ({"masked_image_latents": torch.zeros(2, 16, 320)}, "masked_image_latents"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        pipe(**guided(prompt=["a", "b"]) | changes)


def test_save_and_load_give_the_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = FluxFillCFGPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**guided()).images, pipe(**guided()).images)
    assert isinstance(FluxFillPipeline.from_pretrained(tmp_path), FluxFillPipeline)


def test_dict_and_tuple_outputs_agree(pipe):
    assert torch.equal(pipe(**guided(return_dict=False))[0], pipe(**guided()).images)


def test_output_types_show_one_picture(pipe):
    """latent, pt, np and pil are the same picture, as upstream turns it from one into the other."""
    latents, pt, array, pil = (pipe(**guided(output_type=kind)).images for kind in ("latent", "pt", "np", "pil"))
    assert latents.shape == (1, 16, 64) and pt.shape == (1, 3, SIZE, SIZE) and array.shape == (1, SIZE, SIZE, 3)
    unpacked = pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)
    with torch.no_grad():
        decoded = pipe.vae.decode(unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pt)
    assert np.array_equal(array[0], pt[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_callbacks_see_and_change_tensors(pipe):
    seen = []

    def watch(_, step, timestep, tensors):
        assert set(tensors) == {"latents", "prompt_embeds"}
        assert len(tensors["prompt_embeds"]) == 1  # the positive alone, as upstream shows it
        seen.append((step, float(timestep)))
        return tensors

    wanted = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    watched = pipe(**guided(num_inference_steps=3, callback_on_step_end=watch, **wanted)).images
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] == 1000.0
    assert pipe.num_timesteps == 3
    assert torch.equal(watched, pipe(**guided(num_inference_steps=3)).images)

    def zero(_, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert pipe(**guided(output_type="latent", callback_on_step_end=zero)).images.abs().sum() == 0

    def blind(_, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    assert not torch.equal(pipe(**guided(callback_on_step_end=blind, **wanted)).images, pipe(**guided()).images)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipe(**guided(callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["noise_pred"]))


def test_a_callback_can_interrupt(pipe):
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = step == 1
        return tensors

    pipe(**guided(num_inference_steps=5, callback_on_step_end=stop))
    assert steps == [0, 1]


def test_bfloat16_stays_bfloat16():
    pipe = tiny_pipeline().to(torch.bfloat16)
    latents = pipe(**guided(output_type="latent")).images
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    per_sample = pipe(**guided(output_type="latent", true_cfg=[4.0])).images
    assert torch.equal(latents, per_sample)


def test_no_gradient_is_kept(pipe):
    assert not pipe(**guided()).images.requires_grad


def test_a_lora_in_the_hubs_layout_loads_scales_and_unloads(tmp_path):
    """As the authors' object-removal LoRA is used: load_lora_weights, weight 1.0."""
    pipe = tiny_pipeline()
    plain = pipe(**guided()).images
    with_lora = tiny_transformer()
    torch.manual_seed(1)
    with_lora.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False))
    FluxFillPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(with_lora))

    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="removal")
    pipe.set_adapters(["removal"], adapter_weights=[1.0])
    adapted = pipe(**guided()).images
    upstream = FluxFillPipeline(**pipe.components)
    assert torch.equal(pipe(**arguments()).images, upstream(**arguments()).images)
    assert (adapted - plain).abs().max() > 1e-3
    off = pipe(**guided(joint_attention_kwargs={"scale": 0.0})).images
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**guided()).images, plain)


def test_the_authors_quick_start_runs(folder, tmp_path, monkeypatch):
    """Their calls as they stand, but for the import and the steps: a transformer of another repository, pictures read by load_image."""
    monkeypatch.chdir(tmp_path)
    tuned = "OneReward/flux.1-fill-dev-OneReward-transformer"
    tiny_transformer(seed=7).save_pretrained(tuned)
    shutil.copytree(folder, "FLUX.1-Fill-dev")
    picture, mask = tiny_picture(128)
    picture.crop((0, 0, 96, 128)).save("image.png")
    mask.crop((0, 0, 96, 128)).save("mask_fill.png")

    transformer = FluxTransformer2DModel.from_pretrained(
        "OneReward", subfolder="flux.1-fill-dev-OneReward-transformer", torch_dtype=torch.bfloat16
    )
    pipe = FluxFillCFGPipeline.from_pretrained("FLUX.1-Fill-dev", transformer=transformer, torch_dtype=torch.bfloat16).to("cpu")
    image = load_image("image.png")
    mask = load_image("mask_fill.png")  # RGB, as load_image gives it
    image = pipe(
        prompt='the words "ByteDance", and in the next line "OneReward"',
        negative_prompt="nsfw",
        image=image,
        mask_image=mask,
        height=image.height,
        width=image.width,
        guidance_scale=1.0,
        true_cfg=4.0,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]
    image.save("image_fill.jpg")

    assert pipe.transformer is transformer and {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert load_image("image_fill.jpg").size == (96, 128) and np.asarray(image).std() > 1
