"""The safety checker, against diffusers'."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

import sd
from convert_weights import convert
from sd_more import app
from sd_more.safety import SafetyChecker, check_safety, load_checker
from tests.reference import assert_close, quiet, write_file

SIZES = ((224, 224), (300, 200), (128, 128), (97, 251), (512, 768))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def pixels(pictures):
    see = CLIPImageProcessor()  # the one that resizes with Pillow, as torchvision is not here
    return see(pictures, return_tensors="pt").pixel_values


@pytest.fixture(scope="module")
def convert_with(tiny_pipeline, checker, tmp_path_factory):
    """-> a flat file of the miniature with a checker of these thresholds."""
    folder = tmp_path_factory.mktemp("safety") / "model"
    tiny_pipeline.save_pretrained(folder)

    def convert_with(thresholds, special):
        checker.concept_embeds_weights.copy_(torch.as_tensor(thresholds))
        checker.special_care_embeds_weights.copy_(torch.as_tensor(special))
        checker.save_pretrained(folder / "safety_checker")
        return convert(folder, dtype="float32", log=quiet)

    return convert_with


def test_the_safety_checker_is_that_of_diffusers(checker, pictures, pixels, convert_with):
    """With thresholds so that some are flagged, and some only by the extra caution."""
    seen = checker.visual_projection(checker.vision_model(pixels)[1])

    def cosine(concepts):
        return torch.nn.functional.cosine_similarity(seen[:, None], concepts, dim=2)

    nearest = cosine(checker.concept_embeds).max(0).values
    special = cosine(checker.special_care_embeds).max(0).values
    flags = set()
    for case in range(6):
        path = convert_with(nearest + 0.004 * (case - 2), special - 0.002 * (case % 3 - 1))
        model = sd.StableDiffusion(path)
        _, truth = checker(clip_input=pixels, images=np.zeros((len(pictures), 8, 8, 3)))
        shown, flagged = check_safety(model, pictures)
        assert flagged == [i for i, flag in enumerate(truth) if flag], case
        for i, (picture, before) in enumerate(zip(shown, pictures)):
            assert picture.getextrema() == ((0, 0),) * 3 if i in flagged else picture is before
        flags.add(tuple(flagged))
    assert len(flags) > 1
    ours = load_checker(model)
    for picture, truth in zip(pictures, seen):
        assert_close(ours.embed(picture)[0], truth, 1e-5)
    assert check_safety(model, pictures, ours)[1] == flagged


def test_the_command_line_asks_the_checker_and_says_so(convert_with, tmp_path, capsys):
    path = convert_with([-2.0] * 17, [-2.0] * 3)  # flags all
    options = ["--model", path, "--steps", "1", "--seed", "5", "--n-images", "2"]
    app.main([*map(str, options), "--output", str(tmp_path / "a.png")])
    said = capsys.readouterr().err
    assert "blacked out seed 5" in said and "blacked out seed 6" in said
    for name in ("a.png", "a-2.png"):
        assert Image.open(tmp_path / name).getextrema() == ((0, 0),) * 3
    app.main([*map(str, options), "--output", str(tmp_path / "b.png"), "--no-safety-check"])
    assert "black" not in capsys.readouterr().err
    assert Image.open(tmp_path / "b.png").getextrema() != ((0, 0),) * 3


def test_a_model_without_a_checker_shows_everything(tiny, pictures):
    assert load_checker(tiny) is None
    assert check_safety(tiny, pictures) == (pictures, [])


NUMBERS = {"width": 28, "layers": 1, "heads": 2, "projection": 4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3}, {"heads": 0}, {"width": -28}, {"width": 1e9}, {"layers": 101},
        {"layers": "x"}, {"projection": None}, {"projection": [4]}, {"more": 1}, {"width": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_checker_whose_numbers_make_no_sense_is_refused(wrong, tmp_path):
    path = write_model(tmp_path / "a.safetensors", NUMBERS | wrong, NUMBERS)
    with pytest.raises(sd.SDError, match="safety must be|damaged.*Convert"):
        sd.StableDiffusion(path)
    with pytest.raises(SystemExit) as stop:
        app.main(["--model", str(path), "--steps", "1", "--output", str(tmp_path / "a.png")])
    assert stop.value.code == 2 and not (tmp_path / "a.png").exists()


def test_a_checker_of_other_shapes_or_with_a_part_missing_is_refused(tmp_path):
    for numbers in (NUMBERS | {"width": 56}, NUMBERS | {"layers": 2}):
        model = sd.StableDiffusion(write_model(tmp_path / "a.safetensors", numbers, NUMBERS))
        with pytest.raises(sd.SDError, match="tensors of the safety"):
            check_safety(model, [])
    with pytest.raises(sd.SDError, match="damaged"):
        sd.StableDiffusion(write_model(tmp_path / "a.safetensors", [1, 2], NUMBERS))


def write_model(path, said, there):
    """The miniature with the safety checker that `there` tells; its config has `said`."""
    weights = mx.load(str(sd.TINY))
    for name, parameter in sd.tree_flatten(SafetyChecker(**there).parameters()):
        weights[f"safety.{name}"] = parameter
    config = json.loads(sd.read_header(sd.TINY)["config"])
    return write_file(path, config | {"safety": said}, weights)
