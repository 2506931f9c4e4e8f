"""Train the miniature: Stable Diffusion with small numbers, on pictures this file draws itself.

    pip install -e '.[test]'
    python tiny/train.py                  some two hours on two cores; may be stopped and restarted
    python convert_weights.py tiny/run/tiny.ckpt -o tiny/tiny.safetensors

Three stages, each resumed from tiny/run/ (networks at the last 500 steps):

    draw    12,000 pictures of a picture-book world, 128 x 128, each with what is in it
    vae     pictures <-> latents: an autoencoder, trained on 64 x 64 crops       [1]
    unet    the text model and the UNet together, on the cached latents           [1, 2, 3]

The networks are diffusers' and transformers' own classes, so that what sd.py paints with these
weights can be compared with what diffusers' pipeline paints with them. The checkpoint is written
under the names of the original Stable Diffusion: it goes through convert_weights.py like any other.

[1] Rombach et al. 2022, arXiv 2112.10752   [2] Ho et al. 2020, 2006.11239 (the loss)
[3] Hang et al. 2023, 2303.09556 (min-SNR weights)
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SIZE = 128

# What the converter cannot see in the tensors' shapes; it is stored in the checkpoint beside them.
NUMBERS = {
    "name": "the miniature",
    "size": SIZE,
    "cfg": 3.0,
    "text": {"heads": 4},
    "unet": {"heads": [2, 2, 2, 2], "groups": 16},
    "vae": {"groups": 8},
}

# %% The world ------------------------------------------------------------------------------

COLOURS = {
    "red": (214, 40, 44), "orange": (245, 130, 30), "yellow": (250, 208, 48),
    "green": (44, 160, 68), "blue": (44, 96, 216), "purple": (138, 62, 184),
}  # fmt: skip
GROUNDS = {
    "grass": ((98, 168, 74), ("on the grass", "on grass", "on the green grass")),
    "sand": ((232, 210, 152), ("on the sand", "on sand", "on the beach")),
    "snow": ((240, 245, 252), ("on the snow", "in the snow", "on snow")),
    "sea": ((44, 118, 186), ("on the sea", "on the water", "at sea")),
}
TIMES = {  # sky above, sky at the horizon, how much light falls on the ground, how people say it
    "day": ((112, 180, 238), (206, 232, 250), (1.0, 1.0, 1.0),
            ("by day", "in daylight", "during the day")),
    "sunset": ((122, 70, 146), (252, 176, 88), (0.86, 0.72, 0.66),
               ("at sunset", "at dusk", "in the evening")),
    "night": ((12, 14, 48), (46, 50, 106), (0.36, 0.40, 0.54),
              ("at night", "by night", "in the night")),
}  # fmt: skip


def shade(colour, k):
    """k < 1 towards black, k > 1 towards white."""
    if k <= 1:
        return tuple(int(c * k) for c in colour)
    return tuple(int(c + (255 - c) * (k - 1)) for c in colour)


class Pen:
    """Draws in units of the thing's own size: x from -1 to 1, y from 0 (the ground) up to 2."""

    def __init__(self, draw, x, y, size):
        self.draw, self.x, self.y, self.size = draw, x, y, size

    def at(self, x, y):
        return self.x + x * self.size, self.y - y * self.size

    def polygon(self, points, colour):
        self.draw.polygon([self.at(*p) for p in points], fill=colour)

    def box(self, left, bottom, right, top, colour):
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)

    def disc(self, x, y, rx, colour, ry=None):
        (a, b), (c, d) = self.at(x - rx, y + (ry or rx)), self.at(x + rx, y - (ry or rx))
        self.draw.ellipse((a, b, c, d), fill=colour)

    def half_disc(self, x, y, rx, ry, colour):
        """The upper half."""
        (a, b), (c, d) = self.at(x - rx, y + ry), self.at(x + rx, y - ry)
        self.draw.pieslice((a, b, c, d), 180, 360, fill=colour)


def house(pen, c):
    pen.box(-0.8, 0, 0.8, 1.0, c)
    pen.polygon([(-1, 1.0), (1, 1.0), (0, 1.75)], shade(c, 0.6))
    pen.box(-0.2, 0, 0.2, 0.6, (92, 58, 36))
    pen.box(0.36, 0.42, 0.66, 0.74, (206, 232, 250))
    pen.box(-0.66, 0.42, -0.36, 0.74, (206, 232, 250))


