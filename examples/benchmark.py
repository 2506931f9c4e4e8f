"""One guided UNet call at Stable Diffusion 1.5's size, beside diffusers with the same weights.

    pip install -e '.[test]'
    python examples/benchmark.py              about three minutes and 13 GB of memory on two cores

Random weights, 64 x 64 latents, batch 2 (without and with the prompt), float32. The programs take
turns, so that a noisy machine is noisy for all; medians and ratios are printed as Markdown.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sd
import test_sd

torch.set_grad_enabled(False)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=5, metavar="N", help="calls of each (default: 5)")
    args = p.parse_args(argv)

    theirs = test_sd.shake(UNet2DConditionModel(cross_attention_dim=768).eval())
    ours = sd.UNet([320, 640, 1280, 1280], [8, 8, 8, 8], 32, 768)
    ours = test_sd.ours_from(ours, "unet", theirs)
    x, context = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    x_last = x.contiguous(memory_format=torch.channels_last)
    ours_x, ours_context = test_sd.nhwc(x), mx.array(context.numpy())
    last = UNet2DConditionModel(cross_attention_dim=768).eval()
    last.load_state_dict(theirs.state_dict())
    last = last.to(memory_format=torch.channels_last)

    results = {}
    rows = {
        "sd.py, float32": lambda: results.update(ours=ours(ours_x, 500, ours_context)),
        "diffusers, float32": lambda: results.update(theirs=theirs(x, 500, context).sample),
        "diffusers, float32, channels-last": lambda: last(x_last, 500, context),
    }
    eager = {
        name: (lambda f=f: (f(), mx.eval(results.get("ours", [])))) for name, f in rows.items()
    }
    for call in eager.values():
        call()  # once without the clock: first calls prepare things
    times = {name: [] for name in rows}
    for _ in range(args.runs):
        for name, call in eager.items():
            times[name].append(seconds(call))

    error = np.abs(test_sd.nchw(results["ours"]) - results["theirs"].numpy()).max()
    error /= results["theirs"].abs().max().item()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("mlx", "numpy", "torch", "diffusers")
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, {date.today()}")
    print(versions)
    print(f"relative error against diffusers: {error:.1e}\n")
    print("| one guided UNet call, 512 x 512 | median s | all | sd.py takes, of this |")
    print("|---|---|---|---|")
    mine = statistics.median(times["sd.py, float32"])
    for name, each in times.items():
        median = statistics.median(each)
        spread = f"{min(each):.1f} ... {max(each):.1f}"
        print(f"| {name} | {median:.2f} | {spread} | {mine / median:.2f} |")


if __name__ == "__main__":
    main()
