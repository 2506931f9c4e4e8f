"""LowMemory: the same pictures as StableDiffusion paints, with one network in memory at a time."""

import gc
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import sd
import sd_more.samplers  # noqa: F401  it adds samplers
from sd_more.low_memory import LowMemory, in_tiles
from sd_more.prompts import read_weighted
from sd_more.textual_inversion import textual_inversion
from tests.reference import assert_close, flat_controlnet, write_file, write_flat

WIDTH = 40  # of the miniature's context


@pytest.fixture(scope="module")
def frugal():
    return LowMemory()


def last(generator):
    *_, x = generator
    return x


@pytest.mark.parametrize("cfg", [1, 3])
def test_low_memory_paints_the_same_pictures(tiny, frugal, cfg):
    options = {"seed": 7, "steps": 4, "cfg": cfg, "n_images": 2, "negative_prompt": "a tree"}
    for _ in range(2):  # the second time with weights that were forgotten and read again
        x = last(tiny.generate_latents("a red house", **options))
        ours = last(frugal.generate_latents("a red house", **options))
        assert_close(ours, x, 1e-4)  # matrix products of another size round otherwise
        assert_close(frugal.decode(x), tiny.decode(x), 1e-4)
        pictures = tiny.decode(x)
        assert_close(frugal.encode(pictures), tiny.encode(pictures), 1e-4)


def test_whole_models_of_both_versions_paint_the_same(pair, tmp_path):
    config, _, ours = pair
    path = write_flat(tmp_path / "model.safetensors", config, ours)
    options = {"seed": 3, "steps": 3, "sampler": "euler-a", "n_images": 2}
    x, y = (
        last(kind(path).generate_latents("a house", **options))
        for kind in (sd.StableDiffusion, LowMemory)
    )
    assert_close(y, x, 1e-4)


def test_plain_layers_and_half_precision_can_be_asked_for(tiny):
    x = last(tiny.generate_latents("a red house", seed=7, steps=2))
    plain = LowMemory(fast=False)
    assert_close(last(plain.generate_latents("a red house", seed=7, steps=2)), x, 1e-4)
    with plain.network("unet") as unet:
        assert type(unet.conv_out) is sd.Conv
    half = LowMemory(dtype="float16")
    assert half.dtype == mx.float16
    truth = last(sd.StableDiffusion(dtype="float16").generate_latents("a red house", steps=2))
    assert_close(last(half.generate_latents("a red house", steps=2)), truth, 0.02)


def test_a_reader_and_changes_are_those_of_stable_diffusion(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2, WIDTH), np.float32) / 4
    vectors = {"<my-cat>": mx.array(vectors)}
    path = write_file(tmp_path / "a.safetensors", {"kind": "words"}, vectors)
    changes = [textual_inversion(path), sd.clip_skip(2)]
    text = ["a red (<my-cat>:1.2) at night BREAK " + "dog " * 80]
    for reader in (None, read_weighted):
        model = sd.StableDiffusion(changes=changes, reader=reader)
        frugal = LowMemory(changes=iter(changes), reader=reader)
        for _ in range(2):
            assert_close(frugal.encode_prompts(text), model.encode_prompts(text), 1e-5)
            frugal.txt2img("<my-cat>", steps=1)


def test_a_file_that_does_not_fit_is_refused_when_it_is_opened(tmp_path):
    _, weights = sd.read_flat(sd.TINY)
    config = json.loads(sd.read_header(sd.TINY)["config"])
    del weights["unet.conv_out.bias"]
    path = write_file(tmp_path / "a.safetensors", config, weights)
    with pytest.raises(sd.SDError, match="unet.*conv_out.bias"):
        LowMemory(path)