def boat(pen, c):
    pen.box(-0.06, 0.4, 0.06, 1.9, (92, 58, 36))
    pen.polygon([(0.1, 0.62), (0.1, 1.85), (0.85, 0.62)], shade(c, 1.55))
    pen.polygon([(-0.1, 0.62), (-0.1, 1.55), (-0.65, 0.62)], shade(c, 1.55))
    pen.polygon([(-1, 0.5), (1, 0.5), (0.65, 0), (-0.65, 0)], c)


def tree(pen, c):
    pen.box(-0.15, 0, 0.15, 0.9, (110, 72, 44))
    pen.disc(-0.42, 1.05, 0.5, shade(c, 0.85))
    pen.disc(0.42, 1.05, 0.5, shade(c, 0.85))
    pen.disc(0, 1.4, 0.6, c)


def car(pen, c):
    pen.polygon([(-0.6, 0.55), (-0.36, 0.98), (0.36, 0.98), (0.66, 0.55)], shade(c, 0.7))
    pen.polygon([(-0.44, 0.58), (-0.28, 0.88), (-0.04, 0.88), (-0.04, 0.58)], (206, 232, 250))
    pen.polygon([(0.06, 0.58), (0.06, 0.88), (0.3, 0.88), (0.48, 0.58)], (206, 232, 250))
    pen.box(-1, 0.2, 1, 0.58, c)
    for x in (-0.55, 0.55):
        pen.disc(x, 0.2, 0.22, (30, 30, 34))
        pen.disc(x, 0.2, 0.09, (170, 170, 176))


def rocket(pen, c):
    pen.polygon([(-0.2, 0.3), (0.2, 0.3), (0, -0.08)], (255, 190, 60))
    pen.polygon([(-0.3, 0.75), (-0.62, 0.25), (-0.3, 0.32)], shade(c, 0.6))
    pen.polygon([(0.3, 0.75), (0.62, 0.25), (0.3, 0.32)], shade(c, 0.6))
    pen.box(-0.3, 0.3, 0.3, 1.35, c)
    pen.polygon([(-0.3, 1.35), (0.3, 1.35), (0, 2.0)], shade(c, 0.6))
    pen.disc(0, 1.05, 0.16, (206, 232, 250))


def mushroom(pen, c):
    pen.box(-0.26, 0, 0.26, 0.8, (246, 232, 206))
    pen.half_disc(0, 0.72, 0.95, 0.9, c)
    for x, y, r in ((-0.5, 0.95, 0.13), (0.05, 1.3, 0.15), (0.5, 0.98, 0.13)):
        pen.disc(x, y, r, (252, 250, 246))


def balloon(pen, c):
    pen.polygon([(-0.5, 0.85), (0.5, 0.85), (0.2, 0.4), (-0.2, 0.4)], shade(c, 0.75))
    pen.disc(0, 1.3, 0.75, c)
    pen.disc(0, 1.3, 0.3, shade(c, 1.35), ry=0.75)
    pen.box(-0.22, 0.08, 0.22, 0.36, (128, 84, 48))


def flower(pen, c):
    pen.box(-0.06, 0, 0.06, 1.1, (40, 120, 52))
    pen.disc(0.26, 0.4, 0.24, (40, 120, 52), ry=0.1)
    for k in range(6):
        a = math.pi / 3 * k
        pen.disc(0.42 * math.cos(a), 1.35 + 0.42 * math.sin(a), 0.3, c)
    pen.disc(0, 1.35, 0.26, shade(c, 0.5))


THINGS = {f.__name__: f for f in (house, boat, tree, car, rocket, mushroom, balloon, flower)}


