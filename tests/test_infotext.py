"""The texts of pictures, others' prompts, and options without effect: what is read of them, and
that whatever is not done is said.

The texts are as their programs write them: AUTOMATIC1111's create_infotext() of several versions,
Forge's, SD.Next's and stable-diffusion.cpp's, and ours of all ages.
"""

import contextlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sd
from sd_more import app
from sd_more import options as options_of_it
from sd_more.infotext import PARAMETERS, read_parameters, write_parameters
from sd_more.output import save_picture
from sd_more.prompts import (
    find_strange,
    parse_weights,
    read_weighted,
    spell_words,
    split_chunks,
    without_loras,
)
from tests.reference import kohya_names

WIDTH = 40  # of the miniature's context


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd.say_once.cache_clear()


def picture(text, name="a.png"):
    Path(name).unlink(missing_ok=True)
    save_picture(Image.new("RGB", (64, 64)), Path(name), text)
    return name


def said(capsys):
    return capsys.readouterr().err.replace("sd.py: ", "").splitlines()


# %% Others' texts ---------------------------------------------------------------------------------

NOT_DONE = "--from-png a.png: not done here: "
MADE_WITH = "--from-png a.png: made with the model {}; to paint with it, give --model."
TEXTS = {
    "A1111 1.3, enlarged": (
        ("masterpiece, ((a castle)), [fog]\nNegative prompt: ugly, (blurry:1.3)\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 8, Seed: 1931785963, Size: 512x832, "
        "Model hash: cca17b08da, Model: MAADBD2fp16, Denoising strength: 0.5, Clip skip: 2, "
        "ENSD: 31337, Hires upscale: 2, Hires steps: 20, Hires upscaler: Latent, Version: v1.3.2"),
        {
            "prompt": "masterpiece, ((a castle)), [fog]", "negative_prompt": "ugly, (blurry:1.3)",
            "steps": 20, "sampler": "dpm++-karras", "cfg": 8.0, "seed": 1931785963, "width": 512,
            "height": 832, "clip_skip": 2, "rng": "philox",
        },
        [
            NOT_DONE + "Denoising strength 0.5, ENSD 31337, Hires upscale 2, Hires steps 20, "
            "Hires upscaler Latent",
            MADE_WITH.format("MAADBD2fp16, hash cca17b08da"),
        ],
    ),
    "A1111 1.9, schedule in a field": (
        ("a cat\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, "
        "Size: 512x512, RNG: CPU, Emphasis: Original, Version: v1.10.1"),
        {
            "prompt": "a cat", "negative_prompt": "", "steps": 25, "sampler": "dpm++-karras",
            "cfg": 7.0, "seed": 5, "width": 512, "height": 512, "rng": "torch",
        },
        [],
    ),
    "A1111 1.9, Automatic": (
        ("a cat\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Automatic, Seed: 5, RNG: NV, "
        "Version: v1.9.4"),
        {
            "prompt": "a cat", "negative_prompt": "", "steps": 25, "sampler": "dpm++-karras",
            "seed": 5, "rng": "philox",
        },
        [],
    ),
    "A1111 1.9, Euler a with Karras": (
        "a cat\nSteps: 25, Sampler: Euler a, Schedule type: Karras, Seed: 5, Version: v1.9.4",
        {
            "prompt": "a cat", "negative_prompt": "", "steps": 25, "sampler": "euler-a",
            "spacing": "karras", "seed": 5, "rng": "philox",
        },
        [],
    ),
    "A1111 1.9, another schedule": (
        "a cat\nSteps: 25, Sampler: Euler, Schedule type: SGM Uniform, Seed: 5, Version: v1.9.4",
        {
            "prompt": "a cat", "negative_prompt": "", "steps": 25, "sampler": "euler", "seed": 5,
            "rng": "philox",
        },
        [NOT_DONE + "Schedule type SGM Uniform"],
    ),
    "A1111, from a picture, faces mended": (
        ("a man\nSteps: 30, Sampler: Euler a, CFG scale: 7, Seed: 9, Face restoration: CodeFormer, "
        "Size: 512x512, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE: "
        "vae-ft-mse-840000-ema-pruned.safetensors, Denoising strength: 0.7, Mask blur: 4, "
        "Version: v1.6.0"),
        {
            "prompt": "a man", "negative_prompt": "", "steps": 30, "sampler": "euler-a",
            "cfg": 7.0, "seed": 9, "width": 512, "height": 512, "rng": "philox",
        },
        [
            NOT_DONE + "Face restoration CodeFormer, VAE vae-ft-mse-840000-ema-pruned.safetensors, "
            "Denoising strength 0.7, Mask blur 4",
            MADE_WITH.format("v1-5-pruned-emaonly, hash 6ce0161689"),
        ],
    ),
    "A1111, no prompt": (
        "Negative prompt: ugly\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512",
        {
            "prompt": "", "negative_prompt": "ugly", "steps": 20, "sampler": "ddim", "cfg": 7.0,
            "seed": 1, "width": 512, "height": 512, "rng": "philox",
        },
        [],
    ),
    "A1111, neither": (
        "Steps: 20, Sampler: LMS, CFG Scale: 7, seed: 1",
        {
            "prompt": "", "negative_prompt": "", "steps": 20, "sampler": "lms", "cfg": 7.0,
            "seed": 1, "rng": "philox",
        },
        [],
    ),
    "dynamic prompts, and settings in the prompt": (
        ("a red car\nSteps: many\nNegative prompt: b\nc\nSteps: 20, Sampler: Euler, Seed: 1, "
        "Version: v1.6.0\nTemplate: a {red|blue} car\nNegative Template: b\nc"),
        {
            "prompt": "a red car\nSteps: many", "negative_prompt": "b\nc", "steps": 20,
            "sampler": "euler", "seed": 1, "rng": "philox",
        },
        [],
    ),
    "A1111 with hashes, embeddings and ControlNet": (
        ("a <lora:style:0.8> dog\nNegative prompt: EasyNegative\nSteps: 20, Sampler: Euler, "
        'Seed: 1, Lora hashes: "style: 1a2b3c4d5e6f", TI hashes: "easynegative: c74b4e810b03, '
        'easynegative: c74b4e810b03", Hashes: {"vae": "735e4c3a44", "model": "9cb3e8dbd4"}, '
        'ControlNet 0: "Module: canny, Model: control_v11p [d14c016b], Weight: 1", '
        "Tiling: False, Version: v1.7.0"),
        {
            "prompt": "a <lora:style:0.8> dog", "negative_prompt": "EasyNegative", "steps": 20,
            "sampler": "euler", "seed": 1, "rng": "philox",
        },
        [
            NOT_DONE + "ControlNet 0 Module: canny, Model: control_v11p [d14c016b], Weight: 1, "
            "embedding easynegative"
        ],
    ),
    "Forge": (
        ("a dog\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, "
        "Size: 512x512, Model hash: bdb59bac77, Model: dreamshaper_8, Hires Module 1: Use same "
        "choices, Version: f2.0.1v1.10.1-previous-669-gdfdcbab6, Module 1: vae-ft-mse"),
        {
            "prompt": "a dog", "negative_prompt": "", "steps": 20, "sampler": "euler-a",
            "cfg": 7.0, "seed": 5, "width": 512, "height": 512, "rng": "philox",
        },
        [
            NOT_DONE + "Hires Module 1 Use same choices, Module 1 vae-ft-mse",
            MADE_WITH.format("dreamshaper_8, hash bdb59bac77"),
        ],
    ),
    "SD.Next": (
        ("a dog\nSteps: 20, Size: 512x512, Sampler: Euler a, Seed: 5, CFG scale: 6, "
        "CFG rescale: 0.7, App: SD.Next, Version: 5b4b64a, Pipeline: StableDiffusionPipeline, "
        "Operations: txt2img, Model: tiny"),
        {
            "prompt": "a dog", "negative_prompt": "", "steps": 20, "width": 512, "height": 512,
            "sampler": "euler-a", "seed": 5, "cfg": 6.0, "rescale": 0.7, "rng": "philox",
        },
        [],
    ),
    "stable-diffusion.cpp": (
        ("A sunflower field\nNegative prompt: Blue sky\nSteps: 30, CFG scale: 5.000000, "
        "Guidance: 3.500000, Eta: 0.000000, Seed: 197583933, Size: 512x512, "
        "Model: v1-5-pruned-emaonly.safetensors, RNG: cuda, Sampler: dpm++2m karras, "
        "Version: stable-diffusion.cpp"),
        {
            "prompt": "A sunflower field", "negative_prompt": "Blue sky", "steps": 30, "cfg": 5.0,
            "seed": 197583933, "width": 512, "height": 512, "rng": "philox",
            "sampler": "dpm++-karras",
        },
        [MADE_WITH.format("v1-5-pruned-emaonly.safetensors")],
    ),
    "another program that uses our names": (
        "a dog\nSteps: 3, Image: /etc/passwd, Mask: 1, Model file: x.ckpt, Version: v9",
        {"prompt": "a dog", "negative_prompt": "", "steps": 3, "rng": "philox"},
        [NOT_DONE + "Image /etc/passwd, Mask 1, Model file x.ckpt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, options, lines", TEXTS.values(), ids=TEXTS)
def test_anothers_text_is_read_and_what_is_not_done_is_said(capsys, text, options, lines):
    found = read_parameters(picture(text))
    found.pop("model_hash", None)
    assert found == options
    assert said(capsys) == lines
    # Read once more it says nothing new.
    read_parameters("a.png")
    assert said(capsys) == []


def test_what_the_command_line_settles_is_not_said(capsys):
    picture(TEXTS["A1111, from a picture, faces mended"][0])
    given = {"model": Path("b.ckpt"), "image": Path("b.png")}
    assert read_parameters("a.png", given)["strength"] == 0.7
    mend = "Face restoration CodeFormer, VAE vae-ft-mse-840000-ema-pruned.safetensors, Mask blur 4"
    assert said(capsys) == [NOT_DONE + mend]
    picture(TEXTS["A1111 1.9, another schedule"][0])
    read_parameters("a.png", {"sampler": "ddim"})
    assert said(capsys) == []
    args = app.parse(["--from-png", "a.png", "--steps", "7", "--lora", "x"])
    assert (args.steps, args.seed, args.lora) == (7, [5], ["x"])
    assert args.given == ["from_png", "lora", "steps"]


@pytest.mark.parametrize(
    "sampler, name",
    [
        ("Euler a", "euler-a"), ("euler_a", "euler-a"), ("k_euler_a", "euler-a"), ("PLMS", "plms"),
        ("DDIM", "ddim"), ("LCM", "lcm"), ("dpm++2m", "dpm++"), ("DPM++ 2M", "dpm++"),
        ("EULER-A", "euler-a"), ("DPM++-KARRAS", "dpm++-karras"), ("euler_a discrete", "euler-a"),
    ],
)  # fmt: skip
def test_samplers_are_known_by_their_other_names(sampler, name):
    assert read_parameters(picture(f"a\nSteps: 1, Sampler: {sampler}"))["sampler"] == name


@pytest.mark.parametrize("sampler", ["UniPC", "DPM++ SDE Karras", "Heun"])
def test_a_sampler_that_is_not_known_is_named_unless_another_is_given(sampler):
    picture(f"a\nSteps: 1, Sampler: {sampler}, Version: v1.6.0")
    with pytest.raises(sd.SDError, match=f"sampler must be one of .*, got {re.escape(sampler)}"):
        app.check(app.parse(["--from-png", "a.png"]))
    app.check(app.parse(["--from-png", "a.png", "--sampler", "ddim"]))


def exif(code, text, name):
    image = Image.new("RGB", (64, 64))
    notes = image.getexif()
    notes.get_ifd(0x8769)[0x9286] = code + text
    image.save(name, exif=notes)
    return name


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
@pytest.mark.parametrize(
    "code, order",
    [
        (b"UNICODE\0", "utf-16-be"), (b"UNICODE\0", "utf-16-le"), (b"UNICODE\0", "utf-16"),
        (b"ASCII\0\0\0", "utf-8"), (bytes(8), "utf-8"), (b"", "utf-8"),
    ],
)  # fmt: skip
def test_the_text_of_a_jpeg_is_read(name, code, order):
    text = "a café, 富嶽\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, Seed: 5"
    found = read_parameters(exif(code, text.encode(order), name))
    assert found == {
        "prompt": "a café, 富嶽", "negative_prompt": "ugly", "steps": 20, "sampler": "euler-a",
        "seed": 5, "rng": "philox",
    }  # fmt: skip


@pytest.mark.parametrize(
    "maker, chunks",
    [
        ("ComfyUI", {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}),
        ("ComfyUI", {"workflow": "{}"}),
        ("InvokeAI", {"invokeai_metadata": '{"app_version": "3.4.0"}'}),
        ("InvokeAI", {"sd-metadata": "{}", "Dream": '"a cat" -s 50 -S 5'}),
        ("NovelAI", {"Software": "NovelAI", "Comment": '{"seed": 28}', "Description": "1girl"}),
        ("SwarmUI", {"parameters": json.dumps({"sui_image_params": {"prompt": "a cat"}})}),
        ("Fooocus", {"parameters": '{"prompt": "a cat"}', "fooocus_scheme": "fooocus"}),
        ("Easy Diffusion", {"prompt": "a cat", "use_stable_diffusion_model": "sd-v1-5"}),
        ("Easy Diffusion", {"Prompt": "a cat", "Stable Diffusion model": "sd-v1-5"}),
        ("Draw Things", {"XML:com.adobe.xmp": "<x:xmpmeta>Draw Things {}</x:xmpmeta>"}),
        (None, {"Comment": "GIMP", "parameters": "a cat"}),
        (None, {}),
    ],
)
def test_whoever_writes_another_text_is_named(maker, chunks):
    info = PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text)
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=info)
    says = "it does not say how it was made."
    if maker:
        says = f"{maker} made it, whose settings are not read here: give --prompt, --seed and the "
        says += "like."
    with pytest.raises(sd.SDError) as error:
        read_parameters("a.png")
    assert str(error.value) == f"--from-png a.png: {says}"