def test_it_goes_with_controlnets_pictures_and_masks(
    tiny, frugal, controlnet, drawn, hole, tmp_path
):
    net = sd.ControlNet(flat_controlnet(controlnet, tmp_path))
    picture, _ = sd.load_picture(drawn)
    options = {"steps": 5, "seed": 3, "n_images": 2}
    tasks = sd.ImageToImage(picture, 0.6), sd.Inpaint(picture, hole)
    truth, ours = (
        [last(model.generate_latents("a red house", task=task, **options)) for task in tasks]
        for model in (model.controlled((net, picture, 1.0)) for model in (tiny, frugal))
    )
    for x, expected in zip(ours, truth):
        assert_close(x, expected, 1e-4)


def size(network, *parts):
    named = tree_flatten(network.parameters())
    return sum(p.nbytes for name, p in named if name.startswith(parts or ""))


@pytest.mark.parametrize("controlled", [False, True], ids=["alone", "its copy with controls"])
def test_low_memory_keeps_one_network_in_memory(controlled):
    """What MLX holds: first nothing, then the UNet, then the half of the VAE that decodes."""
    gc.collect()  # what other tests left
    mx.clear_cache()
    before = mx.get_active_memory()
    model = LowMemory()
    little = 2**20  # latents, the context
    assert mx.get_active_memory() - before < little
    sizes = []
    for name, parts in (("text_encoder", ()), ("unet", ()), ("vae", ("decoder", "post_quant"))):
        with model.network(name) as network:
            sizes.append(size(network, *parts))
        del network
    text, unet, decoder = sizes
    assert min(text, unet, decoder) > little
    if controlled:  # one shares with the other what is in memory
        model.txt2img("", steps=1)
        model, first = model.controlled(), model
    for x in model.generate_latents("a red house", steps=2):
        assert unet <= mx.get_active_memory() - before < unet + little
    mx.eval(model.decode(x))
    assert decoder <= mx.get_active_memory() - before < decoder + little
    task = sd.ImageToImage(np.zeros((128, 128, 3), np.float32), 1.0)
    for x in model.generate_latents("a red house", steps=2, task=task):
        assert unet <= mx.get_active_memory() - before < unet + little  # nor the half that encodes
    if controlled:
        first.decode(x)
        assert decoder <= mx.get_active_memory() - before < decoder + little


def repeat(x):  # twice as high and wide
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


def skip(x):
    return x[:, ::2, ::2]


@pytest.mark.parametrize("h, w", [(8, 8), (9, 8), (16, 31), (8, 40), (50, 17)])
def test_a_function_of_single_positions_is_the_same_in_tiles(h, w):
    """So the ramps' weights sum to one at each position, whatever the sizes."""
    x = mx.array(np.random.default_rng(0).standard_normal((2, h, w, 3), np.float32))
    assert_close(in_tiles(repeat, x, 8, 1, 2), repeat(x), 1e-6)
    assert_close(in_tiles(skip, repeat(x), 8, 2, 1), x, 1e-6)


def test_no_tile_is_larger_than_asked():
    seen = set()

    def look(x):
        seen.add(x.shape[1:3])
        return x

    in_tiles(look, mx.zeros((1, 20, 12, 1)), 8, 1, 1)
    assert seen == {(8, 8)}


def test_tiles_of_the_vae_leave_no_seam(tiny, frugal):
    """What tiles change is small, and steps no more where a tile begins or ends than nearby."""
    x = last(tiny.generate_latents("a red house", steps=10, width=256, height=256))
    whole, tiles = np.array(tiny.decode(x)), np.array(frugal.decode(x))
    error = tiles - whole
    print(f"decoded in tiles: off by {np.abs(error).mean() * 255:.1f} levels of 255 on average")
    assert 0 < np.abs(error).mean() < 4 / 255
    for axis in (1, 2):
        steps = np.abs(np.diff(error, axis=axis)).mean((0, 3 - axis, 3))
        for line in (63, 127, 191):  # tiles of 128 begin at 0, 64 and 128
            around = np.delete(steps[line - 4 : line + 5], 4)
            assert steps[line] < 1.5 * around.mean(), line
    latents, truth = np.array(frugal.encode(whole)), np.array(tiny.encode(whole))
    assert 0 < np.abs(latents - truth).mean() < 0.1 * np.abs(truth).mean()