def draw(seed):
    """-> (128 x 128 picture, (thing, colour, ground, time)). The seed decides everything.

    Drawn four times as large and shrunk, which is what makes the edges smooth.
    """
    rng, n = random.Random(seed), 4 * SIZE
    thing, colour = rng.choice(list(THINGS)), rng.choice(list(COLOURS))
    ground, when = rng.choice(list(GROUNDS)), rng.choice(list(TIMES))
    top, low, light, _ = TIMES[when]
    horizon = int(n * rng.uniform(0.6, 0.7))

    rows = np.linspace(0, 1, horizon)[:, None]
    sky = np.array(top) * (1 - rows) + np.array(low) * rows
    pixels = np.zeros((n, n, 3), np.uint8)
    pixels[:horizon] = sky[:, None]
    near = (
        np.linspace(1.04, 0.88, n - horizon)[:, None]
        * np.array(GROUNDS[ground][0])
        * np.array(light)
    )
    pixels[horizon:] = np.clip(near, 0, 255)[:, None]
    image = Image.fromarray(pixels)
    pen = Pen(ImageDraw.Draw(image), 0, n, n)
    side = rng.choice(
        (-1, 1)
    )  # the sun or the moon left or right, what else is in the sky opposite
    x, y = 0.5 + side * rng.uniform(0.3, 0.38), rng.uniform(0.8, 0.88)
    if when == "day":
        pen.disc(x, y, 0.07, (255, 226, 110))
        for k in (-1, 0, 1):
            pen.disc(1 - x + 0.06 * k, y - 0.02, 0.055 - 0.015 * abs(k), (250, 252, 255))
    elif when == "sunset":
        pen.half_disc(x, 1 - horizon / n, 0.1, 0.1, (255, 224, 120))
    else:
        pen.disc(x, y, 0.06, (244, 240, 214))
        for k in range(7):
            pen.disc(rng.uniform(0.04, 0.96), rng.uniform(0.55, 0.97), 0.008, (236, 236, 250))

    size = n * rng.uniform(0.25, 0.31)
    place = n * rng.uniform(0.38, 0.62), n * rng.uniform(0.84, 0.90)
    THINGS[thing](Pen(ImageDraw.Draw(image), *place, size), COLOURS[colour])
    return image.resize((SIZE, SIZE), Image.BOX), (thing, colour, ground, when)


def sentence(rng, thing, colour, ground, when):
    """One of the ways to say it. Parts are left out at random, so that prompts may do so, too."""
    article = rng.choice(("a", "a", "a", "the", ""))
    what = thing if rng.random() < 0.06 else f"{colour} {thing}"
    if article == "a" and what[0] in "aeiou":
        article = "an"
    what = f"{article} {what}".strip()
    where = rng.choice(GROUNDS[ground][1]) if rng.random() < 0.65 else ""
    time_ = rng.choice(TIMES[when][3]) if rng.random() < 0.65 else ""
    order = rng.choice(("{what} {where} {time}", "{what} {time} {where}", "{time}, {what} {where}"))
    text = " ".join(order.format(what=what, where=where, time=time_).split()).strip(" ,")
    return f"a picture of {text}" if rng.random() < 0.05 else text


def draw_all(folder, count):
    """All pictures as one uint8 array (count, 128, 128, 3), and what is in each."""
    path = folder / f"pictures_{count}.npz"
    if not path.exists():
        start = time.time()
        with multiprocessing.Pool() as pool:
            drawn = pool.map(_drawn, range(count), chunksize=64)
        pictures, facts = np.stack([p for p, _ in drawn]), np.array([f for _, f in drawn])
        part = path.with_suffix(".part.npz")  # renamed when complete: stopped here, it starts over
        np.savez(part, pictures=pictures, facts=facts)
        part.replace(path)
        print(f"drew {count} pictures in {time.time() - start:.0f} s")
    stored = np.load(path)
    return stored["pictures"], stored["facts"]


def _drawn(seed):
    image, facts = draw(seed)
    return np.asarray(image), facts


# %% The networks ---------------------------------------------------------------------------
# Small numbers in the shape of Stable Diffusion 1.x. 7.2 million parameters, of which 1.6 are the
# text model's 49,408 words (nearly all of them never seen) and 1.3 are the autoencoder.


def networks():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=NUMBERS["vae"]["groups"],
        sample_size=SIZE,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 64, 64, 64),
        attention_head_dim=tuple(NUMBERS["unet"]["heads"]),
        norm_num_groups=NUMBERS["unet"]["groups"],
        cross_attention_dim=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=NUMBERS["text"]["heads"],
            hidden_act="quick_gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    return vae, unet, text