def test_a_comfyui_picture_with_a1111s_text_is_read():
    info = PngInfo()
    info.add_text("workflow", "{}")
    info.add_text("parameters", "a cat\nSteps: 3")
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=info)
    assert read_parameters("a.png")["steps"] == 3


def test_what_is_said_of_a_strangers_text_is_short_and_printable(capsys):
    picture("a\nSteps: 1, Version: \x1b[31m, " + ", ".join(f"x{i}: {'y' * 99}" for i in range(500)))
    read_parameters("a.png")
    (line,) = said(capsys)
    assert len(line) < 1100 and "\x1b" not in line


@pytest.mark.parametrize("text", ["{", "[", '"', "{}", ": ", "|", "__a", "Steps: ", "\n", "[a|"])
def test_hostile_texts_are_read_in_linear_time(text):
    start, text = time.perf_counter(), text * (90_000 // len(text))
    for line in (text, f"a: {text}", f"a, {text}", f"TI hashes: {text}", f'a: "{text}"'):
        with contextlib.suppress(sd.SDError):
            read_parameters(picture(f"{text[:4999]}\nSteps: 1, {line[:90_000]}"))
    find_strange(text[:20_000])
    without_loras("<lora:" * 15_000)
    assert time.perf_counter() - start < 5


# %% Our own texts ---------------------------------------------------------------------------------

OURS = {  # as write_parameters made them before; the first is from before it had more than these
    "first": (
        ("a\nNegative prompt: b\nSteps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, "
        "Size: 512x512, Model: tiny, RNG: torch, dtype: float32, Version: sd.py"),
        {
            "prompt": "a", "negative_prompt": "b", "steps": 50, "sampler": "plms", "cfg": 7.5,
            "seed": 42, "width": 512, "height": 512, "rng": "torch", "dtype": "float32",
        },
    ),
    "all fields": (
        ("\nNegative prompt: b\nSteps: 1, Sampler: EULER-A, CFG scale: 2.0, Seed: 42, "
        "Size: 128x128, Model: x, RNG: numpy, dtype: float32, Denoising strength: 1.0, "
        "Image: red-house.png, Mask: mask.png, Clip skip: 2, Lora: 'a b.safetensors:0.5' c, "
        "Words: 'a thing.safetensors', ControlNet: \"edges:0.7\", Control image: e.png, "
        'Model file: "m,x.ckpt", Plain prompt: True, Low memory: True, Images: 1, Version: sd.py'),
        {
            "prompt": "", "negative_prompt": "b", "steps": 1, "sampler": "euler-a", "cfg": 2.0,
            "seed": 42, "width": 128, "height": 128, "rng": "numpy", "dtype": "float32",
            "strength": 1.0, "image": Path("red-house.png"), "mask": Path("mask.png"),
            "clip_skip": 2, "lora": ["a b.safetensors:0.5", "c"],
            "embedding": ["a thing.safetensors"], "controlnet": ["edges:0.7"],
            "control_image": ["e.png"], "model": "m,x.ckpt", "plain_prompt": True,
            "low_memory": True, "spacing": "leading",
        },
    ),
    "Karras, philox, a step": (
        ("a\nSteps: 2, Sampler: DPM++-KARRAS, CFG scale: 1.0, Seed: 0, Size: 64x64, Model: tiny, "
        "RNG: philox, dtype: float16, Images: step 1, Version: sd.py"),
        {
            "prompt": "a", "negative_prompt": "", "steps": 2, "sampler": "dpm++-karras",
            "cfg": 1.0, "seed": 0, "width": 64, "height": 64, "rng": "philox", "dtype": "float16",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, options", OURS.values(), ids=OURS)
def test_our_old_texts_are_read_as_they_were(capsys, text, options):
    found = read_parameters(picture(text))
    found.pop("model_hash", None)
    assert found == options
    assert said(capsys) == []


def recipe(**options):
    nothing = {option: None for option, _ in PARAMETERS.values()}
    usual = {
        "seed": 7,
        "steps": 5,
        "sampler": "plms",
        "cfg": 2.0,
        "rng": "torch",
        "negative_prompt": "",
    }
    return nothing | usual | {"model": sd.TINY, "rescale": 0} | options


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, ("Steps: 5, Sampler: PLMS, CFG scale: 2.0, Seed: 7, Size: 64x64, Model: tiny, "
             "RNG: CPU, Images: 1, Version: sd.py")),
        (
            {"sampler": "euler-a", "rng": "philox", "spacing": "linspace"},
            "Sampler: Euler a, CFG scale: 2.0, ",
        ),
        ({"sampler": "dpm++", "spacing": "leading"}, "Sampler: DPM++ 2M, CFG scale: 2.0, "),
        ({"sampler": "dpm++-karras"}, "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.0, "),
        ({"sampler": "euler", "spacing": "karras"}, "Sampler: Euler, Schedule type: Karras, "),
        ({"sampler": "ddim", "spacing": "trailing", "rescale": 0.7}, "CFG rescale: 0.7"),
        ({"rng": "mlx"}, "RNG: mlx"),
        ({"rng": "philox"}, "RNG: NV"),
    ],
)  # fmt: skip
def test_what_is_written_has_the_names_that_others_read_and_is_read_back(capsys, options, says):
    options = recipe(**options)
    text = write_parameters(options, "a cat", 7, 64, 64)
    assert says in text
    found = recipe() | read_parameters(picture(text))
    assert {name: found[name] for name in options} == options
    assert said(capsys) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "", "a", "a\nb", "a\nNegative prompt: b", "Negative prompt: b", "\nSteps: 3, Seed: 9",
        "a\nNegative prompt: b\n\nNegative prompt: c", "a\nNegative prompt:", "\n\n", " a ",
        'a, "b": c',
    ],
)  # fmt: skip
@pytest.mark.parametrize("negative", ["", "b", "b\nNegative prompt: c", "b\nSteps: 3"])
def test_whatever_stands_in_our_prompts_is_read_back(prompt, negative):
    text = write_parameters(recipe(negative_prompt=negative), prompt, 7, 64, 64)
    found = read_parameters(picture(text))
    assert (found["prompt"], found["negative_prompt"]) == (prompt, negative)


