"""Pictures of ComfyUI, InvokeAI and NovelAI: what is read of their settings, that whatever is not
done is said, and that what is broken is refused with one sentence.

The chunks are as their programs write them: ComfyUI's nodes.py, InvokeAI's metadata.py, and
NovelAI's pictures as published in other programs' tests.
"""

import copy
import json
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sd
from sd_more import app
from sd_more.infotext import read_parameters


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd.say_once.cache_clear()


def picture(chunks, size=(64, 64)):
    info = PngInfo()
    for name, value in chunks.items():
        info.add_text(name, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", size).save("a.png", pnginfo=info)
    return "a.png"


def said(capsys):
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("sd.py: --from-png a.png: ") for line in lines]


def made_with(model):
    return f"made with the model {model}; to paint with it, give --model."


# %% ComfyUI ---------------------------------------------------------------------------------------


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


GRAPH = {  # the one that ComfyUI starts with
    "3": node(
        "KSampler", seed=156680208700286, steps=20, cfg=8, sampler_name="euler",
        scheduler="normal", denoise=1, model=["4", 0], positive=["6", 0], negative=["7", 0],
        latent_image=["5", 0],
    ),
    "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned.ckpt"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a glass bottle", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
}  # fmt: skip
OPTIONS = {
    "prompt": "a glass bottle", "negative_prompt": "text, watermark", "seed": 156680208700286,
    "steps": 20, "cfg": 8.0, "sampler": "euler", "spacing": "linspace", "rng": "torch",
    "width": 512, "height": 768,
}  # fmt: skip
MODEL = made_with("v1-5-pruned.ckpt")


def graph(nodes=(), **inputs):
    """GRAPH with other nodes, and n3={...} with other inputs of node 3."""
    changed = copy.deepcopy(GRAPH) | dict(nodes)
    for key, values in inputs.items():
        changed[key.removeprefix("n")]["inputs"] |= values
    return changed


def comfyui(nodes=(), **inputs):
    return picture({"prompt": graph(nodes, **inputs), "workflow": "{}"})


LORA = node("LoraLoader", lora_name="sub\\style.safetensors", strength_model=0.8,
            strength_clip=0.8, model=["4", 0], clip=["4", 1])  # fmt: skip