def tokenizer(folder):
    """transformers' CLIP tokenizer, made from the merges in this folder."""
    import json

    from transformers import CLIPTokenizer

    merges = (HERE / "merges.txt").read_text("utf-8").splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(len(rest))]
    words = letters + [x + "</w>" for x in letters] + [m.replace(" ", "") for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = folder / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


# %% Training -------------------------------------------------------------------------------


class Stage:
    """Steps, time left, and a state on disk that is replaced only when the new one is complete."""

    def __init__(self, path, steps, modules, optimizer):
        self.path, self.steps, self.modules, self.optimizer = path, steps, modules, optimizer
        self.step, self.losses, self.start = 0, [], None
        if path.exists():
            import torch

            state = torch.load(path)
            for module, weights in zip(modules, state["modules"]):
                module.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"{path.stem}: resumed at step {self.step} of {steps}")

    def save(self):
        import torch

        state = {
            "modules": [m.state_dict() for m in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def tick(self, loss, every=50):
        self.start = self.start or (time.time(), self.step)
        self.step += 1
        self.losses.append(loss.item())
        if self.step % every == 0 or self.step == self.steps:
            pace = (time.time() - self.start[0]) / (self.step - self.start[1])
            left = pace * (self.steps - self.step) / 60
            mean = sum(self.losses) / len(self.losses)
            print(
                f"{self.path.stem}: step {self.step}/{self.steps}  loss {mean:.4f}  "
                f"{pace:.2f} s a step  {left:.0f} min left",
                flush=True,
            )
            self.losses = []
        if self.step % 500 == 0 or self.step == self.steps:
            self.save()


def rate(optimizer, step, steps, peak):
    """Warm up for 200 steps, then half a cosine down to a twentieth: the usual."""
    warm = min(1, (step + 1) / 200)
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * min(1, step / steps))) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * cosine


