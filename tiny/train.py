"""Train the miniature: Stable Diffusion with small numbers, on pictures that world.py draws.

    pip install -e '.[test]'
    python tiny/train.py              four and a half hours on two cores; can be stopped and resumed
    python convert_weights.py tiny/run/tiny.ckpt -o tiny/tiny.safetensors

Four stages, each saved in tiny/run/ every 500 steps and resumed from there:

    vae     pictures <-> latents: an autoencoder, trained on 64 x 64 crops       [1]
    decoder its second half, trained further
    text    the text model learns to read: which things, colours ... does this sentence name?
    unet    the UNet, and the text model with it, on the latents of 40,000 pictures      [1, 2]

The networks are diffusers' and transformers' own classes, so that what sd.py paints with these
weights can be compared with what diffusers' pipeline paints. The checkpoint has the tensor names of
the original Stable Diffusion, and convert_weights.py reads it like any other.

[1] Rombach et al. 2022, arXiv 2112.10752   [2] Ho et al. 2020, 2006.11239 (the loss)
[3] Hang et al. 2023, 2303.09556 (min-SNR weights)
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import world
from world import SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VAE_PICTURES = 6000  # of the UNet's, the first
FIRST_ROUND = 10000  # steps of the UNet; then the learning rate begins anew
END = 49407  # CLIP's end mark, and its padding

# What the tensors' shapes do not tell the converter; stored in the checkpoint beside them.
NUMBERS = {
    "name": "the miniature",
    "size": SIZE,
    "cfg": 2.0,
    "text": {"heads": 4},
    "unet": {"heads": [2, 2, 2, 2], "groups": 16},
    "vae": {"groups": 8},
}

# %% The networks ----------------------------------------------------------------------------------
# Stable Diffusion 1.x with small numbers: 7.6 million parameters, of which 2.0 are the vectors of
# the text model's 49,408 tokens (nearly all never seen in training), and 1.3 the autoencoder.


def networks():
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
        attention_head_dim=tuple(NUMBERS["unet"]["heads"]),  # so diffusers calls their number
        norm_num_groups=NUMBERS["unet"]["groups"],
        cross_attention_dim=40,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=40,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=NUMBERS["text"]["heads"],
            hidden_act="quick_gelu",
            bos_token_id=END - 1,
            eos_token_id=END,
            pad_token_id=END,
        )
    )
    return vae, unet, text


def tokenizer(folder):
    """transformers' CLIP tokenizer, made from the merges in this folder."""
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


# %% Pictures --------------------------------------------------------------------------------------


def scene_of(seed):
    return world.random_scene(random.Random(seed))


def drawn(seed):
    """Picture number seed, with the same seed's scene: (128, 128, 3)."""
    return np.asarray(world.draw(scene_of(seed), seed))


def mark():
    """A digest of the pictures. When it changes, what was trained on them must be trained anew."""
    return hashlib.sha256(b"".join(drawn(seed).tobytes() for seed in range(32))).hexdigest()[:16]


def to_torch(pictures):
    """(n, h, w, 3) in 0 ... 255 -> (n, 3, h, w) in [-1, 1]"""
    x = torch.from_numpy(np.asarray(pictures)).to(DEVICE)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


# %% Training --------------------------------------------------------------------------------------


def usual(peak, steps):
    """Learning rate: warm up for 200 steps, stay, and fall to 0 in the last fifth."""
    return lambda step: peak * min(1, (step + 1) / 200, 5 * (1 - step / steps))


def two_rounds(first, steps):
    """The UNet's: falls to 0 from the middle of the first round on; then once more, from 7e-4."""

    def rate(step):
        if step < first:
            return 1e-3 * min(1, (step + 1) / 200, 2 * (1 - step / first))
        return 7e-4 * min((step - first + 1) / 200, (steps - step) / (steps - first))

    return rate


