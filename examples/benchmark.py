"""Speed and memory of sd.py and of what people would pick instead: one run, the same weights.

    pip install -e '.[test,benchmark]'
    python examples/benchmark.py                            everything, in some hours on two cores
    python examples/benchmark.py --only unet decode         some of it, see --help
    python examples/benchmark.py --sizes 2.1                Stable Diffusion 2.1 at 768 x 768
    python examples/benchmark.py --model folder             a diffusers folder's weights, not random

Without --model, random weights of Stable Diffusion's sizes are made on the spot, rounded to
float16, as most files of weights are; every program gets the same. It needs 20 GB of memory and,
for as long as it runs, of disk. It prints Markdown, and with --plot it writes a plot.

Each program has a process of its own, and their runs are interleaved, so that a noisy machine is
noisy for all. The first call of each is not counted; OpenVINO and torch.compile prepare themselves
in it for the very shapes that follow. Above each table stands how fast the machine multiplied large
matrices just then, which tells a reader how to compare it with another machine.

What they compute is compared, too: the error is the largest difference from diffusers in float32,
relative to the largest number.

A guided UNet call answers for the same latents without the prompt and with it. diffusers repeats
the latents and runs a batch of two; sd.py's UNet takes them once, with both contexts, and repeats
them itself where the first of them is read. The results are the same, and are compared.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
os.environ |= {name: "error" for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")}
SPAWN = multiprocessing.get_context("spawn")
PROMPT = "a lighthouse in a storm, oil on canvas"

# %% The programs ----------------------------------------------------------------------------------
# Each opens what a task needs and returns a function of NumPy arrays, (b, c, h, w) as in PyTorch.
# Tasks: text (ids), unet (x, context), decode (x), encode (picture), picture (size, steps). With
# guidance the context is twice as long as x: the first half without the prompt, the second with it.


def repeat(x, *context):
    """The same arguments for a UNet that wants x as long as the context, as diffusers' does."""
    times = len(context[0]) // len(x) if context else 1
    return np.concatenate([x] * times), *context


def open_sd(folder, task, low_memory=False, file="flat.safetensors"):
    import mlx.core as mx

    from sd import StableDiffusion
    from sd_more.low_memory import LowMemory

    model = (LowMemory if low_memory else StableDiffusion)(folder / file)

    def to_nhwc(x):
        return mx.array(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))

    def to_nchw(x):
        return np.array(x).transpose(0, 3, 1, 2)

    def unet(x, context):
        return to_nchw(model.unet(to_nhwc(x), 500, mx.array(context)))

    def picture(size, steps, start=None):
        options = {"cfg": 7.5, "steps": steps, "width": size, "height": size}
        if start is None:
            return model.txt2img(PROMPT, **options)
        return model.img2img(PROMPT, Image.fromarray(start), strength=1.0, **options)

    return {
        "text": lambda ids: np.array(model.text_encoder(mx.array(ids))),
        "unet": unet,
        "decode": lambda x: to_nchw(model.vae.decode(to_nhwc(x))),
        "encode": lambda x: to_nchw(model.vae.encode(to_nhwc(x))[0]),
        "picture": picture,
    }[task]


def open_sd_low_memory(folder, task):
    return open_sd(folder, task, low_memory=True)


def open_packed(folder, task, bits, low_memory=False):
    return open_sd(folder, task, low_memory, f"{bits}.safetensors")


def torch_part(folder, task, dtype):
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind, part = {
        "text": (CLIPTextModel, "text_encoder"),
        "unet": (UNet2DConditionModel, "unet"),
    }.get(task, (AutoencoderKL, "vae"))
    model = kind.from_pretrained(
        folder / "diffusers" / part, torch_dtype=getattr(torch, dtype)
    ).eval()
    torch.set_grad_enabled(False)
    return {
        "text": lambda ids: model(ids)[0],
        "unet": lambda x, context: model(x, 500, context, return_dict=False)[0],
        "decode": lambda x: model.decode(x, return_dict=False)[0],
        "encode": lambda x: model.encode(x, return_dict=False)[0].mean,
    }[task], model