def train_vae(vae, pictures, folder, steps):
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    stage = Stage(folder / "vae.pt", steps, [vae], optimizer)
    while stage.step < steps:
        rng = np.random.default_rng(
            stage.step
        )  # so that a resumed run sees what it would have seen
        crops = []
        for i in rng.integers(0, len(pictures), 16):
            y, x = rng.integers(0, SIZE - 64 + 1, 2)
            crops.append(pictures[i, y : y + 64, x : x + 64])
        x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        rate(optimizer, stage.step, steps, 2e-3)
        torch.manual_seed(stage.step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        out = out.float()
        # Most pixels are sky and ground. Those that stand out from their row count more, and so do
        # edges: without the second term they are the last thing to become sharp.
        weight = 1 + 4 * (x - x.median(dim=3, keepdim=True).values).abs().mean(
            1, keepdim=True
        ).clamp(max=1)
        edges = F.l1_loss(out.diff(dim=2), x.diff(dim=2)) + F.l1_loss(
            out.diff(dim=3), x.diff(dim=3)
        )
        kl = posterior.kl().mean() / x[0].numel()
        loss = ((out - x).abs() * weight).mean() + edges + 1e-5 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        stage.tick(loss)


def encode_all(vae, pictures, folder):
    """Means and deviations of every picture's latent, in half precision, and their overall size."""
    import torch

    path = folder / "latents.npz"
    if not path.exists():
        found = []
        with torch.no_grad():
            for i in range(0, len(pictures), 32):
                x = torch.from_numpy(pictures[i : i + 32]).permute(0, 3, 1, 2).float() / 127.5 - 1
                d = vae.encode(x).latent_dist
                found.append(torch.stack([d.mean, d.std], 1))
                if i % 1600 == 0:
                    print(f"latents: {i} of {len(pictures)}", flush=True)
        found = torch.cat(found)
        out = vae.decode(found[:64, 0]).sample.clamp(-1, 1) / 2 + 0.5
        truth = torch.from_numpy(pictures[:64]).permute(0, 3, 1, 2) / 255
        print(f"vae: PSNR {-10 * math.log10((out - truth).square().mean().item()):.1f} dB")
        part = path.with_suffix(".part.npz")
        np.savez(part, latents=found.numpy())
        part.replace(path)
    return np.load(path)["latents"]


def scale_latents(vae, deviation):
    """Make the latents' deviation 1 / 0.18215, Stable Diffusion's own, inside the two 1x1 layers.

    0.18215 is what the original's first autoencoder happened to need. Keeping the number means that
    whoever multiplies by it, as every program for Stable Diffusion does, gets latents of size one.
    """
    import torch

    k = 1 / (0.18215 * deviation)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= k
        vae.quant_conv.bias[:4] *= k
        vae.quant_conv.bias[4:] += 2 * math.log(k)
        vae.post_quant_conv.weight /= k


def train_unet(unet, text, latents, ids, nothing, folder, steps, sample):
    """latents (N, 2, 4, 16, 16) of deviation one, ids (N, k, 77): k sentences for each picture."""
    import copy

    import torch

    parameters = [*unet.parameters(), *text.parameters()]
    ema_unet, ema_text = copy.deepcopy(unet), copy.deepcopy(text)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4, fused=True)
    stage = Stage(folder / "unet.pt", steps, [unet, text, ema_unet, ema_text], optimizer)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float()
    latents, ids = torch.from_numpy(latents), torch.from_numpy(ids)
    while stage.step < steps:
        torch.manual_seed(stage.step)
        rate(optimizer, stage.step, steps, 1e-3)
        i = torch.randint(len(latents), (32,))
        mean, deviation = latents[i].unbind(1)
        x0 = mean + deviation * torch.randn_like(mean)
        said = ids[i, torch.randint(ids.shape[1], (32,))]
        said = torch.where(torch.rand(32, 1) < 0.1, nothing, said)  # for guidance: without any
        # Half of the timesteps from the whole range, half from the noisiest third, where the ground
        # and the light are decided. Evenly spread: less noise in the loss.
        even = ((torch.arange(16) + torch.rand(2, 16)) / 16).clamp(max=0.999)
        t = torch.cat([even[0] * 1000, 667 + even[1] * 333]).long()
        a = abar[t][:, None, None, None]
        # A network can read the ground and the light off the noisy picture's average colours, for
        # over many places the noise averages out, and then it need not listen to the sentence. In
        # pure noise, where painting starts, those averages are random, and it would follow them. So
        # the noise is given random averages, too, one for each quarter ("offset noise").
        noise = torch.randn_like(x0)
        offset = 0.3 * torch.randn(32, 4, 2, 2)
        noise = noise + offset.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        eps = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text(said).last_hidden_state).sample
        snr = abar[t] / (1 - abar[t])
        weight = snr.clamp(max=5) / snr  # min-SNR [3]: the nearly clean ones are easy, and many
        loss = ((eps - noise).square().mean((1, 2, 3)) * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (1 + stage.step) / (10 + stage.step))
        with torch.no_grad():
            for slow, fast in ((ema_unet, unet), (ema_text, text)):
                for p, q in zip(slow.parameters(), fast.parameters()):
                    p.lerp_(q, 1 - decay)
        stage.tick(loss)
        if stage.step % 500 == 0 or stage.step == steps:
            sample(ema_unet, ema_text, folder / f"sample_{stage.step:06d}.png")
    return ema_unet, ema_text


SAMPLES = (
    "a red house", "a blue boat", "a green tree on the snow", "a yellow car at night",
    "a purple rocket at sunset", "an orange mushroom on the grass",
    "a red balloon on the sea by day", "a yellow flower on the sand at night",
)  # fmt: skip


