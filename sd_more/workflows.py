"""The settings in pictures of ComfyUI, InvokeAI and NovelAI, said as AUTOMATIC1111's program would
say them: as fields, which infotext.py reads or names.

    ComfyUI    the graph that made it, {node: {"class_type": "KSampler", "inputs": {"steps": 20}}};
               an input may be [node, number of its output]
    InvokeAI   {"positive_prompt": "a cat", "steps": 20}, before version 3 {"image": {"steps": 20}}
    NovelAI    {"prompt": "a cat", "steps": 28}

What is known to change nothing stands in a table. Whatever else is found becomes a field of a name
that infotext.py does not know, so that it says that this is not done.
"""

import json
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import PureWindowsPath

from sd import SDError, expect

MOST_JSON = 500_000  # characters
MOST_NODES = 2000
WEIGHTS = {  # what weighs words there, and here otherwise or not at all
    "ComfyUI": re.compile(r"(?<!\\)\([^()]*\)"),
    "InvokeAI": re.compile(r"\([^()]*\)|\[[^\[\]]*\]|[\w\")][+-]+(?=[\s,.)]|$)|\.(?:and|swap)\("),
    "NovelAI": re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\)|(?<![\d.])\d[\d.]{0,9}::"),
}
EMBEDDINGS = {
    "ComfyUI": re.compile(r"embedding:([\w-]+)"),
    "InvokeAI": re.compile(r"<([\w -]+)>"),
    "NovelAI": re.compile(r"(?!)"),
}
# These draw noise on the way: ComfyUI's on the GPU, with the seed once more, InvokeAI's with the
# seed's bits flipped, NovelAI's with another one.
NOISY = {"euler_ancestral", "euler_a", "lcm"}