def open_diffusers(folder, task, dtype="float32", layout="contiguous_format", compiled=False):
    import torch

    layout, kind = getattr(torch, layout), getattr(torch, dtype)
    if task == "picture":
        from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder / "diffusers", torch_dtype=kind)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet.to(memory_format=layout)
        pipeline.vae.to(memory_format=layout)
        other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)

        def picture(size, steps, start=None):
            options = {"num_inference_steps": steps, "guidance_scale": 7.5}
            if start is None:
                return pipeline(PROMPT, height=size, width=size, **options).images
            return other(PROMPT, image=Image.fromarray(start), strength=1.0, **options).images

        return picture
    f, model = torch_part(folder, task, dtype)
    model.to(memory_format=layout)
    f, ready = torch.compile(f, dynamic=False) if compiled else f, set()

    def tensor(x):
        x = torch.from_numpy(x)
        return x if x.dtype == torch.int64 else x.to(kind)

    def run(x, *context):
        x, *context = map(tensor, repeat(x, *context))
        x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
        return f(x, *context).float().numpy()

    def prepare(*arguments):
        if compiled and (shapes := tuple(a.shape for a in arguments)) not in ready:
            ready.add(shapes)
            run(*arguments)

    run.prepare = prepare
    return run


def open_channels_last(folder, task):
    return open_diffusers(folder, task, layout="channels_last")


def open_bfloat16(folder, task):
    return open_diffusers(folder, task, "bfloat16", "channels_last")


def open_compiled(folder, task):
    return open_diffusers(folder, task, layout="channels_last", compiled=True)


def open_compiled_bfloat16(folder, task):
    return open_diffusers(folder, task, "bfloat16", "channels_last", compiled=True)


def write_openvino(folder, task, shapes):
    """Write the network in OpenVINO's format. Tracing keeps several copies of it in memory, so
    this is called in a process of its own.
    """
    import openvino
    import torch

    f, model = torch_part(folder, task, "float32")

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *arguments):
            return f(*arguments)

    example = tuple(
        torch.zeros(s, dtype=torch.int64 if task == "text" else torch.float32) for s in shapes
    )
    traced = openvino.convert_model(Traced(), example_input=example)
    openvino.save_model(traced, folder / f"{task}.xml", compress_to_fp16=False)


def open_openvino(folder, task, precision="f32"):
    """Compiled for the first call's shapes, which is faster than for any."""
    import openvino

    if task == "picture":
        return openvino_picture(folder, precision)
    core, ready = openvino.Core(), {}

    def prepare(*arguments):
        arguments = repeat(*arguments)
        shapes = tuple(a.shape for a in arguments)
        if shapes not in ready:
            ready.clear()
            model = core.read_model(folder / f"{task}.xml")
            model.reshape(dict(enumerate(map(list, shapes))))
            hint = {"INFERENCE_PRECISION_HINT": precision}
            if count := os.environ.get("OMP_NUM_THREADS"):
                hint["INFERENCE_NUM_THREADS"] = int(count)
            ready[shapes] = core.compile_model(model, "CPU", hint)
            ready[shapes](list(arguments))  # the first call is slower
        return ready[shapes]

    def run(*arguments):
        return prepare(*arguments)(list(repeat(*arguments)))[0]

    run.prepare = prepare
    return run