LORA_ALONE = node("LoraLoaderModelOnly", lora_name="x.safetensors", strength_model=1, model=["4", 0])  # noqa: E501  # fmt: skip
ADVANCED = node(
    "KSamplerAdvanced", add_noise="enable", noise_seed=7, steps=20, cfg=8, sampler_name="euler",
    scheduler="normal", model=["4", 0], positive=["6", 0], negative=["7", 0],
    latent_image=["5", 0], start_at_step=0, end_at_step=10000, return_with_leftover_noise="disable",
)  # fmt: skip
PHOTO = {
    "5": node("VAEEncode", pixels=["1", 0], vae=["4", 2]),
    "1": node("LoadImage", image="photo.png", upload="image"),
}
COMFYUI = {  # changes of GRAPH: options, what is said besides the model
    "as it is": ({}, {}, {}, None),
    "seed": ({}, {"n3": {"seed": 2**64 - 1}}, {"seed": 2**64 - 1}, None),
    "dpmpp_2m karras": (
        {}, {"n3": {"sampler_name": "dpmpp_2m", "scheduler": "karras"}},
        {"sampler": "dpm++-karras", "spacing": None}, None),
    "euler karras": ({}, {"n3": {"scheduler": "karras"}}, {"spacing": "karras"}, None),
    "lms": ({}, {"n3": {"sampler_name": "lms"}}, {"sampler": "lms"}, None),
    "ddim ddim_uniform": (
        {}, {"n3": {"sampler_name": "ddim", "scheduler": "ddim_uniform"}},
        {"sampler": "ddim", "spacing": "leading"}, None),
    "simple": ({}, {"n3": {"scheduler": "simple"}}, {"spacing": "trailing"}, None),
    "simple, 30 steps": (
        {}, {"n3": {"scheduler": "simple", "steps": 30}}, {"spacing": None, "steps": 30},
        "Schedule type simple"),
    "sgm_uniform": (
        {}, {"n3": {"scheduler": "sgm_uniform"}}, {"spacing": None}, "Schedule type sgm_uniform"),
    "euler_ancestral": (
        {}, {"n3": {"sampler_name": "euler_ancestral"}}, {"sampler": "euler-a"},
        "ComfyUI's later noise of euler_ancestral"),
    "lcm": (
        {}, {"n3": {"sampler_name": "lcm"}}, {"sampler": "lcm"}, "ComfyUI's later noise of lcm"),
    "batch": ({}, {"n5": {"batch_size": 4}}, {}, "EmptyLatentImage 5 batch_size 4"),
    "denoise": ({}, {"n3": {"denoise": 0.5}}, {}, "Denoising strength 0.5"),
    "clip skip": (
        {"1": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1])},
        {"n6": {"clip": ["1", 0]}, "n7": {"clip": ["1", 0]}}, {"clip_skip": 2}, None),
    "clip skip of one": (
        {"1": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1])},
        {"n6": {"clip": ["1", 0]}}, {"clip_skip": 2}, "CLIPSetLastLayer of one prompt alone"),
    "last layer": (
        {"1": node("CLIPSetLastLayer", stop_at_clip_layer=-1, clip=["4", 1])},
        {"n6": {"clip": ["1", 0]}}, {}, None),
    "LoRA": (
        {"1": LORA},
        {"n3": {"model": ["1", 0]}, "n6": {"clip": ["1", 1]}, "n7": {"clip": ["1", 1]}},
        {"prompt": "a glass bottle <lora:style:0.8>"}, None),
    "LoRA for the UNet": (
        {"1": LORA}, {"n3": {"model": ["1", 0]}},
        {"prompt": "a glass bottle <lora:style:0:0.8>"}, None),
    "LoraLoaderModelOnly": (
        {"1": LORA_ALONE}, {"n3": {"model": ["1", 0]}},
        {"prompt": "a glass bottle <lora:x:0:1>"}, None),
    "VAE": (
        {"1": node("VAELoader", vae_name="mse.safetensors")}, {"n8": {"vae": ["1", 0]}}, {},
        'VAELoader 1 vae_name "mse.safetensors"'),
    "a text of its own": (
        {"1": node("PrimitiveStringMultiline", value="a boat")}, {"n6": {"text": ["1", 0]}},
        {"prompt": "a boat"}, None),
    "a seed of its own": (
        {"1": node("PrimitiveInt", value=5)}, {"n3": {"seed": ["1", 0]}}, {"seed": 5}, None),
    "a seed of an unknown node": (
        {"1": node("Seed (rgthree)", seed=5)}, {"n3": {"seed": ["1", 0]}}, {"seed": 5},
        'node 1 "Seed (rgthree)"'),
    "a seed that is not found": (
        {"1": node("Dice", sides=6)}, {"n3": {"seed": ["1", 0]}}, {"seed": None},
        'KSampler seed not found, node 1 "Dice"'),
    "a picture": (
        PHOTO, {}, {"width": None, "height": None}, 'LoadImage 1 image "photo.png"'),
    "ControlNet": (
        {"1": node("ControlNetApply", conditioning=["6", 0], control_net=["2", 0], strength=1),
         "2": node("ControlNetLoader", control_net_name="canny.pth")},
        {"n3": {"positive": ["1", 0]}}, {},
        'node 2 "ControlNetLoader", node 1 "ControlNetApply"'),
    "two prompts": (
        {"1": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["2", 0]),
         "2": node("CLIPTextEncode", text="a dog", clip=["4", 1])},
        {"n3": {"positive": ["1", 0]}}, {},
        'CLIPTextEncode 2 text "a dog", node 1 "ConditioningCombine"'),
    "zeros": (
        {"1": node("ConditioningZeroOut", conditioning=["6", 0])}, {"n3": {"negative": ["1", 0]}},
        {"negative_prompt": ""}, 'negative prompt of zeros, node 1 "ConditioningZeroOut"'),
    "no prompt": (
        {}, {"n3": {"positive": None}}, {"prompt": ""},
        "positive prompt not found, KSampler 3 positive null"),
    "advanced": ({"3": ADVANCED}, {}, {"seed": 7}, None),
    "a part of the way": (
        {"3": ADVANCED}, {"n3": {"end_at_step": 10, "add_noise": "disable"}}, {"seed": 7},
        'KSamplerAdvanced 3 add_noise "disable", KSamplerAdvanced 3 end_at_step 10'),
    "enlarged": (
        {"1": node("ImageScaleBy", image=["8", 0], scale_by=2)}, {"n9": {"images": ["1", 0]}}, {},
        'node 1 "ImageScaleBy"'),
    "an input that is new": ({}, {"n3": {"eta": 0.5}}, {}, "KSampler 3 eta 0.5"),
    "beside it": ({"1": node("Note", text="x"), "2": node("KSampler", seed=1)}, {}, {}, None),
    "weights": (
        {}, {"n6": {"text": r"a (red:1.3) [fog] \(x\) \[y\] house"}},
        {"prompt": r"a (red:1.3) \[fog\] \(x\) \[y\] house"},
        """ComfyUI's weights as in "(red:1.3)\""""),
    "an embedding": (
        {}, {"n7": {"text": "embedding:Easy-Neg.pt"}}, {"negative_prompt": "embedding:Easy-Neg.pt"},
        "embedding Easy-Neg"),
    "half a character": (
        {}, {"n6": {"text": "a \ud800"}}, {"prompt": "a ?"}, None),
    "numbers as text": (
        {}, {"n3": {"steps": "20", "cfg": "8", "seed": "5", "denoise": "1"}}, {"seed": 5}, None),
    "named by the number 0": (
        {"0": LORA_ALONE}, {"n3": {"model": ["0", 0]}},
        {"prompt": "a glass bottle <lora:x:0:1>"}, None),
}  # fmt: skip


