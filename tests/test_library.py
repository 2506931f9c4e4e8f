"""What sd_more/library.py and sd_more/formats/hub.py promise: a name finds its file, here or on a
hub, and whatever lies in a folder gets its line in the list.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderTiny
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

import convert_weights
import sd
from sd_more import library
from sd_more.formats import hub
from sd_more.library import find, listing, look_up
from tests.reference import assert_same, kohya_names, quiet
from tests.test_convert import files_of, local_hub


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """sd.py's cache folder: nobody's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return convert_weights.cache_folder()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to be in, with the empty folder loras."""
    (tmp_path / "loras").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


LORAS = [Path("loras")]


def write(*names):
    for name in names:
        path = Path("loras", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_flat(name, **metadata):
    metadata = {"format": sd.FORMAT, "config": '{"kind": "lora"}'} | metadata
    save_file({"a": torch.zeros(1)}, Path("loras", name), metadata)


def small_taesd():
    return AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4
    )


def write_halves(vae, folder):
    """A TAESD in its author's two files, whose decoder begins with one more layer; -> them"""
    halves = {"encoder": {}, "decoder": {}}
    for name, tensor in vae.state_dict().items():
        half, _, place, rest = name.split(".", 3)
        halves[half][f"{int(place) + (half == 'decoder')}.{rest}"] = tensor
    for half, tensors in halves.items():
        torch.save(tensors, folder / f"taesd_{half}.pth")
    return {f"taesd_{half}.pth": folder / f"taesd_{half}.pth" for half in halves}


def refused(text, *words, folders=LORAS, what="LoRA"):
    with pytest.raises(sd.SDError) as error:
        find(text, folders, what)
    message = str(error.value)
    assert "\n" not in message and len(message) < 2000
    for word in words:
        assert word in message
    return message


# %% Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name",
    [
        ("anime", "anime.safetensors"),
        ("Anime", "anime.safetensors"),
        ("ANIME.SAFETENSORS", "anime.safetensors"),
        ("anime", "Anime.SafeTensors"),
        ("anime", "anime.ckpt"),
        ("anime", "anime.pt"),
        ("anime.bin", "anime.bin"),
        ("anime", "anime.pth"),
        ("anime", "styles/japan/anime.safetensors"),
        ("japan/anime", "styles/japan/anime.safetensors"),
        ("styles/japan/anime.safetensors", "styles/japan/anime.safetensors"),
        ("anime", "styles/anime/pytorch_lora_weights.safetensors"),
        ("anime", "anime/adapter_model.bin"),
        ("anime v1.5", "anime v1.5.safetensors"),
        ("anime.flat", "anime.flat.safetensors"),
        ("anime", "anime.flat.safetensors"),
        ("m\u00fcnchen", "mu\u0308nchen.pt"),
        ("\u96ea", "\u96ea.ckpt"),
        ("[a]*", "[a]*.ckpt"),
    ],
)
def test_a_name_finds_its_file(home, text, name):
    write(name, "another.safetensors", "animes.safetensors")
    assert find(text, LORAS, "LoRA") == Path("loras", name)
    assert look_up(text, LORAS) == [Path("loras", name)]


def test_a_path_that_is_there_is_taken_as_it_is(home):
    write("anime.ckpt", "b/anime.ckpt")
    Path("anime").mkdir()
    os.mkfifo("pipe.ckpt")
    for text in ("anime", "loras/anime.ckpt", "pipe.ckpt", str(home / "loras/b/anime.ckpt"), "."):
        assert find(text, LORAS, "LoRA") == Path(text)
    assert find(Path("loras/anime.ckpt"), [], "LoRA") == Path("loras/anime.ckpt")


@pytest.mark.parametrize(
    "inside",
    [
        {"model_index.json": "{}", "vae/diffusion_pytorch_model.safetensors": ""},
        {"unet/config.json": "{}", "unet/diffusion_pytorch_model.bin": ""},
        {"config.json": '{"_class_name": "ControlNetModel"}', "anime.bin": ""},
    ],
)
def test_a_diffusers_folder_is_one_thing(home, inside):
    for name, text in inside.items():
        write(f"a/Anime/{name}")
        Path("loras/a/Anime", name).write_text(text)
    assert find("anime", LORAS, "model") == Path("loras/a/Anime")
    assert [each.name for each in library.walk(LORAS)[0]] == ["a/Anime"]


