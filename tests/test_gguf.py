"""GGUF files as sources: what the package gguf of ggml's authors writes is read as it reads it, a
model in it becomes the same flat file, and a header that lies is refused.
"""

import logging
import re
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFEndian, GGUFWriter
from safetensors.torch import load_file, save_file

import convert_weights
import sd
from convert_weights import ConversionError, convert
from sd_more import library
from sd_more.formats import hub, others
from sd_more.formats.gguf import BLOCKS, PLAIN, TYPES, Quantised
from tests.reference import (
    assert_same,
    cli,
    kohya_names,
    openclip_names,
    original_controlnet,
    quiet,
)

ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the types that the package can write itself
UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def silent():
    """The package warns of names that it does not know."""
    logging.getLogger("gguf").setLevel(logging.ERROR)


def write_gguf(path, tensors, kind=lambda name, shape: "F32", values=None, **options):
    """tensors: {name: a PyTorch tensor, or (type, bytes as NumPy has them, shape)}"""
    writer = GGUFWriter(path, "sd1", **options)
    values = values or (lambda writer: None)
    values(writer)
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple):
            one = kind(name, tuple(tensor.shape))
            tensor = one, gguf.quantize(tensor.float().numpy(), Kind[one])
        writer.add_tensor(name, tensor[1], raw_dtype=Kind[tensor[0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_they_do(kind):
    """Which tensors stable-diffusion.cpp quantises (tensor_should_be_converted)."""

    def choose(name, shape):
        kept = ("time_embed.", "label_emb.", "embedding")
        row = shape[-1] if shape else 1
        small = name.endswith(".bias") or any(part in name for part in kept)
        return "F16" if small or row % gguf.GGML_QUANT_SIZES[Kind[kind]][0] else kind

    return choose


def read_back(path):
    """{name: tensor} as the package reads a file."""
    found = {}
    for one in gguf.GGUFReader(path).tensors:
        array = gguf.dequantize(one.data, one.tensor_type)
        found[one.name] = torch.from_numpy(array.reshape(tuple(map(int, one.shape[::-1]))).copy())
    return found


def read(path):
    return convert_weights.read_file(path).tensors


# %% Types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("any_scale", [False, True])
def test_a_quantised_type_is_read_to_the_bit(tmp_path, kind, any_scale):
    """Blocks of random bits: infinite scales and NaNs as they come, and without any."""
    numbers, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = np.random.default_rng(0).integers(0, 256, (4, 3, 512 // numbers * size), np.uint8)
    if not any_scale:  # all bytes of half precision with small exponents
        data = np.where(data & 0x7C == 0x7C, data & 0x83, data).astype(np.uint8)
    path = write_gguf(tmp_path / "a.gguf", {"first": torch.ones(3), "a": (kind, data)})
    tensor = read(path)["a"]
    assert type(tensor) is Quantised and tensor.shape == (4, 3, 512) and tensor.dtype == "F32"
    with np.errstate(all="ignore"):
        truth = gguf.dequantize(data, Kind[kind])
    ours = tensor.float32()
    assert ours.dtype == np.float32 and (any_scale or np.isfinite(ours).all())
    assert np.array_equal(ours, truth, equal_nan=True)
    with np.errstate(all="ignore"):
        part = tensor.rows(1, 2).float32()
    assert np.array_equal(part, truth[1:3], equal_nan=True)
    assert BLOCKS[kind][:2] == (numbers, size)


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_was_quantised_is_near_what_it_was(tmp_path, kind):
    """By half of a step; 4 bits of 32 numbers within +-1 have one of 2 / 15 at most, or 1 / 8."""
    values = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = write_gguf(tmp_path / "a.gguf", {"a": values}, lambda *_: kind)
    steps = {"Q4_0": 1 / 8, "Q4_1": 2 / 15, "Q5_0": 1 / 16, "Q5_1": 2 / 31, "Q8_0": 1 / 127}
    # The largest of one sign has no number of its own in Q4_0 and Q5_0; scales have 11 bits.
    most = steps[kind] * (1 if kind.endswith("0") and kind != "Q8_0" else 0.5) + 2 * 2**-11
    assert np.abs(read(path)["a"].float32() - values.numpy()).max() <= most


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_type_is_read_as_it_is(tmp_path, kind):
    values = torch.tensor([[1.0, -2.5, 3.25], [0.0, 65504.0, -7.0]])
    values = values.trunc().clamp(-128, 127) if kind.startswith("I") else values
    dtypes = {"F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
    if kind in dtypes:
        given = {"a": (kind, values.numpy().astype(dtypes[kind]))}
    else:
        given = {"a": values.bfloat16().float() if kind == "BF16" else values}
    path = write_gguf(tmp_path / "a.gguf", given, lambda *_: kind)
    tensor = read(path)["a"]
    truth = values.bfloat16().float() if kind == "BF16" else values
    assert tensor.dtype == kind and np.array_equal(tensor.float32(), truth.numpy())


def test_every_type_has_ggmls_number():
    assert all(Kind(number).name == name for number, name in TYPES.items())
    assert set(BLOCKS) | set(PLAIN) <= set(TYPES.values())


def test_a_quantised_tensor_without_numbers_is_empty(tmp_path):
    tensor = Quantised(tmp_path / "nowhere", 0, "Q8_0", (0, 32))
    assert tensor.float32().shape == (0, 32)


# %% Models ----------------------------------------------------------------------------------------


def test_a_model_in_half_precision_is_the_same_flat_file(tmp_path, weights, run):
    path = write_gguf(tmp_path / "a.gguf", weights, lambda *_: "F16")
    ours, said = run(path), run.said
    save_file({name: t.half() for name, t in weights.items()}, tmp_path / "a.safetensors")
    assert_same(ours, run(tmp_path / "a.safetensors"))
    assert "quantised" not in said and "unknown" not in said and "warning" not in said


@pytest.mark.parametrize("kind", ROUNDED)
def test_a_quantised_model_is_what_the_package_reads(tmp_path, weights, run, kind):
    path = write_gguf(tmp_path / "a.gguf", weights, as_they_do(kind))
    theirs = read_back(path)
    quantised = sum(type(tensor) is Quantised for tensor in read(path).values())
    ours, said = run(path), run.said
    assert f"{quantised} of its {len(weights)} tensors are quantised ({kind}: {quantised})" in said
    assert quantised > 300
    save_file(theirs, tmp_path / "a.safetensors")
    assert_same(ours, run(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_versions_and_alignments(tmp_path, weights, flat, run, version, alignment):
    names = [name for name in weights if name.startswith("first_stage_model.")]
    values = lambda writer: writer.add_custom_alignment(alignment)
    path = write_gguf(tmp_path / "a.gguf", {n: weights[n] for n in names}, values=values)
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    assert_same(run(path), {n: tensor for n, tensor in flat.items() if n.startswith("vae.")})


def test_a_file_without_the_last_padding_is_whole(tmp_path):
    """stable-diffusion.cpp ends its files with the last number."""
    path = write_gguf(tmp_path / "a.gguf", {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-20])
    assert read(path)["a"].float32().tolist() == [1, 1, 1]


def renamed(weights, layers=2):
    """As stable-diffusion.cpp renames an OpenCLIP text encoder (convert_open_clip_to_hf_clip_name):
    transformers' names, and q, k and v in one matrix."""
    start = "cond_stage_model.transformer.text_model."
    out = dict(weights)
    for layer in (f"{start}encoder.layers.{k}.self_attn." for k in range(layers)):
        for leaf in ("weight", "bias"):
            parts = [out.pop(f"{layer}{x}_proj.{leaf}") for x in "qkv"]
            out[f"{layer}in_proj.{leaf}"] = torch.cat(parts)
    return out


@pytest.mark.parametrize("names", [renamed, lambda weights: openclip_names(weights, 2)])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q5_1"])
def test_q_k_and_v_in_one_matrix_are_taken_apart(tmp_path, weights, run, names, kind):
    """Quantised as well; and under OpenCLIP's names even the bias is, as it ends with _bias."""
    choose = as_they_do(kind) if kind != "F32" else lambda *_: "F32"
    path = write_gguf(tmp_path / "a.gguf", names(weights), choose)
    bias = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    assert bias not in read(path) or (type(read(path)[bias]) is Quantised) == (kind != "F32")
    save_file(read_back(path), tmp_path / "a.safetensors")
    assert_same(run(path), run(tmp_path / "a.safetensors"))
    if kind == "F32":
        save_file(weights, tmp_path / "b.safetensors")
        assert_same(run(path), run(tmp_path / "b.safetensors"))


def test_openclips_last_layer_is_not_needed_under_its_new_name():
    name = "cond_stage_model.transformer.text_model.encoder.layers.23.mlp.fc1.weight"
    reasons = [what for what, mark in others.NOT_NEEDED if re.match(mark, name)]
    assert reasons == ["the text encoder's unread end"]


TEXT = ("te.", "text_encoders.clip_l.transformer.")  # of a folder, of --clip_l


@pytest.mark.parametrize("start", TEXT)
def test_names_of_a_diffusers_folder_are_known(tmp_path, networks, flat, run, start):
    vae, unet, text = (network.state_dict() for network in networks)
    text = {"text_model." + n.removeprefix("text_model."): t for n, t in text.items()}
    parts = {"unet.": unet, "vae.": vae, start: text}
    tensors = {place + name: t for place, part in parts.items() for name, t in part.items()}
    assert_same(run(write_gguf(tmp_path / "a.gguf", tensors)), flat)
    assert "unknown" not in run.said


def test_a_unet_alone_and_sdxl_are_named(tmp_path, weights):
    unet = {name: tensor for name, tensor in weights.items() if name.startswith(UNET)}
    bare = {name.removeprefix(UNET): tensor for name, tensor in unet.items()}
    xl = weights | {"cond_stage_model.1.transformer.text_model.x": torch.ones(1)}
    language = {"token_embd.weight": torch.ones(2, 2)}
    for tensors, says in (
        (unet, "no text encoder"), (bare, "a UNet alone"), (xl, "Stable Diffusion XL"),
        (language, "holds no Stable Diffusion. Of its 1 tensors the first are: token_embd.weight"),
    ):  # fmt: skip
        path = write_gguf(tmp_path / "a.gguf", tensors, lambda *_: "F16")
        with pytest.raises(ConversionError, match=says):
            convert(path, log=quiet)


NEEDED = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_a_type_that_is_not_read_matters_only_where_it_is_needed(tmp_path, weights, run):
    block = np.zeros((1, 18), np.uint8)
    path = write_gguf(tmp_path / "a.gguf", {"extra": ("IQ4_NL", block)} | weights)
    run(path)
    assert "left out: extra (tensor of the type IQ4_NL)" in run.said
    data = path.read_bytes().replace(struct.pack("<IQ", Kind.IQ4_NL, 0), struct.pack("<IQ", 99, 0))
    path.write_bytes(data)
    run(path)
    assert "extra (tensor of the type 99)" in run.said
    odd = {NEEDED: ("IQ4_NL", np.zeros((64, 36), np.uint8))}
    with pytest.raises(ConversionError, match="to_q.weight is a tensor of the type IQ4_NL, which"):
        convert(write_gguf(tmp_path / "b.gguf", weights | odd), log=quiet)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_lora_a_vae_a_controlnet_and_words(tmp_path, weights, lora, controlnet, run, kind):
    """Parts of any shape, and single numbers, each as a flat file of its own."""
    vae = {n: t for n, t in weights.items() if n.startswith("first_stage_model.")}
    control = original_controlnet(controlnet)
    words = {"one": torch.ones(64), "two": torch.rand(3, 64)}
    for tensors, says in (
        (kohya_names(lora), "a LoRA for"), (vae, "a VAE"), (control, "a ControlNet"),
        (words, "a textual inversion: one, 1 vectors; two, 3 vectors"),
    ):  # fmt: skip
        choose = as_they_do(kind) if kind != "F16" else lambda *_: kind
        path = write_gguf(tmp_path / "a.gguf", tensors, choose)
        save_file(read_back(path), tmp_path / "a.safetensors")
        ours = run(path)
        assert says in run.said and ("quantised" in run.said) == (kind != "F16")
        assert_same(ours, run(tmp_path / "a.safetensors"))


def test_a_vae_of_another_file_may_be_a_gguf(tmp_path, weights, flat, run):
    vae = {n: 2 * t for n, t in weights.items() if n.startswith("first_stage_model.")}
    save_file(weights, tmp_path / "a.safetensors")
    out = run(tmp_path / "a.safetensors", vae=write_gguf(tmp_path / "vae.gguf", vae))
    factors = {name: 2 if name.startswith("vae.") else 1 for name in flat}
    assert_same(out, {name: factors[name] * tensor for name, tensor in flat.items()})


def test_guesses_read_quantised_numbers(tmp_path, weights_v2, run):
    """The spread of a norm's biases, by which 2.x's prediction is guessed; a schedule beside it."""
    name = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for factor, prediction in ((1, "v"), (0.01, "eps")):
        tensors = weights_v2 | {name: weights_v2[name] * factor}
        path = write_gguf(tmp_path / "a.gguf", tensors, lambda n, shape: (
            "Q8_0" if n == name else as_they_do("Q8_0")(n, shape)
        ))  # fmt: skip
        assert type(read(path)[name]) is Quantised
        run(path)
        assert run.config["prediction"] == prediction and "a guess" in run.said


def test_what_its_header_says_is_asked(tmp_path, weights_v2, run):
    """Text of any key, among values of every type, which are passed over."""

    def values(writer):
        for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            getattr(writer, f"add_{kind}")(f"a.{kind}", 1)
        writer.add_float32("a.float32", 1)
        writer.add_float64("a.float64", 1)
        writer.add_bool("a.bool", True)
        writer.add_array("a.texts", ["one", "two", ""])
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_array("a.floats", [0.5])
        writer.add_string("modelspec.prediction_type", "epsilon")

    run(write_gguf(tmp_path / "a.gguf", weights_v2, as_they_do("Q4_0"), values))
    assert "it predicts eps (its header says modelspec.prediction_type)" in run.said


def test_info_and_first_use(tmp_path, weights, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", weights, as_they_do("Q8_0"))
    done = cli("--info", path, script="convert_weights.py")
    assert done.returncode == 0 and "Stable Diffusion 1.x" in done.stdout, done.stderr
    assert "are quantised (Q8_0: " in done.stdout and "sha256 " in done.stdout
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flat = convert_weights.flat_file(path, quiet)
    assert flat.name == "a.flat.safetensors" and sd.read_flat(flat)[0].size == 512
    said = []
    assert convert_weights.flat_file(path, said.append) == flat and "made from a.gguf" in said[0]


def test_it_is_found_by_name_and_listed(tmp_path, weights):
    write_gguf(tmp_path / "style.gguf", weights, as_they_do("Q8_0"))
    assert library.find("style", [tmp_path], "model") == tmp_path / "style.gguf"
    (line,) = (line for line in library.listing([tmp_path]) if "style.gguf" in line)
    assert "Stable Diffusion 1.x" in line


@pytest.mark.parametrize(
    "there, chosen",
    [
        (["a.gguf"], "a.gguf"), (["a.ckpt", "a.gguf", "b.gguf"], "a.ckpt"),
        (["a.gguf", "a.safetensors"], "a.safetensors"), (["a.gguf", "b.gguf"], None),
    ],
)  # fmt: skip
def test_on_the_hub_what_is_not_quantised_is_preferred(there, chosen):
    choose = lambda: hub.choose("org/name", there, {"vae": ("a", "b")})
    if chosen is None:
        with pytest.raises(hub.HubError, match="Name one"):
            choose()
    else:
        assert choose() == ([chosen], chosen)


# %% Headers that lie ------------------------------------------------------------------------------


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def entry(name="a", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*tensors, values=(), counts=None, version=3):
    counts = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*values, *tensors])


def file(*tensors, data=16, **options):
    head = header(*tensors, **options)
    return head + bytes(-len(head) % 32 + data)


def value(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def aligned(kind, data):
    return file(entry(), values=[value("general.alignment", kind, data)])


U32, U64 = (lambda n, form=form: struct.pack(form, n) for form in ("<I", "<Q"))
NO_END, IMPOSSIBLE, PLACES = "has no end", "an impossible entry for a", "overlap, or leave a hole"
LIES = {  # what is wrong: what is said of it, the file
    "only its name": (NO_END, b"GGUF"),
    "no counts": (NO_END, b"GGUF" + struct.pack("<IQ", 3, 1)),
    "version 1": ("of version 1, of which 2 and 3", b"GGUF" + struct.pack("<III", 1, 1, 0)),
    "version 4": ("of version 4, of which 2 and 3", file(entry(), version=4)),
    "version 0": ("of version 0, of which 2 and 3", file(entry(), version=0)),
    "2^60 tensors": (f"{1 << 60} tensors and 0 values", file(entry(), counts=(1 << 60, 0))),
    "2^60 values": (f"1 tensors and {1 << 60} values", file(entry(), counts=(1, 1 << 60))),
    "20,000 tensors of none": (NO_END, file(entry(), counts=(20_000, 0))),
    "a name without end": (NO_END, file(U64(1 << 60) + b"a")),
    "a text without end": (NO_END, file(values=[value("a", 8, U64((1 << 64) - 1))])),
    "a name that is no text": ("UnicodeDecodeError", file(entry(b"\xff\xfe"))),
    "a value that is no text": ("UnicodeDecodeError", file(values=[value("a", 8, text(b"\xff"))])),
    "an array without end": (NO_END, file(values=[value("a", 9, U32(12) + U64(1 << 61))])),
    "2^60 texts": ("an array of", file(values=[value("a", 9, U32(8) + U64(1 << 60))])),
    "400,000 texts of none": (NO_END, file(values=[value("a", 9, U32(8) + U64(400_000))])),
    "arrays in an array": ("the type 9", file(values=[value("a", 9, U32(9) + U64(1))])),
    "an unknown value": ("the type 13", file(values=[value("a", 13, U64(1))])),
    "an alignment of 0": ("alignment is 0", aligned(4, U32(0))),
    "an alignment of 48": ("is 48", aligned(4, U32(48))),
    "a huge alignment": ("another power", aligned(10, U64(1 << 60))),
    "an alignment of 32.0": ("is 32.0", aligned(12, struct.pack("<d", 32))),
    "an alignment in words": ("is x", aligned(8, text("x"))),
    "a part": ("it is a part of 3", file(entry(), values=[value("split.count", 2, b"\3\0")])),
    "two values of a name": ("two entries", file(values=[value("a", 7, b"\1")] * 2)),
    "two tensors of a name": ("two entries", file(entry(), entry(offset=32), data=48)),
    "9 axes": (IMPOSSIBLE, file(entry(shape=(1,) * 9))),
    "2^32 - 1 axes": (IMPOSSIBLE, file(text("a") + U32((1 << 32) - 1))),
    "a huge axis": (IMPOSSIBLE, file(entry(shape=(1 << 60,)))),
    "axes that overflow": ("it has", file(entry(shape=(1 << 40, 1 << 40)))),
    "a huge offset": (IMPOSSIBLE, file(entry(offset=1 << 63))),
    "half a block": (IMPOSSIBLE, file(entry(shape=(48, 2), kind=8))),
    "a block of no axes": (IMPOSSIBLE, file(entry(shape=(), kind=8))),
    "an offset beside": (PLACES, file(entry(offset=8))),
    "an offset into the next": (PLACES, file(entry("a"), entry("b"), data=48)),
    "a hole": (PLACES, file(entry("a"), entry("b", offset=64), data=80)),
    "an unaligned one after an unknown": (PLACES, file(entry("a", kind=99), entry("b", offset=5))),
    "cut off": ("it has", file(entry(), data=15)),
    "more behind it": ("it has", file(entry(), data=33)),
    "an unknown beyond the end": ("it has", file(entry(kind=99, offset=0), data=-1)),
    "a name of 301 characters": ("301 characters", file(entry("a" * 301))),
    "a flat file": (
        "flat file already", file(values=[value("format", 8, text("sd.py 1"))], data=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused(tmp_path, refused, what):
    says, data = LIES[what]
    (tmp_path / "a.gguf").write_bytes(data)
    refused(tmp_path / "a.gguf", says)


def test_the_honest_relative_of_these_is_read(tmp_path):
    values = [value("general.alignment", 4, U32(32)), value("split.count", 2, b"\1\0")]
    tensors = (
        entry("a"),
        entry("b", (), offset=32),
        entry("c", kind=99, offset=64),
        entry("d", offset=96),
    )
    (tmp_path / "a.gguf").write_bytes(file(*tensors, values=values, data=112))
    source = convert_weights.read_file(tmp_path / "a.gguf")
    assert {n: t.shape for n, t in source.tensors.items()} == {"a": (4,), "b": (), "d": (4,)}
    assert source.unreadable == {"c": "tensor of the type 99"}


def test_a_header_of_many_megabytes_is_refused(tmp_path, refused):
    """Its last value would begin after the 16 MiB that are read."""
    values = [value("a", 9, U32(0) + U64(17 << 20) + bytes(17 << 20)), value("b", 7, b"\1")]
    (tmp_path / "a.gguf").write_bytes(file(values=values))
    refused(tmp_path / "a.gguf", NO_END)


def test_a_file_of_a_big_endian_machine_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"a": torch.ones(4)}, endianess=GGUFEndian.BIG)
    with pytest.raises(ConversionError, match="of a big-endian machine"):
        convert(path, log=quiet)


def test_a_file_that_shrinks_while_it_is_read_is_said(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"a": torch.ones(2, 64)}, lambda *_: "Q8_0")
    tensor = read(path)["a"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(convert_weights.NotConvertible, match="a.gguf ends early"):
        tensor.float32()


def test_broken_scales_are_refused(tmp_path, weights):
    """An infinite scale makes infinities, or NaN where the number is 0."""
    block = np.full((64, 68), 0x7C, np.uint8)
    block[:, [0, 34]] = 0
    path = write_gguf(tmp_path / "a.gguf", weights | {NEEDED: ("Q8_0", block)})
    with pytest.raises(ConversionError, match=r"unet.down.1.1.attn1.to_q.weight holds infinities"):
        convert(path, log=quiet)
    assert not (tmp_path / "a.flat.safetensors").exists()


def test_the_flat_file_of_a_quantised_model_loads(tmp_path, weights):
    path = write_gguf(tmp_path / "a.gguf", weights, as_they_do("Q8_0"))
    flat = convert(path, log=quiet)
    assert {t.dtype for n, t in load_file(flat).items() if n != "tokenizer.merges"} == {torch.half}
    model = sd.StableDiffusion(flat)
    assert model.txt2img("a", seed=1, steps=1, width=64, height=64)[0].size == (64, 64)