def test_a_path_of_a_picture_is_read_back():
    for path in ('a "b", c: d.png', "a{b}.png", "[a, b].png", "{a", "a\nb"):
        text = write_parameters(recipe(image=Path(path), strength=0.5), "a", 7, 64, 64)
        assert read_parameters(picture(text))["image"] == Path(path)


# %% Others' prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, marks",
    [
        ("a {red|blue} cat", ["{red|blue}"]),
        ("a {2$$red|blue|green} cat", ["{2$$red|blue|green}"]),
        ("a [cat:dog:0.5], [fog:10], [tree::0.3]", ["[cat:dog:0.5]", "[fog:10]", "[tree::0.3]"]),
        ("a [cow|horse] in a field", ["[cow|horse]"]),
        ("a cat AND a dog", ["AND"]),
        ("a __color__ cat, __animals/birds__", ["__color__", "__animals/birds__"]),
        ("a <lora:style:0.8> cat", ["<lora:style:0.8>"]),
        ("a {red|blue} [cat:dog:0.5] AND [grey] sky", ["{red|blue}", "[cat:dog:0.5]", "AND"]),
        (r"a [grey] (cat:1.3) \[a|b\], SAND, and, snake_case, {}, 10:30, [a (b:1.2)]", []),
    ],
)
def test_what_has_a_meaning_only_elsewhere_is_named(tiny, capsys, prompt, marks):
    assert find_strange(prompt) == marks
    read_weighted(tiny, [prompt, ""])
    assert said(capsys) == [f'"{mark}" in the prompt is read as text here.' for mark in marks]