@pytest.mark.parametrize("text", ["{}", "[", "[]", "\xff", '{"r": 8}'])
def test_a_config_file_alone_makes_no_diffusers_folder(home, text):
    write("config.json", "anime.bin")
    Path("loras/config.json").write_text(text, "latin-1")
    assert find("anime", LORAS, "LoRA") == Path("loras/anime.bin")


def test_several_that_fit_are_listed(home):
    write("a/anime.ckpt", "b/Anime.safetensors", "b/anime.pt")
    message = refused("ANIME", "ANIME may be 3 files", "paths")
    for path in ("loras/a/anime.ckpt", "loras/b/Anime.safetensors", "loras/b/anime.pt"):
        assert path in message and find(path, LORAS, "LoRA") == Path(path)
    assert find("a/anime", LORAS, "LoRA") == Path("loras/a/anime.ckpt")
    assert find("ANIME.PT", LORAS, "LoRA") == Path("loras/b/anime.pt")


def test_of_hundreds_that_fit_ten_are_listed(home):
    write(*(f"{i:03}/anime.ckpt" for i in range(300)))
    assert refused("anime", "may be 300 files", "and 290 more").count("anime.ckpt") == 10


def test_the_exact_spelling_goes_before_another(home):
    write("a/anime.ckpt", "b/Anime.ckpt")
    if os.path.exists("loras/a/ANIME.ckpt"):
        pytest.skip("this disk does not tell upper case from lower")
    assert find("Anime", LORAS, "LoRA") == Path("loras/b/Anime.ckpt")
    refused("ANIME", "may be 2 files")


def test_the_same_file_by_two_ways_is_one(home):
    write("a/anime.ckpt")
    Path("links").mkdir()
    Path("links/anime.ckpt").symlink_to(home / "loras/a/anime.ckpt")
    folders = [Path("loras"), Path("loras/a"), Path("links"), home / "loras"]
    assert find("anime", folders, "LoRA") == Path("loras/a/anime.ckpt")
    assert len(library.walk(folders)[0]) == 2


def test_a_flat_file_goes_before_what_it_was_made_of(home):
    write("anime.ckpt")
    write_flat("anime.flat.safetensors", source="anime.ckpt")
    assert find("anime", LORAS, "LoRA") == Path("loras/anime.flat.safetensors")
    assert find("anime.ckpt", LORAS, "LoRA") == Path("loras/anime.ckpt")


def test_a_flat_file_of_another_goes_before_nothing(home):
    write("anime.ckpt")
    write_flat("anime.flat.safetensors", source="anime.safetensors")
    refused("anime", "may be 2 files")


def test_a_flat_file_of_what_changed_since_is_left_aside(home):
    write("anime.ckpt")
    made_from = convert_weights.fingerprint(home / "loras/anime.ckpt")
    write_flat("anime.flat.safetensors", source="anime.ckpt", made_from=made_from)
    assert find("anime", LORAS, "LoRA") == Path("loras/anime.flat.safetensors")
    Path("loras/anime.ckpt").write_bytes(b"more")
    assert find("anime", LORAS, "LoRA") == Path("loras/anime.ckpt")


@pytest.mark.parametrize("text", ["anmie", "animee.safetensors", "ANIM", "x/anmie.ckpt"])
def test_a_name_that_nothing_has_gets_the_nearest(home, text):
    write("styles/Anime.safetensors", "zebra.ckpt")
    message = refused(text, f"there is no LoRA {text}", "in loras", "Did you mean styles/Anime?")
    assert "zebra" not in message


def test_where_nothing_is_near_it_says_where_it_looked(home):
    folders = [*LORAS, Path("nowhere")]
    refused("anime", "in loras, nowhere (not there). Is the name right?", folders=folders)
    refused("anime", "there is no model anime, here. Is", folders=[], what="model")