class Stage:
    """Counts steps, tells the time left, and keeps a state on disk, replaced when complete."""

    def __init__(self, path, steps, rate, modules):
        self.path, self.steps, self.rate, self.modules = path, steps, rate, modules
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=1e-4, fused=True)
        self.step, self.losses = 0, []
        if path.exists():
            state = torch.load(path, map_location=DEVICE)
            for module, weights in zip(modules, state["modules"]):
                module.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            print(f"{path.stem}: resumed at step {self.step} of {steps}")

    def save(self):
        state = {
            "modules": [m.state_dict() for m in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def left(self):
        """Steps still to do. Each is seeded, so that a resumed run goes on as if never stopped."""
        self.start = time.time(), self.step
        while self.step < self.steps:
            torch.manual_seed(self.step)
            yield self.step
            if self.step % 500 == 0 or self.step == self.steps:
                self.save()

    def learn(self, loss):
        """One step of AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.detach())
        if self.step % 100 == 0 or self.step == self.steps:
            pace = (time.time() - self.start[0]) / (self.step - self.start[1])
            print(
                f"{self.path.stem}: step {self.step}/{self.steps}  "
                f"loss {torch.stack(self.losses).mean():.4f}  {pace:.2f} s a step  "
                f"{pace * (self.steps - self.step) / 60:.0f} min left",
                flush=True,
            )
            self.losses = []


def train_vae(vae, stage, pool, count, noise=0.0):
    """noise: the largest standard deviation of the noise that is added to the latents."""
    if stage.step >= stage.steps:
        return
    pictures = np.stack(pool.map(drawn, range(min(count, VAE_PICTURES)), chunksize=64))
    for step in stage.left():
        rng = np.random.default_rng(step)
        crops = []
        for i in rng.integers(0, len(pictures), 16):
            y, x = rng.integers(0, SIZE - 64 + 1, 2)
            crops.append(pictures[i, y : y + 64, x : x + 64])
        x = to_torch(np.stack(crops))
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        strength = noise * torch.rand(len(z), 1, 1, 1)
        off = strength * (torch.randn(z.shape) + torch.randn(*z.shape[:2], 1, 1))
        out = vae.decode(z + off.to(DEVICE)).sample
        # Most pixels are sky and ground. Those that stand out from their row count more, and edges
        # have a term of their own, since otherwise they would be the last to become sharp.
        row = x.median(dim=3, keepdim=True).values
        weight = 1 + 4 * (x - row).abs().mean(1, keepdim=True).clamp(max=1)
        edges = sum(F.l1_loss(out.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        error = out - x
        kl = posterior.kl().mean() / x[0].numel()
        loss = (error.abs() * weight).mean() + 4 * error.square().mean() + edges + 1e-5 * kl
        stage.learn(loss)


def train_decoder(vae, folder, steps, pool, count, deviation):
    """Train the decoder alone, further. The latents, which the UNet learns from, stay as they are,
    so this can be repeated at any time; Stable Diffusion's later decoders were made so, too.

    It learns to tolerate errors. The UNet's latents are off by a tenth of their standard deviation
    here and there, of which the first stage's decoder makes pink spots on yellow sand.
    """
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    stage = Stage(folder / "decoder.pt", steps, usual(1e-3, steps), [decoder])
    train_vae(vae, stage, pool, count, noise=0.2 * deviation)
    vae.requires_grad_(False)


@torch.no_grad()
def encode_all(vae, folder, count, pool):
    """-> (count, 4, 16, 16): the means of the latents of pictures 0, 1 ... in half precision."""
    path = folder / f"latents_{count}.npy"
    if not path.exists():
        found = []
        for i in range(0, count, 500):
            pictures = np.stack(pool.map(drawn, range(i, min(i + 500, count)), chunksize=50))
            for part in np.array_split(pictures, -(-len(pictures) // 50)):
                found.append(vae.encode(to_torch(part)).latent_dist.mean.half().cpu())
            print(f"latents: {i + len(pictures)} of {count}", flush=True)
        part = path.with_suffix(".part.npy")
        np.save(part, torch.cat(found).numpy())
        part.replace(path)
    return np.load(path)


@torch.no_grad()
def psnr(vae, pool, first):
    """In dB, the mean over 200 pictures that it was not trained on."""
    pictures = to_torch(np.stack(pool.map(drawn, range(first, first + 200))))
    out = torch.cat([vae(part).sample for part in pictures.split(50)]).clamp(-1, 1)
    error = ((out - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def scale_latents(vae, deviation):
    """Make the latents' standard deviation 1 / 0.18215, as Stable Diffusion's, in two 1 x 1 layers.

    The original's authors measured that number once, on one batch of training pictures. With the
    same number here, every program for Stable Diffusion, which multiplies by it, gets latents of
    variance 1.
    """
    k = 1 / (0.18215 * deviation)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= k
        vae.quant_conv.bias[:4] *= k
        vae.quant_conv.bias[4:] += 2 * math.log(k)
        vae.post_quant_conv.weight /= k


def facts(scene):
    """A scene in numbers: three things, three colours, ground, time, layout, count, size."""
    things = [list(world.THINGS).index(t) for t, _ in scene.things]
    colours = [list(world.COLOURS).index(c) for _, c in scene.things]
    nothing = 3 - len(things)
    return [
        *things, *[len(world.THINGS)] * nothing, *colours, *[len(world.COLOURS)] * nothing,
        list(world.GROUNDS).index(scene.ground), list(world.TIMES).index(scene.time),
        ("one", "row", "behind").index(scene.layout), scene.count,
        ("", "big", "small").index(scene.size),
    ]  # fmt: skip


def train_text(text, words, folder, steps):
    """The text model learns what sentences say, before the UNet is trained with it.

    Stable Diffusion's text model had learned that from CLIP's pictures and their captions. Here one
    linear layer has to read the facts off its vectors, at the end mark and at some positions behind
    it. (It cannot be right about what the sentence leaves out.) Otherwise the UNet would have to
    teach it, through noise, what words mean and which belongs to which ("a red house and a blue
    boat").
    """
    sizes = [len(world.THINGS) + 1] * 3 + [len(world.COLOURS) + 1] * 3  # + 1: there are fewer
    sizes += [len(world.GROUNDS), len(world.TIMES), 3, 4, 3]  # layout, count (1 to 3), size
    torch.manual_seed(0)
    ask = torch.nn.Linear(text.config.hidden_size, sum(sizes)).to(DEVICE)
    stage = Stage(folder / "text.pt", steps, usual(2e-3, steps), [text, ask])
    for step in stage.left():
        rng = random.Random(step)
        scenes = [world.random_scene(rng) for _ in range(128)]
        ids = words([world.sentence(rng, s) for s in scenes])
        longest = int((ids != END).sum(1).max()) + 8
        answers = ask(text(ids[:, :longest]).last_hidden_state)
        behind = ids[:, :longest] == END
        truth = torch.tensor([facts(s) for s in scenes], device=DEVICE)
        loss = 0
        for answer, right in zip(answers.split(sizes, dim=2), truth.T):
            right = right[:, None].expand(-1, longest)
            each = F.cross_entropy(answer.transpose(1, 2), right, reduction="none")
            loss = loss + (each * behind).sum() / behind.sum()
        stage.learn(loss)


def train_unet(unet, text, latents, words, folder, steps, sample):
    """latents: (count, 4, 16, 16), of standard deviation 1; number i is that of scene_of(i)."""
    slow = [copy.deepcopy(unet), copy.deepcopy(text)]  # averages of the weights (EMA)
    for module in slow:
        module.requires_grad_(False)
    first_round = min(FIRST_ROUND, steps // 2)
    rate = two_rounds(first_round, steps)
    stage = Stage(folder / "unet.pt", steps, rate, [unet, text, *slow])
    cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    half = torch.autocast(DEVICE, torch.bfloat16, DEVICE == "cuda" or cpu)  # where there is such
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float().to(DEVICE)
    scenes = [scene_of(i) for i in range(len(latents))]
    latents = torch.from_numpy(latents).to(DEVICE)
    batch = 32
    unet.to(memory_format=torch.channels_last)
    if DEVICE == "cpu":  # where PyTorch's fused attention is slower: 0.62 s a step, this way 0.48
        unet.set_attn_processor(AttnProcessor())
        text.set_attn_implementation("eager")
    for step in stage.left():
        rng = random.Random(step)
        some = [rng.randrange(len(scenes)) for _ in range(batch)]
        x0 = latents[some].float()
        # A tenth has no sentence, for guidance.
        said = ["" if rng.random() < 0.1 else world.sentence(rng, scenes[i]) for i in some]
        # Timesteps are evenly spread, which makes the loss less noisy. At first half of them are in
        # the noisiest third, where the ground and the light are decided; later come the shapes.
        even = (torch.arange(batch // 2) + torch.rand(2, batch // 2)) / (batch // 2)
        first, range_ = (667, 333) if step < first_round // 4 else (0, 1000)
        t = torch.cat([even[0] * 1000, first + even[1] * range_]).long().clamp(max=999).to(DEVICE)
        a = abar[t][:, None, None, None]
        # A network can read the ground and the light off the noisy picture's average colours, since
        # over many positions the noise averages out; then it need not use the sentence. In pure
        # noise, where painting starts, those averages are random, and it would follow them. So the
        # noise gets random averages, too, one for each quarter ("offset noise"). Painting begins
        # without these, with averages near 0, which a network that is used to strong ones takes for
        # neither dark nor bright: whatever the sentence leaves open becomes rain. So, once it has
        # learned to use the sentence, they become weak.
        strength = 0.3 if step < first_round else 0.1
        noise, offset = torch.randn(x0.shape), strength * torch.randn(batch, 4, 2, 2)
        noise = (noise + offset.repeat_interleave(8, 2).repeat_interleave(8, 3)).to(DEVICE)
        with half:
            context = text(words(said)).last_hidden_state
            x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
            eps = unet(x, t, context).sample
        # min-SNR [3]: nearly clean latents are easy, and many, and get less weight. Where nearly
        # all is noise, eps hardly tells whether x0 is right: up to ten times the weight.
        snr = abar[t] / (1 - abar[t])
        weight = snr.clamp(0.05, 5) / snr
        loss = ((eps.float() - noise).square().mean((1, 2, 3)) * weight).mean()
        stage.learn(loss)
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, now in zip(slow, (unet, text)):
                for p, q in zip(average.parameters(), now.parameters()):
                    p.lerp_(q, 1 - decay)
        if stage.step % 1000 == 0 or stage.step == steps:
            sample(*slow, folder / f"sample_{stage.step:06d}.png")
    return slow


SAMPLES = (
    "a red house", "a blue boat at sea", "a green tree on the snow", "a yellow car at night",
    "a purple rocket at sunset", "a white cat in the rain", "a black duck on the street",
    "a pink umbrella on the beach by day", "a red apple and a blue cup",
    "a brown castle on the grass and an orange balloon", "two yellow stars at night",
    "a green fish in front of a red mushroom",
)  # fmt: skip


def sampler(vae, words):
    """-> a function that paints the twelve sentences with diffusers in 20 steps, into one file."""

    @torch.no_grad()
    def sample(unet, text, path):
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        )
        scheduler.set_timesteps(20)
        n = len(SAMPLES)
        context = text(words(["", *SAMPLES])).last_hidden_state
        context = torch.cat([context[:1].expand(n, -1, -1), context[1:]])
        x = torch.randn(n, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
        x = x.to(DEVICE)
        for t in scheduler.timesteps:
            nothing, something = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            eps = nothing + NUMBERS["cfg"] * (something - nothing)
            x = scheduler.step(eps, t, x).prev_sample
        out = (vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        out = (out.permute(0, 2, 3, 1).cpu().numpy() * 255 + 0.5).astype(np.uint8)
        sheet = out.reshape(2, n // 2, SIZE, SIZE, 3).swapaxes(1, 2)
        Image.fromarray(sheet.reshape(2 * SIZE, -1, 3)).save(path)

    return sample


# %% The original's names --------------------------------------------------------------------------
# diffusers renamed every tensor. This is the inverse of what its converter does.


def original_names(vae, unet, text):
    """-> {name in an original checkpoint: tensor}"""
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
    p = argparse.ArgumentParser(description="Train the miniature on pictures that world.py draws.")
    # fmt: off
    p.add_argument("--folder", type=world.folder, default=str(HERE / "run"),
                   help="where all of it is kept (default: tiny/run)")
    p.add_argument("--pictures", type=int, default=40000, metavar="N",
                   help="how many the UNet learns from (default: 40000)")
    p.add_argument("--vae-steps", type=int, default=8000, metavar="N",
                   help="steps of 16 crops (default: 8000)")
    p.add_argument("--decoder-steps", type=int, default=7000, metavar="N",
                   help="more such steps of the decoder (default: 7000)")
    p.add_argument("--text-steps", type=int, default=4000, metavar="N",
                   help="steps of 128 sentences (default: 4000)")
    p.add_argument("--unet-steps", type=int, default=22000, metavar="N",
                   help="steps of 32 pictures (default: 22000)")
    # fmt: on
    args = p.parse_args(argv)
    if args.pictures < 1:
        p.error(f"--pictures must be at least 1, got {args.pictures}")
    made = {"world": mark(), "pictures": args.pictures, "vae_steps": args.vae_steps}
    note = args.folder / "made.json"
    if note.exists() and json.loads(note.read_text()) != made:
        sys.exit(
            f"{args.folder} was begun with other pictures or --vae-steps. Try another --folder."
        )
    note.write_text(json.dumps(made))
    torch.manual_seed(0)
    vae, unet, text = (network.to(DEVICE) for network in networks())
    with multiprocessing.get_context("spawn").Pool() as pool:
        rate = usual(2e-3, args.vae_steps)
        stage = Stage(args.folder / "vae.pt", args.vae_steps, rate, [vae])
        train_vae(vae, stage, pool, args.pictures)
        latents = encode_all(vae, args.folder, args.pictures, pool)
        deviation = float(latents.astype(np.float32).std())
        train_decoder(vae, args.folder, args.decoder_steps, pool, args.pictures, deviation)
        print(f"vae: PSNR {psnr(vae, pool, args.pictures):.1f} dB on 200 new pictures", flush=True)
    scale_latents(vae, deviation)
    latents = latents / np.float16(deviation)  # as vae.encode(...) * 0.18215 now gives them

    tok = tokenizer(args.folder)

    def words(texts):
        return torch.tensor(tok(texts, padding="max_length", truncation=True).input_ids).to(DEVICE)

    train_text(text, words, args.folder, args.text_steps)
    unet, text = train_unet(
        unet, text, latents, words, args.folder, args.unet_steps, sampler(vae, words)
    )
    path = args.folder / "tiny.ckpt"
    vae, unet, text = (network.cpu() for network in (vae, unet, text))
    torch.save({"state_dict": original_names(vae, unet, text), "sd_config": NUMBERS}, path)
    print(f"saved {path}. Now: python convert_weights.py {path} -o {HERE / 'tiny.safetensors'}")


if __name__ == "__main__":
    main()
