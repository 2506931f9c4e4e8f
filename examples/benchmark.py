"""One guided UNet call at Stable Diffusion 1.5's size, beside diffusers with the same weights.

    pip install -e '.[test]'
    python examples/benchmark.py      some four minutes, 16 GB of memory, 7 GB of disk for a while

Random weights, 64 x 64 latents, batch 2 (without and with the prompt), float32. Each program has a
process of its own, as in use; all in one process, sd.py was measured to be a tenth slower. They
take turns, so that a noisy machine is noisy for all. Prints medians and ratios.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
WIDTHS, HEADS = [320, 640, 1280, 1280], [8, 8, 8, 8]


def load_sd(folder, x, context):
    """-> a function that makes one call and gives back eps as (b, c, h, w)."""
    import mlx.core as mx

    import sd

    unet = sd.UNet(WIDTHS, HEADS, 32, 768)
    unet.load_weights(str(folder / "ours.safetensors"))
    mx.eval(unet.parameters())
    x, context = mx.array(x.transpose(0, 2, 3, 1)), mx.array(context)
    return lambda: np.array(unet(x, 500, context)).transpose(0, 3, 1, 2)


def load_diffusers(folder, x, context, channels_last=False):
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    torch.set_grad_enabled(False)
    unet = UNet2DConditionModel(cross_attention_dim=768).eval()
    unet.load_state_dict(load_file(folder / "theirs.safetensors"))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet = unet.to(memory_format=layout)
    x, context = torch.from_numpy(x).contiguous(memory_format=layout), torch.from_numpy(context)
    return lambda: unet(x, 500, context).sample.numpy()


def load_diffusers_channels_last(folder, x, context):
    return load_diffusers(folder, x, context, channels_last=True)


PROGRAMS = {
    "sd.py, float32": load_sd,
    "diffusers, float32": load_diffusers,
    "diffusers, float32, channels-last": load_diffusers_channels_last,
}


def write_weights(folder):
    """The same random weights under diffusers' names and under sd.py's."""
    import mlx.core as mx
    from diffusers import UNet2DConditionModel
    from mlx.utils import tree_flatten
    from safetensors.torch import save_file

    import sd
    import test_sd

    theirs = test_sd.shake(UNet2DConditionModel(cross_attention_dim=768).eval())
    save_file(theirs.state_dict(), folder / "theirs.safetensors")
    ours = test_sd.ours_from(sd.UNet(WIDTHS, HEADS, 32, 768), "unet", theirs)
    mx.save_safetensors(str(folder / "ours.safetensors"), dict(tree_flatten(ours.parameters())))


def serve(load, folder, x, context, pipe):
    """Make a call whenever asked, and say how long it took and what came out."""
    call = load(folder, x, context)
    call()  # once without the clock: first calls prepare things
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        out = call()
        pipe.send((time.perf_counter() - start, out))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=5, metavar="N", help="calls of each (default: 5)")
    args = p.parse_args(argv)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 64, 64), np.float32)
    context = rng.standard_normal((2, 77, 768), np.float32)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = spawn.Process(target=write_weights, args=(Path(folder),))
        writer.start()
        writer.join()
        pipes, processes = {}, []
        for name, load in PROGRAMS.items():
            pipes[name], theirs = spawn.Pipe()
            job = (load, Path(folder), x, context, theirs)
            processes.append(spawn.Process(target=serve, args=job, daemon=True))
            processes[-1].start()
            pipes[name].recv()
        times, results = {name: [] for name in PROGRAMS}, {}
        for _ in range(args.runs):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds, results[name] = pipe.recv()
                times[name].append(seconds)
        for pipe, process in zip(pipes.values(), processes):
            pipe.send(False)
            process.join()

    ours, truth, _ = results.values()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {date.today()}")
    names = ("mlx", "numpy", "torch", "diffusers")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
    print(f"relative error: {np.abs(ours - truth).max() / np.abs(truth).max():.1e}\n")
    print("| one guided UNet call, 512 x 512 | median s | all | sd.py takes, of this |")
    print("|---|---|---|---|")
    mine = statistics.median(times["sd.py, float32"])
    for name, each in times.items():
        median = statistics.median(each)
        print(
            f"| {name} | {median:.2f} | {min(each):.1f} ... {max(each):.1f} | {mine / median:.2f} |"
        )


if __name__ == "__main__":
    main()