@pytest.mark.parametrize(
    "text", ["../secret", "..", "/secret", "../secret.ckpt", "a/../../secret", "secret", "*", "?"]
)
def test_a_strangers_name_leads_nowhere_else(home, text):
    write("a/anime.ckpt")
    Path("secret.ckpt").write_bytes(b"")
    assert look_up(text, LORAS) == []
    assert look_up("loras/a/anime.ckpt", LORAS) == []


@pytest.mark.parametrize("text", ["", " ", "a\0b", "x" * 5000, "\udcff", "a\nb", "~", "a@b"])
def test_odd_names_get_one_sentence(home, text):
    refused(text, "LoRA")


def test_an_address_is_no_name(home):
    refused("https://huggingface.co/org/name", "is an address", "org/name/FILE")


# %% Folders ---------------------------------------------------------------------------------------


def test_links_that_go_in_circles_end(home):
    write("a/anime.ckpt")
    Path("loras/a/up").symlink_to(home / "loras")
    Path("loras/self").symlink_to("self")
    Path("loras/gone.ckpt").symlink_to("nowhere")
    assert find("anime", LORAS, "LoRA") == Path("loras/a/anime.ckpt")
    assert len(library.walk(LORAS)[0]) == 1


def test_what_is_hidden_or_no_file_or_without_weights_is_not_there(home):
    write(
        ".anime.ckpt", ".git/anime.ckpt", "anime.txt", "anime.png", "anime", ".anime.ckpt.sd-part"
    )
    os.mkfifo("loras/anime.pt")
    Path("loras/anime.safetensors").mkdir()
    refused("anime", "there is no LoRA")
    assert library.walk(LORAS) == ([], [])


def test_a_folder_behind_a_link_is_looked_through(home):
    (home / "disk").mkdir()
    (home / "disk/anime.ckpt").write_bytes(b"")
    Path("loras/more").symlink_to(home / "disk")
    assert find("anime", LORAS, "LoRA") == Path("loras/more/anime.ckpt")


def test_thousands_of_files_are_quick(home):
    write(*(f"{i % 7}/style {i}.safetensors" for i in range(5000)))
    start = time.perf_counter()
    assert find("style 4321", LORAS, "LoRA") == Path("loras/2/style 4321.safetensors")
    refused("stile 4321", "Did you mean 2/style 4321")
    assert time.perf_counter() - start < 20


def test_it_stops_after_so_many_entries_and_says_so(home, monkeypatch):
    monkeypatch.setattr(library, "MOST", 30)
    write(*(f"a/{i:03}.ckpt" for i in range(100)), "b.ckpt")
    assert find("b", LORAS, "LoRA") == Path("loras/b.ckpt")
    refused("anime", "only the first 30 entries")
    assert any("only the first 30" in line for line in listing(LORAS))


# %% The list --------------------------------------------------------------------------------------


@pytest.fixture
def shelf(home, weights, weights_v2, folder, lora, controlnet, networks):
    """The folder loras, with one of each kind."""
    save_file(weights, "loras/one.safetensors")
    torch.save(weights_v2, "loras/two.ckpt")
    save_file(kohya_names(lora), "loras/style.safetensors")
    torch.save({"string_to_param": {"*": torch.ones(2, 64)}, "name": "cat"}, "loras/cat.pt")
    controlnet.save_pretrained("loras/edges")
    networks[0].save_pretrained("loras/vae")
    small_taesd().save_pretrained("loras/tiny")
    shutil.copytree(folder, "loras/whole")
    save_file({"conditioner.embedders.1.x": torch.ones(1)}, "loras/xl.safetensors")
    return home


def lines(*folders):
    """-> {name: the rest of its line}"""
    found = [line.strip().partition(": ") for line in listing(folders or LORAS)]
    return {name: text for name, _, text in found}