def openvino_picture(folder, precision):
    """Its three networks by hand, with diffusers' tokenizer and sampler. The traced UNet is asked
    for one timestep always; that takes as long.
    """
    import torch
    from diffusers import PNDMScheduler
    from transformers import CLIPTokenizer

    text, unet, decode = (open_openvino(folder, task, precision) for task in PICTURE)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "diffusers" / "tokenizer")
    sampler = PNDMScheduler.from_pretrained(folder / "diffusers" / "scheduler")

    def picture(size, steps):
        ids = tokenizer(["", PROMPT], padding="max_length", max_length=77, return_tensors="np")
        context = text(ids.input_ids.astype(np.int64))
        sampler.set_timesteps(steps)
        x = torch.randn(1, 4, size // 8, size // 8)
        for t in sampler.timesteps:
            without, with_prompt = unet(x.numpy(), context)
            eps = torch.from_numpy(without + 7.5 * (with_prompt - without))[None]
            x = sampler.step(eps, t, x).prev_sample
        return decode(x.numpy() / 0.18215)

    picture.prepare = lambda size, steps: picture(size, 1)
    return picture


def open_openvino_bfloat16(folder, task):
    return open_openvino(folder, task, "bf16")


PICTURE = ("text", "unet", "decode")  # the networks that a picture from a prompt needs
OURS, TRUTH, LAST = "sd.py, float32", "diffusers, float32", "diffusers, float32, channels-last"
PROGRAMS = {
    OURS: open_sd,
    TRUTH: open_diffusers,
    LAST: open_channels_last,
    "diffusers, bfloat16, channels-last": open_bfloat16,
    "torch.compile, float32": open_compiled,
    "torch.compile, bfloat16": open_compiled_bfloat16,
    "OpenVINO, float32": open_openvino,
    "OpenVINO, bfloat16": open_openvino_bfloat16,
}
if not importlib.util.find_spec("openvino"):
    PROGRAMS = {name: program for name, program in PROGRAMS.items() if "OpenVINO" not in name}
# torch.compile takes minutes and gigabytes, and writes C++.
if not os.environ.get("COMPILE") or not shutil.which(os.environ.get("CXX", "g++")):
    PROGRAMS = {name: program for name, program in PROGRAMS.items() if "compile" not in name}

# %% Processes and turns ---------------------------------------------------------------------------


def apart(f, *arguments):
    """Call f(*arguments) in a process of its own; stop here if that fails."""
    process = SPAWN.Process(target=f, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{f.__name__} ended with status {process.exitcode}")


# The sizes of the networks, for random weights; with heads as 1.x counts them, 8 on each level, and
# as 2.x does, 64 channels each.
SIZES = {
    "1.5": {
        "size": 512, "prediction": "eps",
        "text": {"width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu", "pad": 49407},
        "unet": {"widths": [320, 640, 1280, 1280], "heads": [8] * 4, "groups": 32,
                 "context_width": 768},
        "vae": {"widths": [128, 256, 512, 512], "groups": 32, "scale": 0.18215},
    },
    "2.1": {
        "size": 768, "prediction": "v",
        "text": {"width": 1024, "layers": 23, "heads": 16, "activation": "gelu", "pad": 0},
        "unet": {"widths": [320, 640, 1280, 1280], "heads": [5, 10, 20, 20], "groups": 32,
                 "context_width": 1024},
        "vae": {"widths": [128, 256, 512, 512], "groups": 32, "scale": 0.18215},
    },
}  # fmt: skip


def write_models(folder, model, sizes):
    """The weights as a diffusers folder, and as sd.py's flat file."""
    import convert_weights

    theirs = folder / "diffusers"
    if model:
        theirs.symlink_to(Path(model).resolve())
    else:
        import torch
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        from tests import reference

        config = SIZES[sizes]
        prediction = {"eps": "epsilon", "v": "v_prediction"}[config["prediction"]]
        torch.set_grad_enabled(False)
        networks = map(reference.shake, reference.reference_models(config))
        text, unet, vae = (network.half() for network in networks)
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text,
            tokenizer=reference.train.tokenizer(folder),
            unet=unet,
            scheduler=reference.scheduler(PNDMScheduler, prediction_type=prediction),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(theirs)
    convert_weights.convert(theirs, folder / "flat.safetensors", log=lambda *_: None)


def serve(program, folder, task, pipe):
    """A process's work: call the program with each set of arguments, send the time and result."""
    call = program(folder, task)
    pipe.send(None)
    prepare = getattr(call, "prepare", lambda *_: None)
    while (arguments := pipe.recv()) is not None:
        prepare(*arguments)
        start = time.perf_counter()
        out = call(*arguments)
        pipe.send((time.perf_counter() - start, np.asarray(out)))


def traced(folder, task, arguments):
    """-> {network: its arguments' shapes}, what OpenVINO needs for the task."""
    if task != "picture":
        return {task: [a.shape for a in repeat(*arguments)]}
    x, context = (a.shape for a in repeat(*inputs(folder, 1, arguments[0], guided=True)))
    return {"text": [context[:2]], "unet": [x, context], "decode": [(1, *x[1:])]}


def turns(folder, task, sets, runs, names=tuple(PROGRAMS), first=None):
    """-> {program: [median seconds for each set of arguments]}, {program: its last result}.

    first: the arguments of the call that is not counted (default: those of the first set).
    """
    if any("OpenVINO" in name for name in names):
        for part, shapes in traced(folder, task, sets[0]).items():
            if not (folder / f"{part}.xml").exists():
                apart(write_openvino, folder, part, shapes)
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = SPAWN.Pipe()
        job = (PROGRAMS[name], folder, task, theirs)
        processes.append(SPAWN.Process(target=serve, args=job, daemon=True))
        processes[-1].start()
        pipes[name].recv()
        pipes[name].send(first or sets[0])
        pipes[name].recv()
    medians, results = {name: [] for name in names}, {}
    for arguments in sets:
        times = {name: [] for name in names}
        for _ in range(runs):
            for name, pipe in pipes.items():
                pipe.send(arguments)
                seconds, results[name] = pipe.recv()
                times[name].append(seconds)
        for name in names:
            medians[name].append(statistics.median(times[name]))
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(None)
        process.join()
    return medians, results


def peak_of_picture(program, folder, size, pipe):
    program(folder, "picture")(size, 1)
    pipe.send(peak_memory())


def peak_memory():
    """Of this process, in GiB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def from_enter(*arguments):
    """The median seconds of five runs of a Python script, after one that is not counted."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# %% What is measured ------------------------------------------------------------------------------


def matrix_rate(pipe):
    a = np.ones((2048, 2048), np.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    pipe.send(2 * 2048**3 / min(times) / 1e9)


def rates():
    """The GFLOP/s of a large product in float32, with NumPy: of one core, and of all."""
    found = []
    for count in ("1", os.environ.get("OPENBLAS_NUM_THREADS")):
        with threads(count):
            pipe, theirs = SPAWN.Pipe()
            apart(matrix_rate, theirs)
            found.append(f"{pipe.recv():.0f}")
    return found


@contextlib.contextmanager
def threads(count):
    """Processes that are started inside use so many threads; with None as many as they like."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update({name: count for name in names if count})
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ.update({name: value} if value else {})


def table(title, columns, rows):
    one, every = rates()
    print(f"\nMatrix products: {one} GFLOP/s on one core, {every} on all.\n")
    print(f"| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def compare(title, folder, task, arguments, runs, names=tuple(PROGRAMS), first=None):
    """A row for each program: the median, sd.py's time divided by it, the error."""
    medians, results = turns(folder, task, [arguments], runs, names, first)
    rows = {}
    for name in names:
        error = "-"
        if task != "picture":
            truth = results[TRUTH]
            error = f"{np.abs(results[name] - truth).max() / np.abs(truth).max():.0e}"
        ratio = medians[OURS][0] / medians[name][0]
        rows[name] = (f"{medians[name][0]:.2f}", f"{ratio:.2f}", error)
    table(title, ("median s", "sd.py's time / this", "error"), rows)


def inputs(folder, batch, size, guided=False):
    """-> x, context. guided: the context twice, as without the prompt and with it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 4, size // 8, size // 8), np.float32)
    width = json.loads((folder / "diffusers/unet/config.json").read_text())["cross_attention_dim"]
    return x, rng.standard_normal((2 * batch if guided else batch, 77, width), np.float32)


def picture_size(folder):
    """The width of the pictures that the model was trained on: 512 or 768."""
    return json.loads((folder / "diffusers/unet/config.json").read_text())["sample_size"] * 8


def measure_text(folder, runs):
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77))
    ids[:, 0], ids[:, 20:] = 49406, 49407
    compare("text encoder, two sentences", folder, "text", (ids,), runs)


def measure_unet(folder, runs):
    size = picture_size(folder)
    title = f"one guided UNet call, {size} x {size}"
    compare(title, folder, "unet", inputs(folder, 1, size, guided=True), runs)


def measure_decode(folder, runs):
    size = picture_size(folder)
    compare(f"VAE decode, {size} x {size}", folder, "decode", inputs(folder, 1, size)[:1], runs)


def measure_encode(folder, runs):
    size = picture_size(folder)
    picture = np.random.default_rng(0).random((1, 3, size, size), np.float32) * 2 - 1
    compare(f"VAE encode, {size} x {size}", folder, "encode", (picture,), runs)


def measure_picture(folder, runs):
    names = (OURS, LAST, *(name for name in PROGRAMS if "OpenVINO" in name))
    size, steps = picture_size(folder), 20
    title = f"a picture, {size} x {size}, {steps} steps"
    compare(title, folder, "picture", (size, steps), min(runs, 3), names, first=(64, 1))


def measure_long(folder, runs):
    """A picture of 50 steps, and 10 steps from a picture."""
    size = picture_size(folder)
    start = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    for what, steps, *more in (("a picture", 50), ("img2img", 10, start)):
        title = f"{what}, {size} x {size}, {steps} steps"
        compare(title, folder, "picture", (size, steps, *more), 1, (OURS, LAST), first=(64, 1))


def measure_cores(folder, runs):
    """A guided UNet call on 1, 2 and all cores, and how many times faster than on 1 that is."""
    size, every = picture_size(folder), os.cpu_count() or 1
    counts = sorted({1, min(2, every), every})
    names = [OURS, LAST, *(name for name in PROGRAMS if name == "OpenVINO, float32")]
    medians = {name: [] for name in names}
    for count in counts:
        with threads(str(count)):
            found, _ = turns(folder, "unet", [inputs(folder, 1, size, guided=True)], runs, names)
        for name in names:
            medians[name] += found[name]
    rows = {
        name: [f"{seconds:.2f} ({several[0] / seconds:.2f})" for seconds in several]
        for name, several in medians.items()
    }
    title = f"seconds for one guided UNet call, {size} x {size} (speed-up), cores"
    table(title, list(map(str, counts)), rows)


def scaling(title, folder, sets, cell):
    """cell(key of a set, its seconds) -> the numbers to show, of which the last is plotted."""
    names = [name for name in PROGRAMS if name in (OURS, LAST, "OpenVINO, float32") or "bf" in name]
    names = [name for name in names if "OpenVINO, b" not in name and "compile" not in name]
    medians, _ = turns(folder, "unet", list(sets.values()), 1, names)
    cells = {name: [cell(key, s) for key, s in zip(sets, medians[name])] for name in names}
    rows = {
        name: [" / ".join(f"{n:.3g}" for n in several) for several in row]
        for name, row in cells.items()
    }
    table(title, list(map(str, sets)), rows)
    return {name: [several[-1] for several in row] for name, row in cells.items()}


def measure_batches(folder, runs):
    sets = {n: inputs(folder, n, 512) for n in (1, 2, 4, 6, 8, 12, 16)}
    title = "iterations / pictures a second through the UNet, 512 x 512, in a batch of"
    return scaling(title, folder, sets, lambda n, seconds: (1 / seconds, n / seconds))


def measure_sizes(folder, runs):
    sets = {size: inputs(folder, 1, size, guided=True) for size in (256, 512, 768, 1024)}
    title = "seconds for one guided UNet call, pixels"
    return scaling(title, folder, sets, lambda _, seconds: (seconds,))


def measure_memory(folder, runs):
    rows = {}
    for name, program in {
        OURS: open_sd,
        "sd.py, --low-memory": open_sd_low_memory,
        TRUTH: open_diffusers,
        "diffusers, bfloat16, channels-last": open_bfloat16,
        "torch.compile, float32": open_compiled,
        "torch.compile, bfloat16": open_compiled_bfloat16,
    }.items():
        if "compile" in name and name not in PROGRAMS:
            continue
        rows[name] = []
        for size in (512, 1024):
            pipe, theirs = SPAWN.Pipe()
            apart(peak_of_picture, program, folder, size, theirs)
            rows[name].append(f"{pipe.recv():.2f}")
    table("peak memory in GiB, loading and painting", ("512 x 512", "1024 x 1024"), rows)


def measure_palettes(folder, runs):
    """Files with 8 to 2 bits a weight, made in a process of its own each."""
    rows, names = {}, [OURS]
    for bits in (8, 6, 4, 2):
        pipe, theirs = SPAWN.Pipe()
        start = time.perf_counter()
        apart(pack, folder, bits, theirs)
        seconds, (answers, peak) = time.perf_counter() - start, pipe.recv()
        size = (folder / f"{bits}.safetensors").stat().st_size / 2**30
        cells = [f"{size:.3f}", f"{seconds:.0f}", f"{peak:.2f}", *(f"{a:.1f}" for a in answers)]
        names.append(name := f"sd.py, {bits} bits")
        PROGRAMS[name] = functools.partial(open_packed, bits=bits)
        rows[name] = cells
    columns = ("file, GiB", "s to make it", "peak GiB", "text encoder, dB", "UNet, dB")
    table("palettes of Stable Diffusion's sizes", columns, rows)
    arguments = inputs(folder, 1, picture_size(folder), guided=True)
    medians, _ = turns(folder, "unet", [arguments], runs, names)
    peaks = []
    for bits in (None, 6):
        program = functools.partial(open_packed, bits=bits, low_memory=True)
        pipe, theirs = SPAWN.Pipe()
        size = picture_size(folder)
        apart(peak_of_picture, program if bits else open_sd_low_memory, folder, size, theirs)
        peaks.append(pipe.recv())
    calls = {n: (f"{s:.2f}", f"{s / medians[OURS][0]:.3f}") for n, (s,) in medians.items()}
    table("one guided UNet call", ("median s", "of the float16 file's"), calls)
    peaks = [f"{peak:.2f}" for peak in peaks]
    table("peak memory in GiB, --low-memory", ("16 bits", "6 bits"), {"one picture": peaks})


def pack(folder, bits, pipe):
    """Write a file with palettes -> each network's PSNR against the file without, peak memory"""
    import convert_weights
    import sd
    from sd_more import check

    plain, small = folder / "flat.safetensors", folder / f"{bits}.safetensors"
    convert_weights.convert(plain, small, bits=bits, log=lambda _: None)
    peak = peak_memory()
    config = json.loads(sd.read_header(plain)["config"])
    found = []
    for part in ("text_encoder", "unet"):
        arguments = check.inputs(part, config)
        built = (check.build(part, config, sd.read_flat(path)[1]) for path in (small, plain))
        found.append(check.psnr(*(check.ask(part, network, *arguments) for network in built)))
    pipe.send((found, peak))


def measure_start(folder, runs):
    sd, out = str(HERE / "sd.py"), str(folder / "out.png")
    rows = {
        "`sd.py --help`": (f"{from_enter(sd, '--help'):.2f}",),
        "the miniature's picture, 50 steps": (
            f"{from_enter(sd, '--steps', '50', '--output', out):.2f}",
        ),
    }
    table("from Enter to the end", ("median s",), rows)


TASKS = {
    name.removeprefix("measure_"): f for name, f in globals().items() if name.startswith("measure_")
}


def plot(path, curves):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    titles = {
        "batches": ("pictures a second through the UNet", "in a batch", (1, 2, 4, 6, 8, 12, 16)),
        "sizes": ("seconds for a guided UNet call", "pixels a side", (256, 512, 768, 1024)),
    }
    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
    for axis, (task, programs) in zip(axes[0], curves.items()):
        title, below, at = titles[task]
        for name, values in programs.items():
            axis.plot(at, values, "o-", label=name)
        axis.set(title=title, xlabel=below, ylim=(0, None))
        axis.legend()
    figure.savefig(path, bbox_inches="tight")


def machine():
    """The processor, and the kernels that NumPy's OpenBLAS chose for it."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    kernels = "?"
    if hasattr(library, "scipy_openblas_get_corename64_"):
        library.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
        kernels = library.scipy_openblas_get_corename64_().decode()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}; OpenBLAS's {kernels} kernels"


def installed(package):
    return importlib.util.find_spec(package) is not None


def main(argv=None):
    compiled = "With COMPILE=1 in the environment torch.compile is measured, too."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=compiled)
    p.add_argument("--model", metavar="FOLDER", help="a diffusers folder (default: random weights)")
    p.add_argument("--sizes", choices=SIZES, default="1.5", help="of random weights")
    p.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="measure only these")
    p.add_argument("--runs", type=int, default=5, metavar="N", help="calls of each (default: 5)")
    p.add_argument("--plot", metavar="FILE", help="batches and sizes as a picture")
    args = p.parse_args(argv)
    names = ("mlx", "numpy", "torch", "diffusers", "transformers", "openvino")
    print(f"{date.today()}, {machine()}  ")
    print(", ".join(f"{n} {importlib.metadata.version(n)}" for n in names if installed(n)))
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        apart(write_models, folder, args.model, args.sizes)
        for task in args.only:
            curves[task] = TASKS[task](folder, args.runs)
    curves = {task: curve for task, curve in curves.items() if curve}
    if args.plot and curves:
        plot(args.plot, curves)


if __name__ == "__main__":
    main()
