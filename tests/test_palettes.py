"""Palettes: the best tables, exactly what was packed, and a check that notices what is wrong."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.torch import save_file

import convert_weights
import sd
from sd_more import check, palettes
from sd_more.fast import kernels
from sd_more.fast.palettes import Packed, Palettised
from sd_more.formats.palettes import BITS, best_table, histogram, may_have, pack, palettise, places
from sd_more.low_memory import LowMemory
from tests.reference import assert_close, kohya_names, last, quiet, write_file

RNG = np.random.default_rng(5)

# %% Tables ----------------------------------------------------------------------------------------

WEIGHTS = {
    "normal": RNG.standard_normal(1500) * 0.03,
    "with outliers": RNG.standard_t(3, 1200) * 0.02,
    "peaked": RNG.laplace(size=1300) * 0.05,
    "in two heaps": np.r_[RNG.normal(0, 0.01, 600), RNG.normal(0.3, 0.01, 600)],
    "of few values": RNG.integers(-40, 40, 2000) / 64,
    "all on one side": RNG.exponential(size=1000),
}


def exact(x, counts, k):
    """The least squared error of k numbers, by the whole table of dynamic programming."""
    n, s1, s2 = (
        np.concatenate([[0], np.cumsum(counts * x**power, dtype=np.float64)]) for power in range(3)
    )
    i, j = np.triu_indices(len(x) + 1, 1)
    costs = np.full((len(x) + 1, len(x) + 1), np.inf)
    costs[i, j] = s2[j] - s2[i] - (s1[j] - s1[i]) ** 2 / (n[j] - n[i])
    np.fill_diagonal(costs, 0)
    best = costs[0]
    for _ in range(k - 1):
        best = (best[:, None] + costs).min(0)
    return max(best[-1], 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_table_of_that_length_has_a_smaller_error(kind, bits):
    _, x, counts = histogram(WEIGHTS[kind].astype(np.float16))
    table = best_table(x, counts, 1 << bits)
    assert table.shape == (1 << bits,) and (np.diff(table) >= 0).all()
    error = (counts * (x - table[places(table, x)]) ** 2).sum()
    assert error <= 1.001 * exact(x, counts, 1 << bits) + 1e-12


def test_few_values_are_kept_as_they_are():
    weights = RNG.choice(np.array([-0.5, 0.25, 3], np.float16), (16, 8))
    for bits in BITS:
        indices, table = palettise(weights, bits)
        np.testing.assert_array_equal(table[indices], weights.astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
def test_each_weight_gets_the_nearest_number_of_the_table(bits):
    weights = WEIGHTS["normal"].astype(np.float16).reshape(3, -1)
    indices, table = palettise(weights, bits)
    nearest = np.abs(weights[..., None].astype(np.float64) - table).min(-1)
    assert_close(np.abs(table[indices] - weights), nearest, 1e-6)


# %% Packed ----------------------------------------------------------------------------------------

SHAPES = [(8, 8), (5, 40), (3, 3, 3, 16), (640, 64), (64, 3, 3, 320)]


def packed(shape, bits):
    """-> weights as they are when looked up; packed; table"""
    table = np.sort(RNG.standard_normal(1 << bits).astype(np.float32)) / math.sqrt(shape[-1])
    indices = RNG.integers(0, 1 << bits, shape, np.uint8)
    return table[indices], pack(indices, bits), table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_was_packed_is_looked_up_again(shape, bits):
    weights, small, table = packed(shape, bits)
    assert small.size * 8 == weights.size * bits
    whole = Palettised("w", mx.array(small), mx.array(table))
    assert (whole.shape, whole.ndim, whole.dtype) == (shape, len(shape), mx.float32)
    np.testing.assert_array_equal(whole.astype(mx.float32), weights)
    np.testing.assert_array_equal(whole.astype(mx.float16), weights.astype(np.float16))
    np.testing.assert_array_equal(whole / 2, weights / 2)
    for_numpy = Packed.of(small, table)
    assert for_numpy.shape == shape and len(for_numpy) == shape[0]
    np.testing.assert_array_equal(for_numpy[slice(1, 3)], weights[1:3])
    np.testing.assert_array_equal(
        for_numpy.reshape(shape[0], -1)[slice(0, None)], weights.reshape(shape[0], -1)
    )


LAYERS = {  # a layer, and the shape of what it gets: all ways that kernels.py has
    "linear": (lambda: sd.Linear(64, 640), (300, 64)),
    "few rows": (lambda: sd.Linear(64, 640), (3, 64)),
    "more than 2560 columns": (lambda: sd.Linear(5120, 64), (100, 5120)),
    "geglu": (lambda: sd.GEGLU(64, 1280), (300, 64)),
    "winograd, filters first": (lambda: sd.Conv(64, 64), (1, 64, 64, 64)),
    "winograd, tiles first": (lambda: sd.Conv(64, 320), (2, 16, 16, 64)),
    "winograd, of few positions": (lambda: sd.Conv(320, 320), (2, 8, 8, 320)),
    "a convolution by windows": (lambda: sd.Conv(64, 64), (1, 9, 7, 64)),
    "with a stride": (lambda: sd.Downsample(64, 1), (1, 16, 16, 64)),
    "upsample": (lambda: sd.Upsample(64), (1, 8, 8, 64)),
}


@pytest.mark.parametrize("little", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_packed_weights_is_the_one_with_these_weights(kind, bits, little, monkeypatch):
    monkeypatch.setattr(kernels, "little", lambda: little)
    make, shape = LAYERS[kind]
    both = []
    for as_packed in (True, False):
        whole = sd.nn.Module()
        whole.layer = make()
        parameters = dict(tree_flatten(whole.parameters()))
        name = next(n for n in parameters if n.endswith("weight"))
        weights, small, table = small_weights(parameters[name].shape, bits)
        weight = Palettised(name, small, table) if as_packed else weights
        sd.load_weights(
            whole, {f"x.{n}": p for n, p in parameters.items()} | {f"x.{name}": weight}, "x"
        )
        sd.accelerate(whole, mx.float32)
        both.append(
            whole.layer(mx.array(np.random.default_rng(1).standard_normal(shape, np.float32)))
        )
        kept = [n for n, _ in tree_flatten(whole.parameters()) if n.endswith("palette")]
        assert len(kept) == as_packed
    np.testing.assert_array_equal(*both)


def small_weights(shape, bits):
    rng = np.random.default_rng(2)
    table = np.sort(rng.standard_normal(1 << bits).astype(np.float32)) / 30
    indices = rng.integers(0, 1 << bits, shape, np.uint8)
    return mx.array(table[indices]), mx.array(pack(indices, bits)), mx.array(table)


# %% Whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """{bits: the miniature with palettes}"""
    folder = tmp_path_factory.mktemp("palettes")
    return {
        bits: convert_weights.convert(sd.TINY, folder / f"{bits}", bits=bits, log=quiet)
        for bits in (4, 6)
    }


def unpacked(path, to):
    """The same file without palettes, in float32."""
    weights = sd.read_flat(path)[1]
    plain = {n: w.astype(mx.float32) if n in packed_names(path) else w for n, w in weights.items()}
    mx.save_safetensors(str(to), plain, sd.read_header(path))
    return to


def packed_names(path):
    return {n for n, w in sd.read_flat(path)[1].items() if isinstance(w, Palettised)}


def test_palettes_are_for_the_large_matrices_alone(smaller):
    names = packed_names(smaller[6])
    _, plain = sd.read_flat(sd.TINY)
    assert names == {n for n, w in plain.items() if may_have(n, w.shape)}
    assert {n.split(".")[0] for n in names} == {"text_encoder", "unet"}
    assert not any("embedding" in n or "norm" in n or n.endswith("bias") for n in names)
    for name, w in sd.read_flat(smaller[6])[1].items():
        if name not in names:
            np.testing.assert_array_equal(w, plain[name])
    assert sd.read_header(smaller[6])["format"] == "sd.py 2"
    sizes = [path.stat().st_size for path in (*smaller.values(), sd.TINY)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


@pytest.mark.parametrize("kind", [sd.StableDiffusion, LowMemory])
def test_the_picture_is_that_of_the_looked_up_weights(smaller, tmp_path, kind):
    options = {"seed": 7, "steps": 3, "cfg": 3}
    plain = kind(unpacked(smaller[6], tmp_path / "plain.safetensors"))
    x = last(plain.generate_latents("a red house", **options))
    np.testing.assert_array_equal(
        last(kind(smaller[6]).generate_latents("a red house", **options)), x
    )


def test_plain_layers_and_16_bits_look_up_when_loaded(smaller, tiny):
    options = {"seed": 7, "steps": 2}
    x = last(sd.StableDiffusion(smaller[6]).generate_latents("a red house", **options))
    plain = sd.StableDiffusion(smaller[6], fast=False)
    assert all(n != "palette" for n, _ in tree_flatten(plain.unet.parameters()))
    assert_close(last(plain.generate_latents("a red house", **options)), x, 1e-4)
    half = sd.StableDiffusion(smaller[6], dtype="float16")
    assert half.unet.conv_out.weight.dtype == mx.float16


def test_a_lora_is_merged_into_what_is_packed(smaller, flat_lora, tmp_path):
    changes = (sd.lora(flat_lora, 0.8),)
    options = {"seed": 7, "steps": 2}
    weights = changes[0](*sd.read_flat(smaller[6]))[1]
    touched = {n for n in packed_names(smaller[6]) if not isinstance(weights[n], Palettised)}
    assert touched and {weights[n].dtype for n in touched} == {mx.float16}
    x = last(sd.StableDiffusion(smaller[6], changes=changes).generate_latents("a house", **options))
    path = unpacked(smaller[6], tmp_path / "plain.safetensors")
    y = last(sd.StableDiffusion(path, changes=changes).generate_latents("a house", **options))
    assert_close(x, y, 5e-3)  # the touched ones are rounded to 11 bits


def test_a_change_may_compute_with_what_is_packed(smaller):
    last_layer = "unet.conv_out.weight"

    def doubtful(config, weights):
        return config, weights | {last_layer: weights[last_layer] / 2}

    assert last_layer in packed_names(smaller[6]) or "too small"
    sd.StableDiffusion(smaller[6], changes=[doubtful]).txt2img("a house", steps=1)


def test_a_controlnet_may_be_packed(control, tmp_path, drawn):
    path = convert_weights.convert(control.path, tmp_path / "small", bits=8, log=quiet)
    assert path.stat().st_size < control.path.stat().st_size
    pictures = [sd.ControlNet(each) for each in (control.path, path)]
    hint = mx.array(np.asarray(drawn, np.float32)[None] / 255)
    x, context = mx.zeros((1, 16, 16, 4)), mx.ones((1, 77, pictures[0].unet["context_width"]))
    full, small = (net.network(x, 500, context, net.network.look(hint)) for net in pictures)
    for a, b in zip(full, small):
        assert check.psnr(np.array(b), np.array(a)) > 30


def sizes(bits):
    """The size in GiB of Stable Diffusion 1.5 with palettes: of each tensor, and its table."""
    text = sd.TextEncoder(768, 12, 12, "quick_gelu", 49408)
    networks = {
        "text_encoder": text,
        "unet": sd.UNet([320, 640, 1280, 1280], [8] * 4, 32, 768),
        "vae": sd.VAE([128, 256, 512, 512], 32),
    }
    total = 0
    for network, parameters in networks.items():
        for name, p in tree_flatten(parameters.parameters()):
            packed = may_have(f"{network}.{name}", p.shape)
            total += p.size * bits // 8 + 4 * 2**bits if packed else 2 * p.size
    return total / 2**30


@pytest.mark.parametrize("bits, most", [(8, 1.15), (6, 0.9), (4, 0.7), (2, 0.45)])
def test_files_of_1_5_are_small(bits, most):
    assert sizes(bits) < most


# %% Check -----------------------------------------------------------------------------------------


def said_by(source, output, **options):
    lines = []
    convert_weights.convert(source, output, check=True, log=lines.append, **options)
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["1.x", "2.x", "folder"])
def test_a_conversion_is_compared_with_diffusers(kind, weights, weights_v2, folder, tmp_path):
    source = folder
    if kind != "folder":
        source = tmp_path / "model.safetensors"
        save_file(weights if kind == "1.x" else weights_v2, source)
    said = said_by(source, tmp_path / "out", dtype="float32")
    found = [line for line in said.splitlines() if "dB against diffusers" in line]
    assert [line.split(":")[0] for line in found] == [*check.NETWORKS["model"]]
    assert min(float(line.split()[1]) for line in found) > 90


def test_a_controlnet_is_compared_with_diffusers(controlnet, tmp_path):
    controlnet.save_pretrained(tmp_path / "net")
    said = said_by(tmp_path / "net", tmp_path / "out", dtype="float32")
    assert "controlnet: " in said and "against diffusers" in said


@pytest.mark.parametrize("how", ["turned round", "too large"])
def test_a_wrong_tensor_is_named_and_nothing_is_left(how, weights, tmp_path, monkeypatch):
    """As if the converter had a mistake: one tensor is another one; one is not what was read."""
    save_file(weights, tmp_path / "model.safetensors")
    wrong = {"turned round": "unet.middle.1.attn2.to_k.weight", "too large": "unet.conv_out.weight"}
    make = convert_weights.make_array

    def mistaken(spec, *rest):
        array = make(spec, *rest)
        if spec.flat != wrong[how]:
            return array
        return np.flip(array).copy() if how == "turned round" else array * np.float16(1.5)

    said = {"turned round": "{} is not what it is in", "too large": "unet: .*worst tensor is {}"}
    monkeypatch.setattr(convert_weights, "make_array", mistaken)
    with pytest.raises(sd.SDError, match=said[how].format(wrong[how])):
        said_by(tmp_path / "model.safetensors", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_has_no_network_of_its_own_is_compared_tensor_by_tensor(lora, tmp_path):
    save_file(kohya_names(lora), tmp_path / "lora.safetensors")
    said = said_by(tmp_path / "lora.safetensors", tmp_path / "out")
    assert "tensors, the worst is" in said


def test_palettes_that_are_too_poor_are_an_error(tmp_path):
    with pytest.raises(sd.SDError, match="less than 35"):
        said_by(sd.TINY, tmp_path / "out", bits=2)
    assert not [*tmp_path.iterdir()]
    said = said_by(sd.TINY, tmp_path / "out", bits=4)
    assert "unet: " in said and "against sd.py's plain layers" in said


def test_psnr_is_apples():
    a, b = RNG.standard_normal((2, 1000))
    noise = math.sqrt(((a - b) ** 2).mean())
    assert math.isclose(check.psnr(a, b), 20 * math.log10(np.abs(b).max() / noise))
    assert check.psnr(a, a) == math.inf and check.psnr(a, a * np.nan) == -math.inf


# %% As few bits as are enough ---------------------------------------------------------------------


def text_encoder(path):
    """-> what the text encoder of a flat file answers"""
    config = json.loads(sd.read_header(path)["config"])
    weights = sd.read_flat(path)[1]
    network = check.build("text_encoder", config, weights)
    return check.ask("text_encoder", network, *check.inputs("text_encoder", config))


def test_auto_keeps_the_floor_with_fewer_bits_where_it_is_lower(tmp_path, monkeypatch):
    """Of the text encoder alone, for speed."""
    find = palettes.find_weights

    def find_text(plain):
        tensors, may, metadata = find(plain)
        return tensors, [name for name in may if name.startswith("text_encoder")], metadata

    monkeypatch.setattr(palettes, "find_weights", find_text)
    sizes, truth = [], text_encoder(sd.TINY)
    for floor in (32, 45):
        path = convert_weights.convert(
            sd.TINY, tmp_path / f"{floor}", bits="auto", min_psnr=floor, log=quiet
        )
        assert floor <= check.psnr(text_encoder(path), truth) < floor + 10
        bits = {w.bits for w in sd.read_flat(path)[1].values() if isinstance(w, Palettised)}
        assert len(bits) > 1
        sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1] < sd.TINY.stat().st_size


def test_the_cheapest_steps_come_first():
    errors = {
        "calm": {16: 0, 8: 0, 6: 0, 4: 1, 2: 5},
        "wild": {16: 0, 8: 2, 6: 20, 4: 200, 2: 2000},
        "large": {16: 0, 8: 1, 6: 2, 4: 3, 2: 4},
    }
    sizes = {"calm": 10, "wild": 10, "large": 1000}
    assert palettes.spend(errors, sizes, 0) == {"calm": 6}
    assert palettes.spend(errors, sizes, 4) == {"calm": 6, "large": 2}
    assert palettes.spend(errors, sizes, 9.5) == {"calm": 4, "wild": 8, "large": 2}
    assert palettes.spend(errors, sizes, 11) == {"calm": 2, "wild": 8, "large": 2}


# %% What is wrong ---------------------------------------------------------------------------------


def test_palettes_of_what_has_none_are_refused(lora, tmp_path, refused, smaller):
    save_file(kohya_names(lora), tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "palettes are for models", options=["--bits", 6])
    refused(smaller[6], "it has palettes already", options=["--bits", 4])
    refused(sd.TINY, "bits must be 2, 4, 6, 8 or auto", "5", options=["--bits", 5])
    refused(sd.TINY, "min_psnr", options=["--bits", "auto", "--min-psnr", "nan"])
    refused(sd.TINY, "only --bits and --check", options=["--bits", 4, "--prediction", "v"])
    flat = shutil.copy(sd.TINY, tmp_path / "flat.safetensors")
    refused(flat, "is what is being converted", options=["--bits", 6, "-o", flat])


NAME = "unet.down.1.0.conv1.weight"


@pytest.mark.parametrize(
    "what, change",
    {
        "the palette of": lambda w: {f"{NAME}.palette": w[f"{NAME}.palette"][:50]},
        "of type": lambda w: {f"{NAME}.palette": w[f"{NAME}.palette"].astype(mx.int32)},
        "no indices": lambda w: {NAME: w[NAME].astype(mx.float16)},
        "tensors of the unet do not fit": lambda w: {NAME: w[NAME][:, :, :, :6]},
        "has a palette, but": lambda w: {"unet.no.weight.palette": w[f"{NAME}.palette"]},
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_broken_palette_is_one_message(smaller, tmp_path, what, change):
    weights = mx.load(str(smaller[6]), format="safetensors")
    config = json.loads(sd.read_header(smaller[6])["config"])
    path = write_file(tmp_path / "broken.safetensors", config, weights | change(weights))
    with pytest.raises(sd.SDError, match=what):
        sd.StableDiffusion(path)


def test_numbers_beyond_float16_are_refused(tmp_path, refused):
    weights = mx.load(str(sd.TINY))
    weights = {n: w.astype(mx.float32) if w.dtype != mx.uint8 else w for n, w in weights.items()}
    weights[NAME] = weights[NAME] + 1e6
    path = write_file(
        tmp_path / "large.safetensors", json.loads(sd.read_header(sd.TINY)["config"]), weights
    )
    refused(path, NAME, "65504", options=["--bits", 6])


def test_alone_sd_py_says_what_it_needs(smaller, tmp_path):
    from tests.test_house import ROOT, run_alone

    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copy(smaller[6], tmp_path / "model.safetensors")
    code = (
        "import sd\ntry: sd.StableDiffusion('model.safetensors')\nexcept sd.SDError as e: print(e)"
    )
    assert "sd_more/" in run_alone(tmp_path, code).stdout