def test_the_list_says_what_each_is(shelf):
    said = lines()
    kinds = {
        "one.safetensors": "a model, Stable Diffusion 1.x, ",
        "two.ckpt": "a model, Stable Diffusion 2.x, ",
        "whole": "a model, Stable Diffusion 1.x, ",
        "style.safetensors": "a LoRA for ",
        "cat.pt": "a textual inversion: cat, 2 vectors, ",
        "edges": "a ControlNet for ",
        "vae": "a VAE, ",
        "tiny": "a small VAE (TAESD), ",
        "xl.safetensors": "not for this program: it is Stable Diffusion XL. Only ",
    }
    for name, text in kinds.items():
        assert said[name].startswith(text), said[name]
        assert " MB" in said[name] and "converted" not in said[name].split(" MB")[1]
    assert said["loras"] == "9 models and other files"
    assert not any(name.startswith("whole/") for name in said)


def test_the_list_says_what_was_converted(shelf, cache):
    convert_weights.flat_file("loras/one.safetensors", quiet)
    convert_weights.convert("loras/style.safetensors", log=quiet)
    convert_weights.flat_file("loras/vae", quiet, cache.parent)
    os.chmod("loras", 0o755)
    said = lines(Path("loras"), cache.parent)
    for name in ("one.safetensors", "style.safetensors"):
        assert said[name].endswith("MB, converted already")
    assert not said["vae"].endswith("already")  # made for the folder above, which is another list
    assert said["one.flat.safetensors"].startswith("a converted Stable Diffusion 1.x, ")
    assert said["style.flat.safetensors"].startswith("a converted lora, ")
    Path("loras/one.safetensors").touch()
    assert not lines()["one.safetensors"].endswith("already")


def test_the_list_ends_with_what_is_kept_and_how_to_delete_it(shelf, cache):
    assert list(listing([]))[-1] == f"{cache}: 0 converted files, 0.0 MB in all"
    write_flat("one.flat.safetensors")  # its name is taken, so the cache folder keeps it
    path = convert_weights.flat_file("loras/one.safetensors", quiet)
    assert path.parent == cache
    said = list(listing(LORAS))
    mega = f"{path.stat().st_size / 1e6:.1f} MB"
    assert said[-3:] == [
        f"{cache}: 1 converted files, {mega} in all",
        f"  {path.name}: {mega}, made from one.safetensors",
        "  to delete all of these: python convert_weights.py --clear",
    ]
    assert lines()["one.safetensors"].endswith("converted already")


BROKEN = {
    "empty.ckpt": b"", "page.safetensors": b"<html>", "text.bin": b"hello",
    "cut.safetensors": (1000).to_bytes(8, "little") + b"{}" + b" " * 2000,
    "json.safetensors": (2).to_bytes(8, "little") + b"{]",
    "deep.safetensors": (9000).to_bytes(8, "little") + b'{"a":' + b"[" * 8995,
    "zip.pt": b"PK\3\4" + b"\0" * 100, "pickle.pth": b"\x80\2cos\nsystem\n(S'touch x'\ntR.",
    "name \x1b[31m\n.ckpt": b"7z\xbc\xaf",
}  # fmt: skip


def test_a_broken_file_gets_its_line_and_stops_nothing(home, lora):
    write("model/model_index.json", "model/unet/config.json")
    for name, data in BROKEN.items():
        Path("loras", name).write_bytes(data)
    write_flat("flat.safetensors", config="{")
    write_flat("flat 2.safetensors", config='{"kind": []}')
    save_file(kohya_names(lora), "loras/style.safetensors")
    said = list(listing(LORAS))
    assert said[0] == f"loras: {len(BROKEN) + 4} models and other files"
    assert len(said) == len(BROKEN) + 6 and all(line.isprintable() for line in said)
    assert sum("not for this program: " in line for line in said) == len(BROKEN) + 1
    assert sum("damaged: convert it again" in line for line in said) == 2
    assert not any("loras/" in line for line in said[1:] if "model:" not in line)
    assert not Path("x").exists()


def test_a_folder_that_is_not_there_gets_its_line(home):
    assert list(listing([Path("nowhere")]))[:2] == [
        "nowhere: 0 models and other files",
        "  nowhere: No such file or directory.",
    ]