def read_workflow(texts, size, given):
    """{chunk: text}, the picture's size, {option: value} of the command line -> {option: prompt},
    {name: text}; None where none of the three has written down how it made the picture.
    """
    for chunk, program, read in READERS:
        mine = program != "NovelAI" or texts.get("Software") == program
        found = load(texts[chunk]) if mine and chunk in texts else {}
        result = read(found, texts, size, given) if found else None
        if result is not None:
            prompts, fields, loras = result
            fields |= name_marks(program, prompts, given)
            if fields.get("Sampler", "").removeprefix("k_") in NOISY and "sampler" not in given:
                fields[f"{program}'s later noise"] = f"of {fields['Sampler']}"
            if program == "ComfyUI":  # where a bracket of this kind is a character
                prompts = {o: re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", t) for o, t in prompts.items()}
            fields |= add_loras(prompts, loras, given)
            return prompts, fields | {"Version": program}
    return None


def load(text):
    """JSON -> a dict, empty if it is none."""
    expect(len(text) <= MOST_JSON, "its text", f"{len(text):,}", f"at most {MOST_JSON:,} long")
    try:
        found = json.loads(text)
        # Halves of a character, which can be written as \ud800, could not be printed or saved.
        found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def say_value(value):
    """-> text, "" for nothing"""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return "" if value is None else str(value)


def expect_text(value):
    expect(value is None or isinstance(value, str), "its prompt", value, "a text")
    return value or ""


def name_marks(program, prompts, given):
    """-> fields for what prompts say there, and not here."""
    settled = given.keys() | ({"prompt"} if "prompts" in given else set())
    text = "\n".join(prompt for option, prompt in prompts.items() if option not in settled)
    words = EMBEDDINGS[program].findall(text)
    fields = {"TI hashes": ", ".join(f"{word}: " for word in words)} if words else {}
    mark = None if "plain_prompt" in given else WEIGHTS[program].search(text)
    return fields | ({f"{program}'s weights as in": f'"{mark[0]}"'} if mark else {})


def add_loras(prompts, loras, given):
    """[(file, strength for CLIP, for the UNet)] -> fields of those that are not put into the prompt
    as <lora:NAME:STRENGTH>, which is how AUTOMATIC1111's program would have them.
    """
    fields = {}
    settled = given.keys() & {"prompt", "prompts", "plain_prompt"}
    for file, *strengths in loras:
        name, numbers = PureWindowsPath(file).stem, ":".join(dict.fromkeys(strengths))
        if re.fullmatch(r"[^<>:]+", name) and not settled:
            prompts["prompt"] += f" <lora:{name}:{numbers}>"
        elif "lora" not in given:
            fields[f"LoRA {name}"] = f"x {numbers}"
    return fields


# %% ComfyUI ---------------------------------------------------------------------------------------

SAMPLER_NODES = "KSampler", "KSamplerAdvanced"
NODES = {  # those known, and of which inputs which value changes nothing; None: any
    "KSampler": {},
    "KSamplerAdvanced": {
        "add_noise": "enable", "start_at_step": 0, "return_with_leftover_noise": "disable",
    },
    "CheckpointLoaderSimple": {}, "LoraLoader": {}, "LoraLoaderModelOnly": {}, "VAELoader": {},
    "CLIPTextEncode": {}, "CLIPSetLastLayer": {}, "EmptyLatentImage": {"batch_size": 1},
    "LoadImage": {"upload": None}, "VAEEncode": {}, "VAEDecode": {}, "PreviewImage": {},
    "SaveImage": {"filename_prefix": None}, "PrimitiveString": {}, "PrimitiveStringMultiline": {},
    "PrimitiveInt": {}, "PrimitiveFloat": {},
}  # fmt: skip
FIELDS = {"sampler_name": "Sampler", "steps": "Steps", "cfg": "CFG scale"}
SPACINGS = {"normal": "linspace", "simple": "trailing", "ddim_uniform": "leading"}


def linked(value):
    """-> the node that an input is linked to, or None."""
    pair = isinstance(value, list) and [type(part) for part in value] == [str, int]
    return value[0] if pair else None


class Graph:
    """Nodes; above: those that each is linked to; used: what is read of them; lost: what is not."""

    def __init__(self, nodes):
        self.nodes, self.used, self.lost = nodes, set(), {}
        links = {key: map(linked, node["inputs"].values()) for key, node in nodes.items()}
        self.above = {key: [k for k in keys if k is not None] for key, keys in links.items()}
        if not nodes.keys() >= {key for keys in self.above.values() for key in keys}:
            raise SDError("its graph has a link to a node that is not there.")
        try:
            self.order = [*TopologicalSorter(self.above).static_order()]
        except CycleError:
            raise SDError("its graph goes in a circle.") from None

    def kind(self, key):
        return self.nodes[key]["class_type"]

    def chain(self, key, *names):
        """Yield the nodes behind an input, each behind the first of these that the last one has."""
        while key is not None:
            inputs = self.nodes[key]["inputs"]
            keys = (linked(inputs.get(name)) for name in names)
            key = next((key for key in keys if key is not None), None)
            if key is not None:
                yield key

    def take(self, key, name):
        """-> an input as text, also from another node that holds it; None if it is not found."""
        of, value = f"{self.kind(key)} {name}", None
        while key is not None:
            self.used.add((key, name))
            value = self.nodes[key]["inputs"].get(name)
            key = linked(value)
            if key is not None:
                inputs = self.nodes[key]["inputs"]
                name, value = next((n for n in (name, "value", "text") if n in inputs), ""), None
        expect(not isinstance(value, (list, dict)), of, value, "one value")
        if value is None:
            self.lost[of] = "not found"
            return None
        return say_value(value)

    def find_sampler(self):
        """-> the only one that a saved picture comes from, and all nodes that it comes from"""
        saved = [key for key in self.nodes if self.kind(key) == "SaveImage"]
        behind = set(saved or self.nodes)
        for key in reversed(self.order):  # an order in which a node comes after those above it
            behind.update(self.above[key] if key in behind else ())
        found = [key for key in behind if self.kind(key) in SAMPLER_NODES]
        if len(found) != 1:
            raise SDError(f"its graph has {len(found)} samplers; only one can be followed.")
        return found[0], [key for key in self.order if key in behind]

    def name_rest(self, keys):
        """-> fields for nodes that are not known, and inputs that are not read"""
        fields = dict(self.lost)
        for key in keys:
            kind, inputs = self.kind(key), self.nodes[key]["inputs"]
            if kind not in NODES:
                fields[f"node {key}"] = f'"{kind}"'
            for name, value in inputs.items() if kind in NODES else ():
                harmless = NODES[kind].get(name, ...)
                known = (key, name) in self.used or linked(value) is not None
                if not known and harmless not in (None, value):
                    fields[f"{kind} {key} {name}"] = json.dumps(value, ensure_ascii=False)
        return fields


def read_comfyui(found, texts, size, given):
    nodes = {
        key: node
        for key, node in found.items()
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }
    if not any(node["class_type"] in SAMPLER_NODES for node in nodes.values()):
        return None
    expect(len(nodes) <= MOST_NODES, "its graph", f"{len(nodes):,} nodes", f"at most {MOST_NODES}")
    graph = Graph(nodes)
    sampler, behind = graph.find_sampler()
    fields = {field: graph.take(sampler, name) for name, field in FIELDS.items()}
    advanced = graph.kind(sampler) == "KSamplerAdvanced"
    fields |= {"Seed": graph.take(sampler, "noise_seed" if advanced else "seed"), "RNG": "CPU"}
    steps = fields["Steps"] or ""
    fields |= read_start(graph, sampler, steps, given)
    fields |= read_schedule(graph.take(sampler, "scheduler"), fields["Steps"] or "")
    prompts, clips, skip = read_conditions(graph, sampler)
    models = [*graph.chain(sampler, "model")]
    if models and graph.kind(models[-1]) == "CheckpointLoaderSimple":
        fields["Model"] = graph.take(models[-1], "ckpt_name")
    loras = [
        read_lora(graph, key, key in models, key in clips)
        for key in behind
        if graph.kind(key) in ("LoraLoader", "LoraLoaderModelOnly")
    ]
    settle_files(graph, behind, given)
    fields |= skip | graph.name_rest(behind)
    return prompts, {name: text for name, text in fields.items() if text is not None}, loras


def read_start(graph, sampler, steps, given):
    """-> fields for what it starts from: nothing, or a picture, of whose way it walks a part. There
    as many steps as are said are taken of that part, here of the whole.
    """
    fields, whole = {}, steps.isdecimal() and len(steps) < 5
    latent = next(graph.chain(sampler, "latent_image"), None)
    empty = latent is not None and graph.kind(latent) == "EmptyLatentImage"
    if empty:
        size = [graph.take(latent, name) for name in ("width", "height")]
        fields["Size"] = None if None in size else "x".join(size)
    if graph.kind(sampler) == "KSamplerAdvanced":
        end = graph.nodes[sampler]["inputs"].get("end_at_step")
        if whole and isinstance(end, int) and end >= int(steps):
            graph.used |= {(sampler, "end_at_step"), (sampler, "return_with_leftover_noise")}
        return fields
    denoise = float(graph.take(sampler, "denoise") or 1)
    expect(0.001 <= denoise <= 1, "denoise", denoise, "0.001 to 1")
    if denoise < 1 or ("image" in given and not empty):
        fields["Denoising strength"] = str(denoise)
        if "image" in given and whole:
            part, of = int(steps), int(int(steps) / denoise)
            fields["Steps"] = str(of)
            if int(denoise * of) != part:  # as both round down
                fields["Denoising strength"] = str((part + 0.5) / of)
    return fields


def read_schedule(name, steps):
    """The last two of SPACINGS are the same here only where the steps divide 1000."""
    even = steps.isdecimal() and len(steps) < 5 and int(steps) and 1000 % int(steps) == 0
    if name in SPACINGS and (even or name == "normal"):
        return {"Spacing": SPACINGS[name]}
    return {"Schedule type": name} if name else {}


def read_conditions(graph, sampler):
    """-> {option: prompt}, the nodes that CLIP comes through for both, and fields for clip skip"""
    prompts, clips, skips, fields = {}, [], [], {}
    for option, side in (("prompt", "positive"), ("negative_prompt", "negative")):
        names = side, "conditioning", "conditioning_to", "conditioning_1"
        prompts[option] = ""
        for key in graph.chain(sampler, *names):
            if graph.kind(key) == "CLIPTextEncode":
                prompts[option] = graph.take(key, "text") or ""
                clips.append([*graph.chain(key, "clip")])
                break
            if graph.kind(key) == "ConditioningZeroOut":
                fields[f"{side} prompt"] = "of zeros"
                break
        else:
            fields[f"{side} prompt"] = "not found"
    for clip in clips:
        last = [key for key in clip if graph.kind(key) == "CLIPSetLastLayer"][:1]
        skips += [-int(graph.take(key, "stop_at_clip_layer") or -1) for key in last] or [1]
    if len({*skips}) > 1:
        fields["CLIPSetLastLayer"] = "of one prompt alone"
    fields |= {"Clip skip": str(skips[0])} if skips and skips[0] != 1 else {}
    return prompts, set(clips[0]).intersection(*clips) if clips else set(), fields


def read_lora(graph, key, in_model, in_clip):
    """-> file, its strength for CLIP, for the UNet"""
    both = graph.kind(key) == "LoraLoader"
    clip = (graph.take(key, "strength_clip") if both else None) or "0"
    unet = graph.take(key, "strength_model") or "0"
    file = graph.take(key, "lora_name") or ""
    return file, clip if in_clip else "0", unet if in_model else "0"


def settle_files(graph, keys, given):
    """What the command line gives in the place of theirs counts as read."""
    inputs = {"VAELoader": ("vae_name", "vae"), "LoadImage": ("image", "image")}
    inputs |= {"CheckpointLoaderSimple": ("ckpt_name", "model")}
    for key in keys:
        name, option = inputs.get(graph.kind(key), ("", ""))
        graph.used |= {(key, name)} if option in given else set()


# %% InvokeAI, NovelAI -----------------------------------------------------------------------------

INVOKEAI = {
    "steps": "Steps", "seed": "Seed", "cfg_scale": "CFG scale", "strength": "Denoising strength",
    "cfg_rescale_multiplier": "CFG rescale", "rand_device": "RNG", "model_hash": "Model hash",
}  # fmt: skip
NOVELAI = {
    "steps": "Steps", "seed": "Seed", "scale": "CFG scale", "cfg_rescale": "CFG rescale",
    "sampler": "Sampler", "strength": "Denoising strength",
}  # fmt: skip
HARMLESS = {  # which values change nothing; None: any. For most others 0, false and null do not.
    "app_id": None, "app_version": None, "generation_mode": "txt2img", "type": "txt2img",
    "model": "stable diffusion", "signed_hash": None, "version": None, "n_samples": 1,
    "hide_debug_overlay": None, "uncond_scale": 1.0, "request_type": "PromptGenerateRequest",
    "noise_schedule": "native", "controlnet_strength": 1.0, "dynamic_thresholding_percentile": None,
    "dynamic_thresholding_mimic_scale": None, "uncond_per_vibe": None,
    "wonky_vibe_correlation": None, "cfg_sched_eligibility": None,
}  # fmt: skip


def translate(program, found, names, read):
    """-> fields: those in names, and whatever else is not among those read"""
    fields = {field: say_value(found.get(name)) for name, field in names.items()}
    fields = {field: text for field, text in fields.items() if text}
    if found.get("width") and found.get("height"):
        fields["Size"] = f"{say_value(found['width'])}x{say_value(found['height'])}"
    read = {*read, *names, "width", "height"}
    rest = {name: value for name, value in found.items() if name not in read}
    rest = {n: say_value(v) for n, v in rest.items() if HARMLESS.get(n, ...) not in (None, v)}
    return fields | {f"{program}'s {name}": text for name, text in rest.items()}


def read_name(model):
    """{"name": "a"} or {"model_name": "a"} -> "a" """
    model = model if isinstance(model, dict) else {}
    return say_value(model.get("name") or model.get("model_name"))


def read_invokeai(found, texts, size, given):
    if not {"positive_prompt", "steps"} & found.keys():
        return None
    read = {"positive_prompt", "negative_prompt", "scheduler", "clip_skip"}
    loras = []
    if isinstance(found.get("loras"), list) and all(isinstance(x, dict) for x in found["loras"]):
        read.add("loras")
        for lora in found["loras"]:
            weight = say_value(lora.get("weight"))
            loras.append((read_name(lora.get("model") or lora.get("lora")), weight, weight))
    model = read_name(found.get("model"))
    read |= {"model"} if model else set()
    read |= {"vae"} & given.keys()
    fields = {"RNG": "CPU"} | translate("InvokeAI", found, INVOKEAI, read)
    scheduler = say_value(found.get("scheduler"))
    fields["Sampler"] = {"pndm": "plms"}.get(scheduler, scheduler.removesuffix("_k"))
    fields |= {"Schedule type": "karras"} if scheduler.endswith("_k") else {}
    fields |= {"Model": model} if model else {}
    skip = found.get("clip_skip")  # how many layers are left out
    fields |= {"Clip skip": str(int(say_value(skip)) + 1)} if skip else {}
    prompts = expect_text(found.get("positive_prompt")), expect_text(found.get("negative_prompt"))
    return dict(zip(("prompt", "negative_prompt"), prompts)), drop_empty(fields), loras


def read_old_invokeai(found, texts, size, given):
    """Words in [brackets] are the negative prompt."""
    image = found.get("image")
    if not isinstance(image, dict) or not {"prompt", "steps"} & image.keys():
        return None
    prompt = image.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("prompt")
    prompt = expect_text(prompt)
    negative = " ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
    prompts = {"prompt": re.sub(r"\[[^\[\]]*\]", " ", prompt), "negative_prompt": negative}
    names = INVOKEAI | {"sampler": "Sampler", "model_weights": "Model"}
    outside = {name: value for name, value in found.items() if name != "image"}
    return prompts, drop_empty(translate("InvokeAI", outside | image, names, {"prompt"})), []


def read_novelai(found, texts, size, given):
    """AUTOMATIC1111's program reads these pictures with clip skip 2, too."""
    prompt = found.get("prompt", texts.get("Description"))
    if prompt is None or "steps" not in found:
        return None
    fields = {"Size": "{}x{}".format(*size), "Clip skip": "2", "Model": texts.get("Source", "")}
    schedule = say_value(found.get("noise_schedule"))
    if schedule not in ("", "native"):
        fields["Schedule type"] = schedule
    fields |= translate("NovelAI", found, NOVELAI, {"prompt", "uc", "noise_schedule"})
    prompts = {"prompt": expect_text(prompt), "negative_prompt": expect_text(found.get("uc"))}
    return prompts, drop_empty(fields), []


def drop_empty(fields):
    return {name: text for name, text in fields.items() if text}


READERS = (  # chunk, program, how
    ("invokeai_metadata", "InvokeAI", read_invokeai),
    ("sd-metadata", "InvokeAI", read_old_invokeai),
    ("Comment", "NovelAI", read_novelai),
    ("prompt", "ComfyUI", read_comfyui),
)