@pytest.mark.parametrize("nodes, inputs, options, says", COMFYUI.values(), ids=COMFYUI)
def test_a_graph_of_comfyui_is_followed_and_what_is_not_done_is_said(
    capsys, nodes, inputs, options, says
):
    expected = {name: value for name, value in (OPTIONS | options).items() if value is not None}
    assert read_parameters(comfyui(nodes, **inputs)) == expected
    assert said(capsys) == [*([f"not done here: {says}"] if says else []), MODEL]


GIVEN = {  # what the command line settles: options, what is still said
    "the sampler": ({}, {"n3": {"sampler_name": "lcm"}}, {"sampler": "ddim"}, {}, []),
    "the schedule": ({}, {"n3": {"scheduler": "beta"}}, {"spacing": "karras"}, {}, []),
    "the picture": (
        PHOTO, {"n3": {"denoise": 0.75, "steps": 15}}, {"image": "b.png"},
        {"strength": 0.75, "steps": 20}, []),
    "the picture, in a number of steps that does not divide": (
        PHOTO, {"n3": {"denoise": 0.6, "steps": 20}}, {"image": "b.png"},
        {"strength": 20.5 / 33, "steps": 33}, []),
    "the VAE": (
        {"1": node("VAELoader", vae_name="x")}, {"n8": {"vae": ["1", 0]}}, {"vae": "y"}, {}, []),
    "the prompt": (
        {"1": LORA}, {"n3": {"model": ["1", 0]}, "n6": {"text": "(a:2)"}}, {"prompt": "b"},
        {"prompt": "(a:2)"}, ["not done here: LoRA style x 0:0.8"]),
    "the prompt and the LoRA": (
        {"1": LORA}, {"n3": {"model": ["1", 0]}}, {"prompt": "b", "lora": ["c"]}, {}, []),
    "how it is read": ({}, {"n6": {"text": "(a:2)"}}, {"plain_prompt": True}, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("nodes, inputs, given, options, says", GIVEN.values(), ids=GIVEN)
def test_nothing_is_said_of_what_is_given(capsys, nodes, inputs, given, options, says):
    found = read_parameters(comfyui(nodes, **inputs), given | {"model": "m.ckpt"})
    assert found | options == found
    assert said(capsys) == says


@pytest.mark.parametrize("steps", [1, 4, 5, 8, 10, 20, 25, 40, 50, 100])
def test_the_schedules_are_those_of_comfyui(steps):
    """As samplers.py has them there, in sigmas: every 1000 / steps-th from the last, or from 1."""
    simple = [999 - int(i * 1000 / steps) for i in range(steps)]
    uniform = [*range(1, 1000, 1000 // steps)][::-1]
    for name, timesteps in (("simple", simple), ("ddim_uniform", uniform)):
        found = read_parameters(comfyui(n3={"scheduler": name, "steps": steps}))
        assert [*sd.SPACINGS[found["spacing"]](None, steps)] == timesteps


CIRCLE = "its graph goes in a circle."
BROKEN = {
    "linked to itself": ({"3": GRAPH["3"] | {"inputs": {"model": ["3", 0]}}}, {}, CIRCLE),
    "a circle of texts": (
        {}, {"n6": {"text": ["7", 0]}, "n7": {"text": ["6", 0]}}, CIRCLE),
    "a circle of loaders": ({"1": LORA, "4": LORA}, {"n1": {"model": ["4", 0]}}, CIRCLE),
    "a missing node": ({}, {"n6": {"clip": ["77", 0]}}, "its graph has a link to a node that"),
    "two samplers": (
        {"1": node("KSampler", latent_image=["3", 0])}, {"n8": {"samples": ["1", 0]}},
        "its graph has 2 samplers"),
    "a sampler aside": ({}, {"n8": {"samples": None}}, "its graph has 0 samplers"),
    "a list for a prompt": ({}, {"n6": {"text": ["a", "b"]}}, "CLIPTextEncode text must be one"),
    "a dict for a number": ({}, {"n3": {"steps": {}}}, "KSampler steps must be one value"),
    "a word for a number": ({}, {"n3": {"steps": "many"}}, "its parameters are not readable"),
    "half a step": ({}, {"n3": {"steps": 2.5}}, "its parameters are not readable"),
    "a long number": ({}, {"n3": {"steps": "9" * 5000}}, "its parameters are not readable"),
    "no denoising": ({}, {"n3": {"denoise": 0}}, "denoise must be 0.001 to 1"),
    "infinite": ({}, {"n3": {"denoise": float("inf")}}, "denoise must be 0.001 to 1"),
    "a size of words": ({}, {"n5": {"width": "wide"}}, "its parameters are not readable"),
    "a layer of words": (
        {"1": node("CLIPSetLastLayer", stop_at_clip_layer="x")}, {"n6": {"clip": ["1", 0]}},
        "its parameters are not readable"),
    "a long text": ({}, {"n6": {"text": "x" * 1_000_000}}, "its text must be at most 500,000"),
    "many nodes": (
        {str(i): node("A") for i in range(10, 10_000)}, {}, "its graph must be at most 2000"),
    "100,000 nodes": (
        {str(i): node("A") for i in range(10, 100_000)}, {}, "its text must be at most 500,000"),
}  # fmt: skip


@pytest.mark.parametrize("nodes, inputs, says", BROKEN.values(), ids=BROKEN)
def test_a_broken_graph_is_refused_in_one_sentence(capsys, nodes, inputs, says):
    start = time.perf_counter()
    with pytest.raises(sd.SDError) as error:
        read_parameters(comfyui(nodes, **inputs))
    assert str(error.value).startswith(f"--from-png a.png: {says}")
    assert len(str(error.value)) < 300 and time.perf_counter() - start < 5
    assert said(capsys) == []


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({"cfg": float("nan")}, "cfg must be a finite number"),
        ({"steps": 5000}, "steps must be 1 to 999"),
        ({"steps": -1}, "steps must be 1 to 999"),
        ({"sampler_name": "uni_pc"}, "sampler must be one of"),
        ({"sampler_name": ""}, "sampler must be one of"),
    ],
)
def test_what_is_read_is_checked(inputs, says):
    comfyui(n3=inputs)
    with pytest.raises(sd.SDError, match=says):
        app.check(app.parse(["--from-png", "a.png"]))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "NaN", "[" * 100_000, '{"a":' * 50_000, '{"3": 5}', '{"3": []}',
        '{"3": {"class_type": "KSampler", "inputs": []}}',
        '{"3": {"class_type": [], "inputs": {}}}',
        '{"3": {"class_type": "SamplerCustom", "inputs": {}}}', "a cat",
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", ["prompt", "invokeai_metadata", "sd-metadata", "Comment"])
def test_a_chunk_without_settings_is_only_named(chunk, text):
    maker = {"prompt": "ComfyUI", "Comment": "NovelAI"}.get(chunk, "InvokeAI")
    picture({"Software": maker, chunk: text})
    with pytest.raises(sd.SDError, match=f"{maker} made it, whose settings are not read here"):
        read_parameters("a.png")


def test_a_long_chain_of_nodes_is_followed_in_linear_time(capsys):
    names = [str(i) for i in range(100, 2000)]
    chain = {key: node("A", model=[str(int(key) - 1), 0]) for key in names[1:]}
    start = time.perf_counter()
    read_parameters(comfyui(chain | {"100": node("A")}, n3={"model": ["1999", 0]}))
    assert time.perf_counter() - start < 3 and len(said(capsys)[0]) < 1100


@pytest.mark.parametrize("mark", ["(", "[", "{", "a+", "a-", "1", "1.", "embedding:", "<", "a."])
def test_hostile_prompts_are_read_in_linear_time(mark):
    text, start = mark * (400_000 // len(mark)), time.perf_counter()
    for chunks in (
        {"prompt": graph(n6={"text": text})},
        {"invokeai_metadata": {"positive_prompt": text}},
        {"sd-metadata": {"image": {"prompt": text}}},
        {"Software": "NovelAI", "Comment": {"prompt": text, "steps": 1}},
    ):
        read_parameters(picture(chunks))
    assert time.perf_counter() - start < 5


def test_the_picture_is_painted_again(capsys):
    comfyui(
        {"1": LORA},
        n3={"model": ["1", 0], "steps": 2, "scheduler": "karras"},
        n5={"width": 64, "height": 64},
    )
    app.main(["--from-png", "a.png", "--output", "b.png"])
    lines = capsys.readouterr().err
    assert "<lora:style:0:0.8> in the prompt is left out: its strength must be one number" in lines
    options = read_parameters("b.png")
    assert (options["spacing"], options["steps"], options["rng"]) == ("karras", 2, "torch")
    app.main(["--from-png", "b.png", "--output", "c.png"])
    assert Image.open("b.png").tobytes() == Image.open("c.png").tobytes()


# %% InvokeAI --------------------------------------------------------------------------------------

INVOKEAI = {  # as sd-manager's tests have it
    "app_version": "3.3.0post3", "generation_mode": "txt2img", "positive_prompt": "landscape",
    "negative_prompt": "low quality", "width": 768, "height": 432, "seed": 356120443,
    "rand_device": "cpu", "cfg_scale": 7.5, "steps": 50, "scheduler": "dpmpp_2m_k", "clip_skip": 0,
    "model": {"model_name": "amixx", "base_model": "sd-1", "model_type": "main"},
    "controlnets": [], "ipAdapters": [], "t2iAdapters": [], "loras": [], "vae": None,
}  # fmt: skip
INVOKEAI_OPTIONS = {
    "prompt": "landscape", "negative_prompt": "low quality", "width": 768, "height": 432,
    "seed": 356120443, "rng": "torch", "cfg": 7.5, "steps": 50, "sampler": "dpm++-karras",
}  # fmt: skip
OF_INVOKEAI = {
    "as it is": ({}, {}, None),
    "pndm": ({"scheduler": "pndm"}, {"sampler": "plms"}, None),
    "euler_k": ({"scheduler": "euler_k"}, {"sampler": "euler", "spacing": "karras"}, None),
    "euler_a": (
        {"scheduler": "euler_a"}, {"sampler": "euler-a"}, "InvokeAI's later noise of euler_a"),
    "on the GPU": ({"rand_device": "cuda"}, {"rng": "philox"}, None),
    "rescaled": ({"cfg_rescale_multiplier": 0.7}, {"rescale": 0.7}, None),
    "clip skip": ({"clip_skip": 1}, {"clip_skip": 2}, None),
    "LoRAs": (
        {"loras": [{"lora": {"model_name": "a", "base_model": "sd-1"}, "weight": 0.75},
                   {"model": {"name": "b", "key": "c"}, "weight": 1}]},
        {"prompt": "landscape <lora:a:0.75> <lora:b:1>"}, None),
    "what is not done": (
        {"seamless_x": True, "seamless_y": False, "controlnets": [{"control_weight": 1}],
         "vae": {"name": "mse"}, "strength": 0.5, "hrf_enabled": True},
        {},
        ("""Denoising strength 0.5, InvokeAI's controlnets [{"control_weight": 1}], """
        """InvokeAI's vae {"name": "mse"}, InvokeAI's seamless_x True, """
        "InvokeAI's hrf_enabled True")),
    "from a picture": ({"generation_mode": "img2img"}, {}, "InvokeAI's generation_mode img2img"),
    "names of ours": (
        {"image": "/etc/passwd", "spacing": "x", "guidance": 3, "Version": "sd.py"}, {},
        ("InvokeAI's image /etc/passwd, InvokeAI's spacing x, InvokeAI's guidance 3, "
        "InvokeAI's Version sd.py")),
    "weights": (
        {"positive_prompt": "a red++ <Thing>"}, {"prompt": "a red++ <Thing>"},
        """InvokeAI's weights as in "d++", embedding Thing"""),
}  # fmt: skip


@pytest.mark.parametrize("changes, options, says", OF_INVOKEAI.values(), ids=OF_INVOKEAI)
def test_invokeais_settings_are_read(capsys, changes, options, says):
    picture({"invokeai_metadata": INVOKEAI | changes, "invokeai_graph": "{}"})
    assert read_parameters("a.png") == INVOKEAI_OPTIONS | options
    assert said(capsys) == [*([f"not done here: {says}"] if says else []), made_with("amixx")]


def test_invokeais_old_settings_are_read(capsys):
    image = {
        "prompt": [{"prompt": "a robot [blurry, text]", "weight": 1.0}], "steps": 50,
        "cfg_scale": 7.5, "threshold": 0, "perlin": 0, "height": 512, "width": 512, "seed": 16,
        "seamless": True, "hires_fix": False, "type": "txt2img", "postprocessing": None,
        "sampler": "k_lms", "variations": [],
    }  # fmt: skip
    found = {"model": "stable diffusion", "model_weights": "sd15", "model_hash": "cc6c"}
    found |= {"app_id": "invoke-ai/InvokeAI", "app_version": "v2.2.4", "image": image}
    picture({"sd-metadata": found, "Dream": '"a robot" -s 50'})
    assert read_parameters("a.png") == {
        "prompt": "a robot  ", "negative_prompt": "blurry, text", "steps": 50, "cfg": 7.5,
        "width": 512, "height": 512, "seed": 16, "sampler": "lms", "rng": "philox",
        "model_hash": "cc6c",
    }  # fmt: skip
    says = ["not done here: InvokeAI's seamless True", made_with("sd15, hash cc6c")]
    assert said(capsys) == says


# %% NovelAI ---------------------------------------------------------------------------------------

NOVELAI = {
    "prompt": "1girl, solo", "steps": 28, "height": 1216, "width": 832, "scale": 5.0,
    "uncond_scale": 1.0, "cfg_rescale": 0.0, "seed": 2668694883, "n_samples": 1,
    "hide_debug_overlay": False, "noise_schedule": "native", "sampler": "k_euler",
    "controlnet_strength": 1.0, "controlnet_model": None, "dynamic_thresholding": False,
    "dynamic_thresholding_percentile": 0.999, "dynamic_thresholding_mimic_scale": 10.0,
    "sm": False, "sm_dyn": False, "skip_cfg_below_sigma": 0.0, "lora_unet_weights": None,
    "legacy": False, "uc": "nsfw", "request_type": "PromptGenerateRequest", "signed_hash": "x",
}  # fmt: skip
NOVELAI_OPTIONS = {
    "prompt": "1girl, solo", "negative_prompt": "nsfw", "steps": 28, "height": 1216, "width": 832,
    "cfg": 5.0, "rescale": 0.0, "seed": 2668694883, "sampler": "euler", "rng": "philox",
    "clip_skip": 2,
}  # fmt: skip
OF_NOVELAI = {
    "as it is": ({}, {}, None),
    "karras": ({"noise_schedule": "karras"}, {"spacing": "karras"}, None),
    "exponential": ({"noise_schedule": "exponential"}, {}, "Schedule type exponential"),
    "rescaled": ({"cfg_rescale": 0.4}, {"rescale": 0.4}, None),
    "smea": ({"sm": True}, {}, "NovelAI's sm True"),
    "from a picture": (
        {"request_type": "Img2ImgRequest", "strength": 0.5, "noise": 0.1}, {},
        "Denoising strength 0.5, NovelAI's request_type Img2ImgRequest, NovelAI's noise 0.1"),
    "ancestral": (
        {"sampler": "k_euler_ancestral"}, {"sampler": "euler-a"},
        "NovelAI's later noise of k_euler_ancestral"),
    "weights": (
        {"prompt": "a {{red}} house"}, {"prompt": "a {{red}} house"},
        """NovelAI's weights as in "{red}\""""),
    "numbers before it": (
        {"prompt": "a 1.3::red:: house"}, {"prompt": "a 1.3::red:: house"},
        """NovelAI's weights as in "1.3::\""""),
}  # fmt: skip


@pytest.mark.parametrize("changes, options, says", OF_NOVELAI.values(), ids=OF_NOVELAI)
def test_novelais_settings_are_read(capsys, changes, options, says):
    source = "Stable Diffusion 81274D13"
    picture({"Software": "NovelAI", "Source": source, "Comment": NOVELAI | changes})
    assert read_parameters("a.png") == NOVELAI_OPTIONS | options
    assert said(capsys) == [*([f"not done here: {says}"] if says else []), made_with(source)]


def test_novelais_first_pictures_have_the_prompt_elsewhere_and_no_size():
    found = {"steps": 28, "sampler": "plms", "seed": 5, "scale": 11.0, "uc": "lowres"}
    picture({"Software": "NovelAI", "Description": "a cat", "Comment": found}, (128, 64))
    assert read_parameters("a.png") == {
        "prompt": "a cat", "negative_prompt": "lowres", "steps": 28, "sampler": "plms", "seed": 5,
        "cfg": 11.0, "width": 128, "height": 64, "rng": "philox", "clip_skip": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name, value", [("positive_prompt", ["a"]), ("negative_prompt", 5)])
@pytest.mark.parametrize("chunk", ["invokeai_metadata", "Comment"])
def test_a_prompt_that_is_no_text_is_refused(chunk, name, value):
    found = INVOKEAI | NOVELAI | {name: value, "prompt": value}
    picture({"Software": "NovelAI" if chunk == "Comment" else "", chunk: found})
    with pytest.raises(sd.SDError, match="--from-png a.png: its prompt must be a text"):
        read_parameters("a.png")


@pytest.mark.parametrize("name", [*INVOKEAI])
@pytest.mark.parametrize("value", [[], [[]], {}, {"a": 1}, float("nan"), "x", -1, True, "9" * 5000])
def test_any_value_is_read_or_refused(name, value):
    picture({"invokeai_metadata": INVOKEAI | {name: value}})
    try:
        app.check(app.parse(["--from-png", "a.png"]))
    except sd.SDError as error:
        assert len(str(error)) < 400