def test_a_list_of_hundreds_reads_headers_only(home, lora, monkeypatch):
    save_file(kohya_names(lora), "loras/style.safetensors")
    for i in range(200):
        os.link("loras/style.safetensors", f"loras/{i}.safetensors")
    monkeypatch.setattr(convert_weights, "hash_file", None)
    monkeypatch.setattr(convert_weights.Tensor, "float32", None)
    start = time.perf_counter()
    assert sum("a LoRA" in line for line in listing(LORAS)) == 201
    assert time.perf_counter() - start < 60


# %% The Hugging Face hub --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, folder, weights, lora, controlnet, networks):
    """What is on the hub of these tests."""
    path = tmp_path_factory.mktemp("hub")
    save_file(weights, path / "model.safetensors")
    (path / "model.yaml").write_text("parameterization: eps\n")
    save_file(kohya_names(lora), path / "lora.safetensors")
    torch.save({"<cat>": torch.ones(64)}, path / "embedding.bin")
    controlnet.save_pretrained(path / "control")
    networks[0].save_pretrained(path / "vae")
    small_taesd().save_pretrained(path / "taesd")
    halves = write_halves(small_taesd(), path)
    model, style = path / "model.safetensors", path / "lora.safetensors"
    return {
        "org/whole": files_of(folder) | {"model.ckpt": None, "README.md": None},
        "org/whole@v1": {"old.safetensors": model},
        "org/lora": {"pytorch_lora_weights.safetensors": style, "other.safetensors": None},
        "org/only": {"sub/x.bin": None, "Style (v2).safetensors": style, "a.ckpt": None},
        "org/words": {"learned_embeds.bin": path / "embedding.bin", "token.txt": None},
        "org/control": files_of(path / "control") | {"a.safetensors": None},
        "org/vae": files_of(path / "vae"),
        "org/taesd": files_of(path / "taesd") | halves | {"taesd_x.safetensors": None},
        "org/taesdxl": files_of(path / "taesd"),
        "org/sdxl-vae": files_of(path / "vae"),
        "org/several": {"a.safetensors": model, "b/[c]*.ckpt": model, "a.yaml": path / "model.yaml"}
        | {f"more {i}.safetensors": None for i in range(20)},
        "org/several@refs/pr/1": {"pr.safetensors": model},
        "org/nothing": {"README.md": None, "model.onnx": None},
        "org/evil": {"../../evil.safetensors": model, "/evil.ckpt": model, "ok.ckpt": model},
        "org/gated": "gated",
        "org/private": "private",
    }


