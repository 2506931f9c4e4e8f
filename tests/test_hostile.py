"""Files that mean harm, are damaged, or are something else: each ends in one message and no file.

A checkpoint is a program in disguise (pickle), a directory (zip) or a table of contents (JSON), and
anybody may have written it. Nothing in it is run, nothing that it claims is believed.
"""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert_weights
from convert_weights import ConversionError
from sd_more.formats.pickles import Pickles
from tests.reference import write_folder

# %% safetensors -----------------------------------------------------------------------------------


def safetensors_file(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(dtype="U8", shape=(10,), offsets=(0, 10)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A = entry("F32", [2], [0, 8])
HEADERS = {  # what the message says, and the header of a file with ten bytes of data
    "hole": ("leave a hole", {"a": A, "b": entry("U8", [1], [9, 10])}),
    "overlap": ("overlap", {"a": A, "b": entry("U8", [6], [4, 10])}),
    "short": ("describes", {"a": A}),
    "negative": ("impossible entry for a", {"a": entry(shape=[-1, -10])}),
    "fraction": ("impossible entry for a", {"a": entry(shape=[10.0])}),
    "bool": ("impossible entry for a", {"a": entry(shape=[10, True])}),
    "overflow": ("impossible entry for a", {"a": entry(shape=[2**16] * 4 + [2], offsets=[0, 0])}),
    "dtype": ("a is a tensor of the type F3", {"a": entry("F3")}),
    "unhashable": ("impossible entry for a", {"a": entry([])}),
    "no entry": ("impossible entry for a", {"a": 1}),
    "metadata": ("metadata is not text", {"__metadata__": {"format": 3}, "a": entry()}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_file_is_believed_only_where_it_adds_up(tmp_path, refused, name):
    says, header = HEADERS[name]
    refused(safetensors_file(tmp_path / "x.safetensors", header, bytes(10)), says)


TEXTS = {
    "two entries": ("two entries", b'{"a":1,"a":1}'),
    "nested lists": ("RecursionError", b'{"a":' + b"[" * 100_000),
    "a list": ("not a JSON object", b" [1]"),
    "not text": ("damaged", b"{\xff"),
    "a long number": ("damaged", b'{"n":' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_odd_json_is_refused(tmp_path, refused, name):
    says, text = TEXTS[name]
    refused(safetensors_file(tmp_path / "x.safetensors", text), says)


# %% Pickles ---------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def raw_checkpoint(path, data_pkl, members=(), **options):
    """A zip in PyTorch's format around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.fixture
def calls(tmp_path):
    """Calls that would make a file, which must not be there in the end."""
    harm = tmp_path / "harm"
    yield [Call(os.system, f"touch {harm}"), Call(exec, f"open({str(harm)!r}, 'w')")]
    assert not harm.exists()


def test_a_pickle_that_calls_os_system_runs_nothing(tmp_path, weights, run, calls):
    torch.save({"state_dict": weights, "x": calls}, tmp_path / "evil.ckpt")
    run(tmp_path / "evil.ckpt")
    assert "posix.system" in run.said and "exec" in run.said and "was not loaded" in run.said


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("packed", [True, False], ids=["zip", "bare"])
def test_a_pickle_that_is_nothing_but_a_call_is_refused(tmp_path, refused, calls, protocol, packed):
    code, path = pickle.dumps(calls[0], protocol), tmp_path / "evil.pkl"
    raw_checkpoint(path, code) if packed else path.write_bytes(code)
    refused(path)


def test_an_attribute_is_never_set_and_a_name_never_imported(tmp_path, refused, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = b"\x80\x02ctrap_module\nf\n)R}X\x01\x00\x00\x00xK\x01sb."  # f(), then its x = 1
    refused(raw_checkpoint(tmp_path / "trap.pt", code), "trap_module.f", "not a dict")
    assert "trap_module" not in sys.modules


def storage(kind="FloatStorage", key="0", count=4):
    """The instructions for one persistent id"""
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
    count = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    name = f"ctorch\n{kind}\n".encode()
    return b"(" + text("storage") + name + text(key) + text("cpu") + count + b"tQ"


def tensor(view, *, offset=0, shape=(4,), strides=(1,)):
    number = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"
    args = view + number(offset) + numbers(shape) + numbers(strides) + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"ccollections\nOrderedDict\n)RtR"


def hostile(*tensors):
    items = b"".join(b"X\x01\x00\x00\x00" + bytes([97 + k]) + t for k, t in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


HOSTILE = {  # what the message says, and the pickle
    "hash bomb": ("0 tensors", b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u."),
    "nested lists": ("a list", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."),
    "nested tuples": ("a tuple", b"\x80\x02)" + b"\x85" * 100_000 + b"."),
    "memo index": ("0 tensors", b"\x80\x02}r\xff\xff\xff\x7f."),
    "unknown memo": ("never stored", b"\x80\x02h\x05."),
    "huge field": ("claims a field", b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40) + b"x."),
    "huge text": ("claims a field", b"\x80\x02X\xff\xff\xff\xff."),
    "billion laughs": (
        "a list",
        b"\x80\x02]q\x00" + b"".join(b"(h%ch%clq%c" % (k, k, k + 1) for k in range(100)) + b".",
    ),
    "empty stack": ("empty stack", b"\x80\x020."),
    "no mark": ("end without", b"\x80\x02u."),
    "items on a tensor": ("what is not a dict", b"\x80\x02" + tensor(storage()) + b"K\x00K\x01s."),
    "append to a dict": ("not a list", b"\x80\x02}K\x01a."),
    "odd items": ("what is not a dict", b"\x80\x02}(K\x01u."),
    "calls a number": ("no name", b"\x80\x02K\x01)R."),
    "INST": ("instruction", b"\x80\x02(ios\nsystem\n."),
    "EXT": ("instruction", b"\x80\x02\x82\x01."),
    "DUP": ("instruction", b"\x80\x02}2."),
    "name without end": ("cut off", b"\x80\x02c" + b"a" * 100_000),
    "name of numbers": ("without a name", b"\x80\x04K\x01K\x02\x93."),
    "no stop": ("cut off", b"\x80\x02"),
    "beyond": ("beyond its bytes", hostile(tensor(storage(), offset=1))),
    "negative offset": ("impossible shape", hostile(tensor(storage(), offset=-1))),
    "negative stride": ("impossible shape", hostile(tensor(storage(), offset=3, strides=(-1,)))),
    "stride beyond": (
        "beyond its bytes",
        hostile(tensor(storage(), shape=(2,), strides=(1 << 60,))),
    ),
    "negative shape": (
        "impossible shape",
        hostile(tensor(storage(), shape=(-2, -2), strides=(1, 1))),
    ),
    "more strides": ("impossible shape", hostile(tensor(storage(), strides=(1, 1)))),
    "expanded": ("0 tensors", hostile(tensor(storage(), shape=(10**6, 10**6), strides=(0, 0)))),
    "larger than its bytes": (
        "has 16 bytes, expected 20",
        hostile(tensor(storage(count=5), shape=(5,))),
    ),
    "smaller than its bytes": (
        "has 16 bytes, expected 12",
        hostile(tensor(storage(count=3), shape=(3,))),
    ),
    "negative count": ("unknown type", hostile(tensor(storage(count=-4)))),
    "two types": (
        "two different things",
        hostile(tensor(storage()), tensor(storage("DoubleStorage", count=2), shape=(2,))),
    ),
    "two sizes": (
        "two different things",
        hostile(tensor(storage()), tensor(storage(count=8), shape=(8,))),
    ),
    "another file": ("etc/passwd is missing", hostile(tensor(storage(key="../../../etc/passwd")))),
    "unknown storage": ("unknown type", hostile(tensor(storage("system")))),
    "a module": ("a program", b"\x80\x02(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ."),
    "an odd persistent id": ("unknown way", b"\x80\x02K\x01Q."),
    "a tensor of nothing": ("something else", hostile(tensor(b"N"))),
    "its own state_dict": ("0 tensors", b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."),
    "a list": ("a list", b"\x80\x02]."),
    "a set as dict": ("a set", b"\x80\x04\x8f(K\x01\x90."),
    "a long state": ("0 tensors", b"\x80\x02}(" + b"K\x01K\x02" * 10_000 + b"u."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_with_one_message(tmp_path, refused, name):
    says, attack = HOSTILE[name]
    path = raw_checkpoint(tmp_path / "x.ckpt", attack, [("archive/data/0", bytes(16))])
    refused(path, says)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_in_the_old_format_is_refused_with_one_message(tmp_path, refused, name):
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    head += pickle.dumps({"little_endian": True}, 2)
    storages = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    (tmp_path / "legacy.ckpt").write_bytes(head + HOSTILE[name][1] + storages)
    refused(tmp_path / "legacy.ckpt")


def test_only_text_and_whole_numbers_become_keys():
    """Anything else would have to be hashed, which is where a deep nest of tuples kills Python."""
    data = pickle.dumps({("a",): 1, 2: 3, "b": 4, 1.5: 5, True: 6, b"c": 7}, 2)
    assert Pickles(io.BytesIO(data)).run() == {2: 3, "b": 4}


def test_the_hand_made_tensor_is_good_when_nothing_is_wrong(tmp_path):
    """or the attacks above would be refused for another reason"""
    good = hostile(tensor(storage()))
    path = raw_checkpoint(tmp_path / "x.ckpt", good, [("archive/data/0", bytes(16))])
    source = convert_weights.read_file(path)
    assert source.tensors["a"].float32().tolist() == [0, 0, 0, 0]


# %% Zips ------------------------------------------------------------------------------------------

GOOD = hostile(tensor(storage()))
DATA = ("archive/data/0", bytes(16))


def good_zip(path):
    return raw_checkpoint(path, GOOD, [DATA]).read_bytes()


def changed_byte(path, where, value):
    """One byte of the zip directory's first entry."""
    data = good_zip(path)
    place = data.rindex(b"PK\1\2") + where
    path.write_bytes(data[:place] + value + data[place + 1 :])


def renamed(path):
    data = good_zip(path)
    path.write_bytes(data.replace(b"archive/data/0", b"archive/data/1", 1))  # the local header only


ZIPS = {
    "compressed": (
        "compressed",
        lambda path: raw_checkpoint(path, GOOD, [DATA], compression=zipfile.ZIP_DEFLATED),
    ),
    "two pickles": (
        "not one that PyTorch",
        lambda path: raw_checkpoint(path, GOOD, [DATA, ("b/data.pkl", GOOD)]),
    ),
    "two members of a name": (
        "two members",
        lambda path: raw_checkpoint(path, GOOD, [DATA, DATA]),
    ),
    "a script": (
        "TorchScript",
        lambda path: raw_checkpoint(path, GOOD, [DATA, ("archive/constants.pkl", b"")]),
    ),
    "a missing storage": ("storage 0 is missing", lambda path: raw_checkpoint(path, GOOD)),
    "big-endian": (
        "big-endian",
        lambda path: raw_checkpoint(path, GOOD, [DATA, ("archive/byteorder", b"big")]),
    ),
    "junk before it": ("no format known", lambda path: path.write_bytes(b"junk" + good_zip(path))),
    "two names": ("contradicts itself", renamed),
    "encrypted": ("encrypted", lambda path: changed_byte(path, 8, b"\1")),
    "a later version": ("version", lambda path: changed_byte(path, 6, b"\xff")),  # 25.5
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_contradicts_itself_is_refused(tmp_path, refused, name):
    says, write = ZIPS[name]
    write(tmp_path / "x.pt")
    refused(tmp_path / "x.pt", says)


# %% Other files -----------------------------------------------------------------------------------


def tar_file():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "says, data",
    [
        ("is empty", b""), ("no format known", b"hello, this is a text"),
        ("web page", b"<!DOCTYPE html>"), ("7z archive", b"7z\xbc\xaf\x27\x1c"),
        ("rar archive", b"Rar!\x1a\x07"), ("tar archive", tar_file()), ("gzip", b"\x1f\x8b\x08"),
        ("git lfs pull", b"version https://git-lfs.github.com/spec/v1"),
        ("its GGUF header has no end", b"GGUF\3"),
        ("damaged", b"PK\3\4" + bytes(100)), ("a zip archive that is empty", b"PK\5\6" + bytes(18)),
        ("not one that PyTorch made", pickle.dumps({"a": 1})),
        ("no format known", struct.pack("<Q", 1 << 60) + b"{}"), ("cut off", b"\x80"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_things_that_are_no_weights_are_named(tmp_path, refused, says, data):
    (tmp_path / "x.ckpt").write_bytes(data)
    refused(tmp_path / "x.ckpt", says)


# %% Numbers and config files ----------------------------------------------------------------------


def own_list():
    numbers = []
    numbers.append(numbers)
    return numbers


SD_CONFIGS = {  # what the message says, and the numbers that a checkpoint brings
    "unknown field": ("haeds", {"text": {"haeds": 4}}),
    "unknown part": ("untie", {"untie": 4}),
    "one number for four": ("heads", {"unet": {"heads": 2}}),
    "no divisors": ("heads", {"unet": {"heads": [3, 3, 3, 3]}}),
    "a bool": ("groups", {"vae": {"groups": True}}),
    "not a number": ("scale", {"vae": {"scale": float("nan")}}),
    "infinity": ("cfg", {"cfg": float("inf")}),
    "unknown prediction": ("prediction", {"prediction": "x0"}),
    "too many layers": ("layers", {"text": {"layers": 10**9}}),
    "a size of 60": ("size", {"size": 60}),
    "a size of 480": ("size must be a multiple of 64, got 480", {"size": 480}),
    "a huge number": ("", {"size": 10**5000}),
    "a list": ("sd_config", ["size"]),
    "no dict": ("sd_config", {"unet": 4}),
    "a call": ("size", {"size": Call(os.system, "true")}),
    "a tensor": ("groups", {"unet": {"groups": torch.ones(3)}}),
    "itself": ("", {"cfg": own_list()}),
    "a long name": ("", {"name": 10_000 * "long", "size": "\x1b[31m"}),
}


@pytest.fixture(scope="module")
def half_weights(weights):
    return {name: tensor.half() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", SD_CONFIGS)
def test_numbers_that_make_no_model_are_refused(tmp_path, half_weights, refused, name):
    says, config = SD_CONFIGS[name]
    torch.save({"state_dict": half_weights, "sd_config": config}, tmp_path / "odd.ckpt")
    message = refused(tmp_path / "odd.ckpt", says)
    assert len(message) < 600 and "\x1b" not in message


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory, networks):
    return write_folder(tmp_path_factory.mktemp("hostile") / "folder", networks)


INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIG_FILES = {  # a file of a folder, what it holds, and what the message says
    "a path in an index": (INDEX, '{"weight_map": {"a": "../../x.bin"}}', "../../x.bin"),
    "a list in an index": (INDEX, '{"weight_map": {"a": []}}', "plain names"),
    "an index without a map": (INDEX, "{}", "plain names"),
    "nested lists": ("unet/config.json", "[" * 100_000, "config.json"),
    "nested lists in a field": (
        "unet/config.json", '{"act_fn": ' + "[" * 2000 + "]" * 2000 + "}", "",
    ),
    "nested lists to compare": (
        "unet/config.json", '{"act_fn": [' + ("[" * 900 + "]" * 900 + ",") * 2 + "1]}", "",
    ),
    "nested lists for heads": (
        "unet/config.json", '{"attention_head_dim": ' + "[" * 800 + "]" * 800 + "}", "",
    ),
    "a long number": ("unet/config.json", '{"sample_size": ' + "9" * 5000 + "}", "readable JSON"),
    "a large number": ("unet/config.json", '{"attention_head_dim": ' + "9" * 4000 + "}", ""),
    "not an object": ("vae/config.json", "[1]", "not a JSON object"),
    "not text": ("vae/config.json", "{\udcff", "readable JSON"),
    "a class that is a list": ("model_index.json", '{"_class_name": ["x"]}', "_class_name"),
    "a prediction that is a list": (
        "scheduler/scheduler_config.json",
        json.dumps(SCHEDULER | {"prediction_type": ["v_prediction"]}), "prediction_type",
    ),
    "merges of another tokenizer": ("tokenizer/merges.txt", "a b\n" * 100, "48,894 lines"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_odd_config_files_are_refused_with_one_message(tmp_path, small_folder, refused, name):
    file, text, says = CONFIG_FILES[name]
    folder = tmp_path / "folder"
    for path in small_folder.rglob("*.*"):
        to = folder / path.relative_to(small_folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, to)
    if file == INDEX:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)  # the copy is the same file under a second name
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    assert len(refused(folder, says)) < 600


# %% Damage ----------------------------------------------------------------------------------------

formats = pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])


def small_file(path, kind, sizes):
    tensors = {f"t{k}": torch.ones(size) for k, size in enumerate(sizes)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@formats
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind):
    data = small_file(tmp_path / "whole", kind, range(20, 24))
    assert len(convert_weights.read_file(tmp_path / "whole").tensors) == 4
    for size in sorted({*range(64), *range(64, len(data), 61), *range(len(data) - 24, len(data))}):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ConversionError):
            convert_weights.read_file(tmp_path / "cut")
            pytest.fail(f"cut off after {size} of {len(data)} bytes")


@formats
def test_a_file_with_any_byte_changed_gives_tensors_or_a_message(tmp_path, kind):
    path = tmp_path / "whole"
    data, rng, outcomes = small_file(path, kind, range(2, 5)), np.random.default_rng(1), set()
    for _ in range(700):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 2):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            for one in convert_weights.read_file(path).tensors.values():
                one.float32()
            outcomes.add("read")
        except ConversionError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