def sampler(vae, words):
    """A function that paints the eight sentences above with diffusers, in 20 steps, as one file."""
    import torch
    from diffusers import PNDMScheduler

    def sample(unet, text, path):
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        )
        scheduler.set_timesteps(20)
        with torch.no_grad():
            context = text(torch.from_numpy(words(["", *SAMPLES]))).last_hidden_state
            context = torch.cat([context[:1].expand(8, -1, -1), context[1:]])
            x = torch.randn(8, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
            for t in scheduler.timesteps:
                nothing, something = unet(torch.cat([x, x]), t, context).sample.chunk(2)
                x = scheduler.step(
                    nothing + NUMBERS["cfg"] * (something - nothing), t, x
                ).prev_sample
            out = (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        out = (out.permute(0, 2, 3, 1).numpy() * 255 + 0.5).astype(np.uint8)
        Image.fromarray(
            out.reshape(2, 4, SIZE, SIZE, 3).swapaxes(1, 2).reshape(2 * SIZE, -1, 3)
        ).save(path)

    return sample


# %% The original's names -------------------------------------------------------------------
# diffusers gave every tensor a name of its own. These are the inverse of what its converter does.


def original_names(vae, unet, text):
    """-> {name in an original checkpoint: tensor}"""
    import re

    out = {}
    res = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    whole = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    for name, tensor in unet.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        parts = module.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            down, block, slot = parts[0] == "down_blocks", int(parts[1]), parts[2]
            layer = int(parts[3])
            if slot == "downsamplers":
                module = f"input_blocks.{3 * block + 3}.0.op"
            elif slot == "upsamplers":
                module = f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv"
            else:
                row = 3 * block + layer + (1 if down else 0)
                rest = ".".join(parts[4:])
                rest = res[rest] if slot == "resnets" else rest
                side = "input" if down else "output"
                module = f"{side}_blocks.{row}.{0 if slot == 'resnets' else 1}.{rest}"
        elif parts[0] == "mid_block":
            rest = ".".join(parts[3:])
            place = 2 * int(parts[2]) if parts[1] == "resnets" else 1
            module = f"middle_block.{place}.{res[rest] if parts[1] == 'resnets' else rest}"
        else:
            module = whole[module]
        out[f"model.diffusion_model.{module}.{leaf}"] = tensor
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(
            r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name
        )
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            side, rest = name.split(".mid_block.attentions.0.")
            rest, leaf = rest.rsplit(".", 1)
            name = f"{side}.mid.attn_1.{attention[rest]}.{leaf}"
            tensor = (
                tensor[:, :, None, None] if leaf == "weight" and rest != "group_norm" else tensor
            )
        out[f"first_stage_model.{name}"] = tensor
    for name, tensor in text.state_dict().items():
        name = name.removeprefix("text_model.")
        out[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Draw a picture-book world and train the miniature on it."
    )
    p.add_argument(
        "--folder",
        type=Path,
        default=HERE / "run",
        help="where all of it is kept (default: tiny/run)",
    )
    p.add_argument(
        "--pictures", type=int, default=12000, metavar="N", help="how many to draw (default: 12000)"
    )
    p.add_argument(
        "--vae-steps", type=int, default=5000, metavar="N", help="steps of 16 crops (default: 5000)"
    )
    p.add_argument(
        "--unet-steps",
        type=int,
        default=9000,
        metavar="N",
        help="steps of 32 pictures (default: 9000)",
    )
    p.add_argument(
        "--look",
        metavar="FILE",
        help="only draw 32 pictures into FILE, with their sentences printed",
    )
    args = p.parse_args(argv)
    if args.look:
        drawn = [draw(seed) for seed in range(32)]
        sheet = np.stack([np.asarray(image) for image, _ in drawn]).reshape(4, 8, SIZE, SIZE, 3)
        Image.fromarray(sheet.swapaxes(1, 2).reshape(4 * SIZE, 8 * SIZE, 3)).save(args.look)
        for seed, (_, facts) in enumerate(drawn):
            print(sentence(random.Random(seed), *facts))
        return

    import torch

    args.folder.mkdir(exist_ok=True)
    pictures, facts = draw_all(args.folder, args.pictures)
    torch.manual_seed(0)
    vae, unet, text = networks()
    train_vae(vae, pictures, args.folder, args.vae_steps)
    vae.requires_grad_(False)
    latents = encode_all(vae, pictures, args.folder)
    deviation = float(latents[:, 0].std())
    scale_latents(vae, deviation)
    latents = latents / deviation  # as vae.encode(...) * 0.18215 now gives them

    tok = tokenizer(args.folder)
    words = lambda texts: np.array(tok(texts, padding="max_length", truncation=True).input_ids)
    rng = random.Random(0)
    ids = words([sentence(rng, *f) for f in facts for _ in range(4)]).reshape(len(facts), 4, 77)
    sample = sampler(vae, words)
    nothing = torch.from_numpy(words([""]))
    unet, text = train_unet(unet, text, latents, ids, nothing, args.folder, args.unet_steps, sample)
    path = args.folder / "tiny.ckpt"
    torch.save({"state_dict": original_names(vae, unet, text), "sd_config": NUMBERS}, path)
    print(f"saved {path}. Now: python convert_weights.py {path} -o {HERE / 'tiny.safetensors'}")


if __name__ == "__main__":
    sys.exit(main())