@pytest.fixture
def there(home, repositories, monkeypatch):
    """The hub, for this process; -> what was asked of it"""
    with local_hub(repositories) as (address, asked):
        api = HfApi(endpoint=address["HF_ENDPOINT"])
        monkeypatch.setattr(huggingface_hub, "model_info", api.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", api.snapshot_download)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked


@pytest.mark.parametrize(
    "text, place, kind",
    [
        ("org/whole", "org/whole", "Stable Diffusion 1.x"),
        ("org/whole@main", "org/whole", "Stable Diffusion 1.x"),
        ("org/whole@v1", "org/whole/old.safetensors", "Stable Diffusion 1.x"),
        ("org/whole/vae", "org/whole/vae", "a VAE"),
        ("org/lora", "org/lora/pytorch_lora_weights.safetensors", "a LoRA"),
        ("org/only", "org/only/Style (v2).safetensors", "a LoRA"),
        ("org/only/Style (v2).safetensors", "org/only/Style (v2).safetensors", "a LoRA"),
        ("org/words", "org/words/learned_embeds.bin", "a textual inversion: <cat>"),
        ("org/control", "org/control", "a ControlNet"),
        ("org/vae", "org/vae", "a VAE"),
        ("org/taesd", "org/taesd", "a small VAE"),
        ("org/taesd/taesd_decoder.pth", "org/taesd/taesd_decoder.pth", "a small VAE"),
        ("org/several/a.safetensors", "org/several/a.safetensors", "Stable Diffusion 1.x"),
        ("org/several/b/[c]*.ckpt@main", "org/several/b/[c]*.ckpt", "Stable Diffusion 1.x"),
        ("org/several/b", "org/several/b/[c]*.ckpt", "Stable Diffusion 1.x"),
        ("org/several@refs/pr/1", "org/several/pr.safetensors", "Stable Diffusion 1.x"),
        ("org/several/pr.safetensors@refs/pr/1", "org/several/pr.safetensors", "Stable"),
        ("org/evil", "org/evil/ok.ckpt", "Stable Diffusion 1.x"),
    ],
)
def test_a_name_on_the_hub_is_found_kept_and_found_again(there, cache, text, place, kind):
    path = find(text, LORAS, "model")
    assert hub.whence(path) == place and path.exists()
    flat = convert_weights.flat_file(path, quiet)
    assert flat.parent == cache and sd.read_header(flat)["source"] == place
    assert kind in sd.read_header(flat)["notes"]
    assert sorted(file.name for file in Path().iterdir()) == ["hf", "loras"]
    said = []
    assert convert_weights.flat_file(text, said.append) == flat  # by its name, too
    assert said[-1] == f"using {flat}, made from {place} before"
    assert find(text, LORAS, "model") == path


def test_only_what_is_needed_is_fetched(there):
    find("org/whole", LORAS, "model")
    assert "README.md" not in there and "model.ckpt" not in there
    there.clear()
    find("org/lora", LORAS, "LoRA")
    assert set(there) == {"pytorch_lora_weights.safetensors"}
    there.clear()
    find("org/several/a.safetensors", LORAS, "model")
    assert set(there) == {"a.safetensors", "a.yaml"}
    there.clear()
    find("org/taesd/taesd_encoder.pth", LORAS, "VAE")
    assert set(there) == {"taesd_encoder.pth", "taesd_decoder.pth", "config.json"}


def test_convert_writes_it_here_under_the_repositorys_name(there):
    for text, name in (
        ("org/vae", "vae"), ("org/whole/vae", "whole-vae"),
        ("org/lora", "lora-pytorch_lora_weights"), ("org/several/b", "several-b-[c]*"),
    ):  # fmt: skip
        path = convert_weights.convert(text, log=quiet)
        assert path == Path(f"{name}.flat.safetensors") and path.is_file()


def test_with_a_folder_it_is_kept_there_and_no_other_takes_its_name(there, home):
    first = convert_weights.flat_file("org/lora", quiet, home)
    assert first == home / "lora-pytorch_lora_weights.flat.safetensors"
    weights = load_file(first)
    save_file({"a": torch.ones(1)}, first, sd.read_header(first) | {"source": "else/lora"})
    second = convert_weights.flat_file("org/lora", quiet, home)
    assert second == first  # it is known by what it was made from
    save_file({"a": torch.ones(1)}, first, {"source": "else/lora", "made_from": "x"})
    third = convert_weights.flat_file("org/lora", quiet, home)
    assert third.parent == home and third != first  # under another name
    assert_same(load_file(third), weights)


@pytest.mark.parametrize(
    "text, words",
    [
        ("org/several", ["several files", "such as org/several/a.safetensors.", "and 16 more"]),
        ("org/several@main", ["such as org/several/a.safetensors@main."]),
        ("org/several/c.ckpt", ["has no c.ckpt", "a.safetensors"]),
        ("org/several/a.yaml", ["holds no weights", ".safetensors"]),
        ("org/whole/unet/config.json", ["holds no weights"]),
        ("org/nothing", ["holds no weights that are read here"]),
        ("org/gated", ["is gated", "https://huggingface.co/org/gated", "hf auth login"]),
        ("org/private", ["private", "https://huggingface.co/org/private", "hf auth login"]),
        ("org/unknown", ["none of that name", "hf auth login"]),
        ("org/whole@v7", ["has no revision v7"]),
        ("org/evil/../../evil.safetensors", ["Is the name right?"]),
        ("org/whole@../../x", ["Is the name right?"]),
        ("org/anime.safetensors", ["Is the name right?"]),
        ("org/..", ["Is the name right?"]),
    ],
)
def test_what_the_hub_does_not_give_gets_one_sentence(there, text, words):
    assert not there
    refused(text, *words, what="model")
    assert not Path("hf/models--org--gated/snapshots").exists() or text == "org/gated"


@pytest.mark.parametrize("text, word", [("org/taesdxl", "taesdxl"), ("org/sdxl-vae", "sdxl")])
def test_a_vae_for_another_model_is_known_by_its_repositorys_name(there, text, word):
    with pytest.raises(sd.SDError, match=f"{word}, by its name|by its name"):
        convert_weights.flat_file(text, quiet)


def test_what_is_here_goes_before_the_hub(there, home):
    write("org/whole.ckpt")
    assert find("org/whole", LORAS, "model") == Path("loras/org/whole.ckpt")
    Path("org").mkdir()
    refused("org/vae", "nor is it looked for on the hub", "org is a folder here")
    Path("org/vae").mkdir()
    assert find("org/vae", LORAS, "VAE") == Path("org/vae")
    assert look_up("org/lora", LORAS) == [] and there == []


def test_without_the_net_what_the_cache_holds_is_used(there, monkeypatch, capsys):
    texts = ("org/whole", "org/whole@v1", "org/lora", "org/several/a.safetensors", "org/taesd")
    paths = {text: find(text, LORAS, "model") for text in texts}
    there.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for text, path in paths.items():
        assert find(text, LORAS, "model") == path
    assert there == [] and "using what its cache here has of org/lora" in capsys.readouterr().err
    refused("org/vae", "org/vae was not fetched", "offline")
    refused("org/several/pr.safetensors@refs/pr/1", "was not fetched")
    refused("org/lora/other.safetensors", "has no other.safetensors")


def test_a_hub_that_is_down_is_as_good_as_none(there, monkeypatch):
    path = find("org/lora", LORAS, "LoRA")
    api = HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "model_info", api.model_info)
    assert find("org/lora", LORAS, "LoRA") == path
    refused("org/vae", "org/vae was not fetched")