class Words:
    """As much of a tokenizer as spelling needs."""

    words = {"cat-toy": [50000], "<Trio>": [50001, 50002], "Cat": [50003], "cat": [50004]}  # noqa: RUF012


@pytest.mark.parametrize(
    "prompt, spelled",
    [
        ("a CAT-TOY here", "a cat-toy here"),
        ("a (Cat-Toy:1.2)", "a (cat-toy:1.2)"),
        ("embedding:cat-toy", "cat-toy"),
        ("(Embedding:Cat-Toy.pt:1.2)", "(cat-toy:1.2)"),
        ("embedding:cat-toy.safetensors, a", "cat-toy, a"),
        ("<TRIO> <trio>", "<Trio> <Trio>"),
        ("Cat cat CAT", "Cat cat cat"),
        ("scat, cats, embedding:dog", "scat, cats, embedding:dog"),
    ],
)
def test_a_loaded_word_is_found_however_it_is_written(prompt, spelled):
    assert spell_words(Words, prompt) == spelled


def tokens(model, prompt):
    return [len(chunk) for chunk in split_chunks(model.tokenizer, prompt)]


@pytest.mark.parametrize(
    "prompt, sizes",
    [  # AUTOMATIC1111's rule by hand: a comma among the last 20 of 75, what follows it moves on
        ("dog " * 80, [75, 5]),
        ("dog " * 60 + ", " + "cat " * 20, [61, 20]),
        ("dog " * 55 + ", " + "cat " * 20, [56, 20]),
        ("dog " * 54 + ", " + "cat " * 21, [75, 1]),
        ("dog " * 74 + ", cat", [75, 1]),
        ("dog " * 75 + ", cat", [75, 2]),
        ("dog " * 60 + ", " + "cat " * 14, [75]),
        ("dog " * 60 + ", " + "cat " * 14 + ", bird", [75, 2]),
        (("dog " * 9 + ", ") * 15, [70, 70, 10]),
        ("dog , BREAK " + "cat " * 76, [2, 75, 1]),
        ("dog " * 60 + ", (" + "cat " * 10 + ":1.2) " + "bird " * 10, [61, 20]),
    ],
)
def test_a_long_prompt_is_cut_behind_a_comma(tiny, prompt, sizes):
    assert tokens(tiny, prompt) == sizes


