"""Another VAE than the model's own: one of the same kind, or a small one.

    sd = StableDiffusion("model.safetensors", changes=[other_vae("mse.flat.safetensors")])
    sd = with_tiny_vae(sd, "taesd.flat.safetensors")

TAESD (github.com/madebyollin/taesd) was trained to give what the VAE gives, by a network without
norms and attention, 34 times smaller: details are less true, and it takes a fraction of the time,
so that what is left of a picture in few steps is a matter of seconds on a CPU.
"""

import json
from dataclasses import replace

import mlx.core as mx
from mlx import nn

import sd


def read_kind(path):
    """-> "vae" or "tiny vae", or whatever else a flat file holds; None for no flat file."""
    try:
        return json.loads(sd.read_header(path).get("config", "{}")).get("kind")
    except (ValueError, AttributeError, RecursionError):  # read_flat will say what is wrong with it
        return None


def other_vae(path):
    """A change for StableDiffusion(changes=[...]). path: a flat file of a VAE, or of a whole model,
    of which the VAE is taken. Raises SDError.
    """

    def change(config, weights):
        whole = read_kind(path) == "model"
        told, vae = sd.read_flat(path, "model" if whole else "vae")
        told = {"vae": told.vae} if whole else told
        vae = {name: w for name, w in vae.items() if name.startswith("vae.") or not whole}
        rest = {name: w for name, w in weights.items() if not name.startswith("vae.")}
        try:
            config = replace(config, vae=told["vae"])
            config.check()
        except (LookupError, TypeError, ValueError) as problem:
            raise sd.SDError(f"{path} is of no use here: {problem}") from None
        return config, rest | vae

    return change


def relu(x):
    return mx.maximum(x, 0)


# x plus what three convolutions make of it, cut off below 0: (b, h, w, c) -> same.
class TinyBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = sd.Conv(c, c), sd.Conv(c, c), sd.Conv(c, c)

    def __call__(self, x):
        return relu(x + self.conv3(relu(self.conv2(relu(self.conv1(x))))))


class TinyVAE(nn.Module):
    """In the place of sd.VAE. Its latents are the UNet's own, so that its scale is 1."""

    def __init__(self, c=64):
        super().__init__()
        blocks = lambda: [TinyBlock(c) for _ in range(3)]
        # fmt: off
        self.encoder = [                                # after this row
            sd.Conv(3, c), TinyBlock(c),                # 512 x 512 x 64
            sd.Conv(c, c, stride=2), *blocks(),         # 256 x 256 x 64
            sd.Conv(c, c, stride=2), *blocks(),         # 128 x 128 x 64
            sd.Conv(c, c, stride=2), *blocks(),         #  64 x  64 x 64
            sd.Conv(c, 4),                              #  64 x  64 x  4
        ]
        self.decoder = [
            sd.Conv(4, c),                              #  64 x  64 x 64
            *blocks(), sd.Upsample(c),                  # 128 x 128 x 64
            *blocks(), sd.Upsample(c),                  # 256 x 256 x 64
            *blocks(), sd.Upsample(c),                  # 512 x 512 x 64
            TinyBlock(c), sd.Conv(c, 3),                # 512 x 512 x  3
        ]
        # fmt: on

    def encode(self, x):
        """Picture (b, 8h, 8w, 3) in [-1, 1] -> latents (b, h, w, 4); the log of no variance."""
        x = x / 2 + 0.5
        for layer in self.encoder:
            x = layer(x)
        return x, mx.full(x.shape, -30.0)

    def decode(self, x):
        """Latents (b, h, w, 4) -> picture (b, 8h, 8w, 3), mostly in [-1, 1]."""
        x = relu(self.decoder[0](3 * mx.tanh(x / 3)))  # what is far out is drawn in
        for layer in self.decoder[1:]:
            x = layer(x)
        return 2 * x - 1


def with_tiny_vae(model, path):
    """-> a StableDiffusion that has the same networks but for the VAE. Raises SDError."""
    told, weights = sd.read_flat(path, "tiny vae")
    sd.expect(sd.divides(1, told.get("channels")), f"{path}: channels", told, "a whole number")
    vae = TinyVAE(told["channels"])
    sd.load_weights(vae, weights, "vae")
    sd.accelerate(vae, mx.float32)
    config = replace(model.config, vae=model.config.vae | {"scale": 1.0})
    other = object.__new__(type(model))
    vars(other).update(vars(model), config=config, vae=vae)
    return other