def test_a_half_fetched_model_gets_a_sentence(there, monkeypatch):
    path = find("org/whole", LORAS, "model")
    shutil.rmtree(path / "unet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(sd.SDError, match="no unet folder"):
        convert_weights.flat_file("org/whole", quiet)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("org/name", ("org/name", "", None)),
        ("a-b/c_d.e@v1.0", ("a-b/c_d.e", "", "v1.0")),
        ("org/name/x y.ckpt@refs/pr/2", ("org/name", "x y.ckpt", "refs/pr/2")),
        ("org/name/a/b.pt", ("org/name", "a/b.pt", None)),
        ("org/name.safetensors", None), ("org/name.CKPT", None), ("name", None), ("/a/b", None),
        ("org/name/", None), ("org//x", None), ("org/name/../x", None), ("org/name@", None),
        ("org/name@a@b", None), ("./name/x", None), ("org/name/a\nb", None), ("\u00f6/name", None),
    ],
)  # fmt: skip
def test_which_texts_are_names_on_the_hub(text, parts):
    assert hub.parse(text) == parts


def test_a_place_in_the_hubs_cache_has_its_repositorys_name(tmp_path):
    inside = tmp_path / "hub/models--org--my-name/snapshots" / ("a" * 40)
    assert hub.whence(inside) == "org/my-name"
    assert hub.whence(inside / "vae/x.bin") == "org/my-name/vae/x.bin"
    for other in (inside.parent, inside.parent.parent / "blobs/x", tmp_path / "model.ckpt", ""):
        assert hub.whence(other) == ""


def test_without_the_hubs_package_a_name_says_what_to_fetch(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name/a.ckpt@v1", "pip install huggingface_hub", "its folder: a.ckpt")


def test_what_stands_in_a_config_is_not_a_path(there, repositories, tmp_path):
    """An index of shards that names a file elsewhere; what is fetched is only what is listed."""
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../../secret.safetensors"}}))
    needed, place = hub.choose(
        "org/x",
        ["config.json", "diffusion_pytorch_model.safetensors.index.json", "../secret.safetensors"],
        {"vae": ("diffusion_pytorch_model.safetensors",)},
    )
    assert needed == ["config.json", "diffusion_pytorch_model.safetensors.index.json"]
    assert place == ""