def test_what_moves_on_keeps_its_order_and_its_weight(tiny):
    prompt = "dog " * 60 + ", (" + "cat " * 10 + ":1.2) " + "bird " * 10
    plain = [(i, w) for chunk in split_chunks(tiny.tokenizer, prompt) for i, w in chunk]
    ids = [
        i
        for piece, _ in parse_weights(prompt)
        for *_, ids in tiny.tokenizer.split(piece)
        for i in ids
    ]
    assert [i for i, _ in plain] == ids
    assert [w for _, w in plain] == [1.0] * 61 + [1.2] * 10 + [1.0] * 10


@pytest.fixture
def style(lora):
    save_file(kohya_names(lora), "Style.safetensors")
    return "Style.safetensors"


def run(*options):
    app.main(["--steps", "2", "--width", "64", "--height", "64", *map(str, options)])


def settings(path):
    with Image.open(path) as image:
        return image.text["parameters"]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def test_a_lora_in_the_prompt_is_loaded_from_a_folder(capsys, style):
    Path("loras/deep").mkdir(parents=True)
    Path(style).rename(f"loras/deep/{style}")
    run("--prompt", "a dog", "--lora", f"loras/deep/{style}:0.8", "--output", "a.png")
    run("--prompt", "a <lora:style:0.8> dog", "--folder", "loras", "--output", "b.png")
    run("--prompt", "a dog", "--output", "c.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert np.abs(pixels("a.png") - pixels("c.png")).max() > 3
    assert "left out" not in capsys.readouterr().err
    assert settings("b.png").startswith("a <lora:style:0.8> dog\n")
    flat = Path(style).with_suffix(".flat.safetensors")  # which was there, so it is found by name
    assert f'Lora: "loras/deep/{flat}:0.8"' in settings("b.png")
    run("--from-png", "b.png", "--output", "d.png")
    assert np.array_equal(pixels("b.png"), pixels("d.png")) and settings("b.png") == settings(
        "d.png"
    )


def loras(prompt, *options):
    args = app.parse(["--prompt", prompt, *map(str, options)])
    app.check(args)
    app.add_loras(args, [prompt])
    return args.lora


@pytest.mark.parametrize(
    "prompt, options, found, says",
    [
        ("<lora:style:0.8>", ["--lora", "Style.safetensors:0.3"], ["Style.safetensors:0.8"],
         "the prompt's strength 0.8 of Style.safetensors takes --lora's place."),
        ("<lora:Style>", ["--folder", "."], ["Style.safetensors:1.0"], None),
        ("<lyco:style:.5:.5>", ["--folder", "."], ["Style.safetensors:0.5"], None),
        ("<lora:style:-1>", ["--lora", "x:0.1", "--lora", "Style.safetensors"],
         ["x:0.1", "Style.safetensors:-1.0"],
         "the prompt's strength -1.0 of Style.safetensors takes --lora's place."),
        ("<lora:foo:0.8>", [], [],
         "<lora:foo:0.8>{}: give --folder or --lora."),
        ("<lora:foo:0.8>", ["--folder", "."], [],
         "<lora:foo:0.8>{}: no --folder has such a file."),
        ("<lora:../Style:0.8>", ["--folder", "sub"], [],
         "<lora:../Style:0.8>{}: no --folder has such a file."),
        ("<lora:style:0.8:0.5>", ["--folder", "."], [],
         "<lora:style:0.8:0.5>{}: its strength must be one number."),
        ("<lora:style:much>", ["--folder", "."], [],
         "<lora:style:much>{}: its strength must be one number."),
        ("<hypernet:style:0.8>", ["--folder", "."], [],
         "<hypernet:style:0.8>{}: hypernetworks are not done here."),
        ("<lora:style:0.8>", ["--plain-prompt"], [], None),
    ],
)  # fmt: skip
def test_a_lora_in_the_prompt_is_found_or_named(capsys, prompt, options, found, says):
    Path("Style.safetensors").touch()
    Path("sub").mkdir()
    assert loras(prompt, *options) == found
    assert said(capsys) == ([says.format(" in the prompt is left out")] if says else [])


def test_loras_that_differ_from_line_to_line_are_refused():
    with pytest.raises(sd.SDError, match="lines of --prompts name different LoRAs"):
        app.add_loras(app.parse([]), ["<lora:a:1>", "<lora:a:0.5>"])
    with pytest.raises(sd.SDError, match="--folder: there is no folder nowhere"):
        app.check(app.parse(["--folder", "nowhere"]))


def test_a_lora_that_is_not_there_is_not_read_as_text(capsys):
    run("--prompt", "a <lora:foo:0.8>dog", "--output", "a.png")
    run("--prompt", "a dog", "--output", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    lines = [line for line in said(capsys) if "lora" in line]
    assert lines == ["<lora:foo:0.8> in the prompt is left out: give --folder or --lora."]
    app.main(["--show-tokens", "--prompt", "a <lora:foo:0.8>dog"])
    assert "lora" not in capsys.readouterr().out


def test_an_embedding_that_no_prompt_names_is_said(capsys):
    for name in ("Thing", "other"):
        save_file({"emb_params": torch.ones(2, WIDTH) / 9}, f"{name}.safetensors")
    options = ("--embedding", "Thing.safetensors", "--embedding", "other.safetensors")
    run("--prompt", "a (THING:1.2)", *options, "--output", "a.png")
    unused = 'the embedding "other" is loaded, but no prompt has this word.'
    assert [line for line in said(capsys) if "loaded" in line] == [unused]
    sd.say_once.cache_clear()
    run(
        "--prompt", "a embedding:Thing", "--negative-prompt", "OTHER", *options, "--output", "b.png"
    )
    assert not [line for line in said(capsys) if "loaded" in line]
    run("--prompt", "a Thing", *options[:2], "--output", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png")) is False  # the negative prompt
    run("--prompt", "a thing", "--plain-prompt", *options[:2], "--output", "d.png")
    assert 'the embedding "Thing" is loaded, but no prompt has this word.' in said(capsys)


# %% Options without effect ------------------------------------------------------------------------

ONE = "there is only one picture (--n-images)."


@pytest.mark.parametrize(
    "options, says",
    [
        ("", []),
        ("--decode-batch 4", [f"--decode-batch 4 has no effect: {ONE}"]),
        ("--decode-batch 4 --n-images 2 --low-memory", []),
        ("--decode-batch 1", []),
        ("--n-rows 1", [f"--n-rows 1 has no effect: {ONE}"]),
        ("--n-rows 1 --n-images 2", []),
        ("--save-every 50 --steps 50", ["--save-every 50 has no effect: of steps there are 50."]),
        ("--save-every 49 --steps 50", []),
        ("--save-every 50", []),
        ("--save-every 10 --steps 20 --strength 0.5 --image a.png",
         ["--save-every 10 has no effect: of steps there are 10."]),
        ("--clip-skip 1", ["--clip-skip 1 has no effect: 1 leaves out no layer."]),
        ("--clip-skip 2", []),
        ("--rescale 0.7 --cfg 1", ["--rescale 0.7 has no effect: at cfg 1 there is no guidance."]),
        ("--lora a:0 --lora b:0.5", ["--lora a:0 has no effect: its strength is 0."]),
        ("--controlnet a:0.0 --control-image b.png",
         ["--controlnet a:0.0 has no effect: its weight is 0."]),
        ("--show-tokens --seed 3 --no-safety-check --plain-prompt --output b.png",
         ["--show-tokens paints nothing; without effect: --output, --no-safety-check, --seed."]),
        ("--show-tokens --embedding a.pt --prompt a", []),
        ("--negative-prompt a --cfg 1", []),  # generate_latents says it
        ("--plain-prompt --embedding a.pt --rng philox --image a.png --strength 1", []),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_named(capsys, options, says):
    for name in ("a.png", "b.png"):
        Path(name).touch()
    args = app.parse(options.split())
    assert options_of_it.name_useless(args) == says
    app.check(args)
    assert said(capsys) == says


def test_options_of_a_picture_are_not_named(capsys):
    text = write_parameters(recipe(clip_skip=1, lora=["a:0"], rescale=0.5, cfg=1.0), "a", 7, 64, 64)
    app.check(app.parse(["--from-png", picture(text), "--show-tokens"]))
    assert said(capsys) == []


@pytest.mark.parametrize("field", ["Spacing: dice", "CFG rescale: 7", "CFG rescale: nan"])
def test_a_pictures_numbers_are_checked(field):
    with pytest.raises(sd.SDError, match="spacing must be one of|rescale must be 0 to 1"):
        app.check(app.parse(["--from-png", picture(f"a\nSteps: 1, {field}")]))


@pytest.mark.parametrize("options", ["--decode-batch 4", "--n-rows 1", "--save-every 3"])
def test_they_have_no_effect(options):
    """The same pixels without them, and no file more."""
    app.main([*options.split(), "--steps", "2", "--output", "a.png"])
    app.main(["--steps", "2", "--output", "b.png"])
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and len(list(Path().iterdir())) == 2


def test_clip_skip_1_and_a_lora_of_strength_0_change_nothing(style):
    run("--output", "a.png")
    run("--output", "b.png", "--clip-skip", "1")
    run("--output", "c.png", "--lora", f"{style}:0")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert np.abs(pixels("a.png") - pixels("c.png")).max() <= 1  # rounding: to float32 and back


@pytest.mark.parametrize("sampler", ["euler", "euler-a", "dpm++", "lms"])
def test_our_old_pictures_keep_their_timesteps(tmp_path, monkeypatch, sampler):
    """The first version's samplers took PLMS's, and did not say so; a new picture says its own."""
    monkeypatch.chdir(tmp_path)
    old = f"a house\nSteps: 2, Sampler: {sampler.upper()}, CFG scale: 2.0, Seed: 1, Version: sd.py"
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "old.png", old)
    assert read_parameters(tmp_path / "old.png")["spacing"] == "leading"
    small = ["--steps", "2", "--width", "64", "--height", "64", "--sampler", sampler]
    app.main([*small, "--output", "new.png"])
    assert read_parameters(tmp_path / "new.png")["spacing"] == "linspace"
    app.main(["--from-png", "new.png", "--output", "again.png"])
    assert Image.open("new.png").tobytes() == Image.open("again.png").tobytes()
