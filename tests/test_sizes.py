"""Sizes that are multiples of 8 and not of 64, which the UNet halves to odd ones on the way."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

import sd
from sd_more.low_memory import LowMemory
from test_sd import BETAS
from tests.reference import assert_close, checked, nhwc, run_unet

SIZES = [(8, 9), (9, 8), (13, 11), (15, 10), (12, 20), (17, 23)]  # of the latents


@pytest.mark.parametrize("h, w", SIZES)
def test_the_unet_answers_as_diffusers_at_any_size(pair, exchanged, h, w):
    """There each upsampling is to the size of the skip connection that comes next."""
    for unet in (pair[2][1], exchanged[1]):
        error = assert_close(*run_unet(pair[1][1], unet, h=h, w=w), 1e-5)
    checked("the UNet at sizes that are multiples of 8 only", "diffusers", error)


@pytest.mark.parametrize("h, w", [(13, 11), (9, 20)])
def test_with_a_controlnet_too(tiny, tiny_pipeline, control, controlnet, h, w):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, h, w, generator=generator)
    context = torch.randn(1, 77, 40, generator=generator)
    picture = torch.rand(1, 3, 8 * h, 8 * w, generator=generator)
    down, middle = controlnet(x, 371, context, picture, return_dict=False)
    truth = tiny_pipeline.unet(
        x, 371, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    model = tiny.controlled((control, np.asarray(nhwc(picture))[0], 1.0))
    ours = model.predict(nhwc(x), 371, sd.Condition(mx.array(context.numpy())))
    assert_close(ours, truth.permute(0, 2, 3, 1), 1e-4)


@pytest.mark.parametrize("width, height", [(72, 104), (200, 88)])
def test_latents_and_pictures_are_those_of_diffusers(tiny, tiny_pipeline, width, height):
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    parts = tiny_pipeline.components | {"scheduler": scheduler}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    truth = pipeline(
        "a red house", height, width, num_inference_steps=5, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(42),
    ).images[0]  # fmt: skip
    options = {"steps": 5, "cfg": 3.0, "width": width, "height": height}
    *_, x = tiny.generate_latents("a red house", **options)
    picture = np.array(tiny.decode(x))[0]
    assert picture.shape == (height, width, 3)
    checked("a picture of 72 x 104", "diffusers", assert_close(picture, truth, 1e-3))
    frugal = LowMemory()
    *_, y = frugal.generate_latents("a red house", **options)
    assert_close(y, x, 1e-4)
    assert np.array(frugal.decode(y)).shape == (1, height, width, 3)


def test_pictures_and_masks_of_such_sizes_can_be_painted_over(tiny):
    picture = np.random.default_rng(1).integers(0, 255, (72, 136, 3), np.uint8)
    mask = np.zeros((72, 136), np.uint8)
    mask[3:50, 10:60] = 255
    images = [sd.Image.fromarray(each) for each in (picture, mask)]
    options = {"steps": 2, "cfg": 1, "width": 136, "height": 72}
    (over,) = tiny.img2img("a tree", images[0], **options)
    (inside,) = tiny.inpaint("a tree", *images, **options)
    assert over.size == inside.size == (136, 72)
    assert np.array_equal(np.array(inside)[60:], picture[60:])


@pytest.mark.parametrize("size", [0, -8, 8, 56, 63, 65, 100, 64.0, "64", True])
def test_other_sizes_are_refused(tiny, size):
    with pytest.raises(
        sd.SDError, match=f"width must be a multiple of 8, and 64 at least, got {size}"
    ):
        tiny.generate_latents("a house", width=size)
