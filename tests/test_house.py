"""The house: what stands where, who may use whom, and that what is written is what runs.

Most of it is read off the source, without running it. The last part holds what comments say of
numbers against the numbers.
"""

import ast
import graphlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import sd
from tests.reference import ROOT

SOURCE = (ROOT / "sd.py").read_text("utf-8")
TREE = ast.parse(SOURCE)
PARTS = {"sd": "sd.py", "convert_weights": "convert_weights.py"}  # the modules at the top
FOLDERS = ("sd_more", "tiny", "examples", "tests")
FILES = ["sd.py", "convert_weights.py", "test_sd.py"] + [
    str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
]


# %% What stands where -----------------------------------------------------------------------------


def sections(path):
    """-> [(line, title)] of a file's # %% marks."""
    lines = enumerate((ROOT / path).read_text("utf-8").splitlines(), 1)
    found = [(i, re.fullmatch(r"# %% (.+?) -+", line)) for i, line in lines]
    return [(i, match[1]) for i, match in found if match]


@pytest.mark.parametrize("path", ["sd.py", "convert_weights.py"])
def test_the_contents_in_the_docstring_are_the_sections(path):
    """The same numbers and titles, from 1 on."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8")))
    (contents,) = (p for p in text.split("\n\n") if re.match(r"(I +)?1 [A-Z]", p.strip()))
    titles = re.findall(r"(?<!\d)(\d+) ([A-Za-z].*?)(?=  |\n|$)", contents)
    marks = [title.split(". ", 1) for _, title in sections(path)]
    assert [int(n) for n, _ in marks] == list(range(1, len(marks) + 1))
    assert sorted(map(tuple, marks)) == sorted(titles)


@pytest.mark.parametrize("path", FILES)
def test_sections_have_one_mark(path):
    """# %% and dashes up to column 100: a ruler, something to search for, a notebook's cell."""
    for line in (ROOT / path).read_text("utf-8").splitlines():
        if line.startswith("# %"):
            assert re.fullmatch(r"# %% \S.*\S -+", line) and len(line) == 100, line


BUDGETS = {"sd.py": 1750, "convert_weights.py": 1600, "test_sd.py": 1000, "README.md": 200}


@pytest.mark.parametrize("path", BUDGETS)
def test_a_file_is_no_longer_than_it_may_be(path):
    """Whoever adds a line takes one away."""
    assert len((ROOT / path).read_text("utf-8").splitlines()) <= BUDGETS[path]


def test_part_one_is_short():
    """1,040 lines, from the idea to the whole class, and it says where it ends."""
    lines = SOURCE.splitlines()
    starts = {title: i for i, title in sections("sd.py")}
    first, end = starts["1. The idea"], starts["9. Flat files, PyTorch's noise"]
    assert end - first <= 1040
    assert "That is Stable Diffusion." in "\n".join(lines[end - 20 : end])


# %% Who may use whom ------------------------------------------------------------------------------


def imports(path):
    """-> {(module, whether it is imported when the file is)}, relative names made absolute."""
    found, package = set(), path.replace("/", ".").rsplit(".", 2)[0] if "/" in path else ""

    def visit(node, at_once):
        if isinstance(node, ast.Import):
            found.update((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found.add((base, at_once))
            found.update((f"{base}.{alias.name}", at_once) for alias in node.names)
        lazy = isinstance(node, (ast.FunctionDef, ast.Lambda))
        lazy |= isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, at_once and not lazy)

    visit(ast.parse((ROOT / path).read_text("utf-8")), True)
    return found


TINY = {path.stem for path in (ROOT / "tiny").glob("*.py")}
BESIDE = {path.stem for path in (ROOT / "sd_more").glob("*.py")} - {"__init__"}
BELOW = {f"sd_more.{name}" for name in ("console", "palettes", "check", "references", "vae")}
OURS = {*PARTS, *FOLDERS, "test_sd", *TINY}


def uses(path):
    """-> the modules of this project that a file imports."""
    return {name for name, _ in imports(path) if name.split(".")[0] in OURS}


def allowed(path):
    """The arrows: what a file may import of this project, as the starts of names."""
    if path == "sd.py":
        return {"sd_more", "sd_more.fast", "sd_more.app"}
    if path == "convert_weights.py":
        return {"sd", "sd_more.formats", *BELOW}
    if path.startswith("sd_more/") and path[:-3].replace("/", ".") in BELOW:
        return {"sd", "sd_more.formats", *BELOW}
    if path.startswith(("sd_more/fast/", "sd_more/formats/")):
        return {path.rsplit("/", 1)[0].replace("/", ".")}
    if path == "sd_more/app.py":
        return {"sd", "convert_weights", "sd_more"}
    if path.startswith("sd_more/"):
        others = {f"sd_more.{name}" for name in BESIDE - {"app"}}
        return {"sd", "convert_weights", "sd_more.fast", "sd_more.formats", *others}
    return OURS - ({"tests", "test_sd"} if path.startswith("tiny/") else set())


def test_no_arrow_leads_back():
    """Among the modules of sd_more/, too: one that uses another is not used by it."""
    graph = {
        name: {used.split(".")[1] for used in uses(f"sd_more/{name}.py") if "." in used} & BESIDE
        for name in BESIDE
    }
    assert set(graphlib.TopologicalSorter(graph).static_order()) == BESIDE


@pytest.mark.parametrize("path", FILES)
def test_the_arrows_point_down(path):
    """examples, tiny, tests -> app -> sd_more -> convert_weights -> sd, formats; sd -> fast."""
    rules = allowed(path)
    exact = {"sd_more"} if path == "sd.py" else set()
    good = lambda name: any(
        name == rule or name.startswith(rule + ".") and rule not in exact for rule in rules
    )
    # `from sd_more.fast import x` gives sd_more.fast and sd_more.fast.x; `from sd import x` sd.x.
    wrong = {name for name in uses(path) if not good(name)}
    assert not wrong, f"{path} must not import {wrong}"
    if path.startswith(("sd_more/fast/", "sd_more/formats/")):
        assert not {name for name in uses(path) if name.split(".")[0] in PARTS}


def test_sd_py_imports_sd_more_at_one_line_each_and_late():
    """The faster layers where a model is loaded, the further options where it is a program."""
    late = {(name, at_once) for name, at_once in imports("sd.py") if name.split(".")[0] in OURS}
    assert late == {
        ("sd_more", False), ("sd_more.fast", False), ("sd_more.app", False),
        ("sd_more.app.main", False),
    }  # fmt: skip
    assert len(re.findall(r"^ +(?:from|import) sd_more", SOURCE, re.MULTILINE)) == 2


def test_nothing_is_imported_but_five_packages():
    """And the hub's, by the one file that asks it, where somebody has installed it."""
    five = {"mlx", "numpy", "safetensors", "regex", "PIL"}
    for path in FILES:
        if path in PARTS.values() or path.startswith("sd_more/"):
            tops = {name.split(".")[0] for name, _ in imports(path)}
            optional = {
                "formats/hub.py": {"huggingface_hub"},
                "notebook.py": {"tqdm"},
                "references.py": {"torch", "diffusers", "transformers"},
            }
            more = optional.get(path.removeprefix("sd_more/"), set())
            assert tops <= five | more | OURS | sys.stdlib_module_names, path
            assert "import_module" not in (ROOT / path).read_text("utf-8")


def test_the_dependencies_are_the_same_five_in_both_places():
    """sd.py's inline metadata (PEP 723) and pyproject.toml."""
    inline = re.search(r"# /// script\n(.*?)# ///", SOURCE, re.DOTALL)[1]
    inline = tomllib.loads("\n".join(line.removeprefix("# ") for line in inline.splitlines()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline["dependencies"] == project["dependencies"]
    assert inline["requires-python"] == project["requires-python"]
    names = {re.match(r"[a-z]+", d)[0] for d in project["dependencies"]}
    assert names == {"mlx", "numpy", "safetensors", "regex", "pillow"}


# %% What is written is what runs ------------------------------------------------------------------


def test_sd_py_does_nothing_behind_the_readers_back():
    """No name made up, no attribute that may not be there, nothing hung on a class from outside."""
    nodes = list(ast.walk(TREE))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    named = {getattr(node.func, "id", None) for node in calls}
    assert not named & {"globals", "locals", "setattr", "delattr", "exec", "eval", "__import__"}
    assert "getattr" in named and "copy.copy" not in SOURCE and "deepcopy" not in SOURCE
    assert all(len(node.args) == 2 for node in calls if getattr(node.func, "id", "") == "getattr")
    shared = {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    stored = [node for node in attributes if not isinstance(node.ctx, ast.Load)]
    assert len(stored) > 50
    for node in stored:
        assert getattr(node.value, "id", None) not in shared, ast.unparse(node)


def test_every_name_of_sd_py_is_given_once():
    """No function or class of the file is defined twice, or replaced further down."""
    named = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = [node.name for node in named]
    assert len(names) == len(set(names)) > 70
    for node in TREE.body:
        if isinstance(node, ast.Assign):
            given = {target.id for target in node.targets if isinstance(target, ast.Name)}
            assert not given & set(names)
    for node in TREE.body:
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            assert len(methods) == len(set(methods)), node.name


def code(value):
    """What a function or a method of any kind runs."""
    return inspect.unwrap(getattr(value, "__func__", value)).__code__


def test_nothing_of_sd_py_is_another_after_everything_was_used(tiny, drawn, hole, monkeypatch):
    """Loading, painting and all of sd_more/ leave every function and method what it is in the
    file: compared with the file, run once more as another module."""
    for path in FILES:
        if path.startswith("sd_more/"):
            importlib.import_module(path.removesuffix(".py").replace("/", "."))
    tiny.inpaint("a tree", drawn, Image.fromarray((hole * 255).astype(np.uint8)), steps=1)
    spec = importlib.util.spec_from_file_location("fresh", ROOT / "sd.py")
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", fresh)  # dataclasses look there
    spec.loader.exec_module(fresh)
    compared = 0
    for name, written in vars(fresh).items():
        used = getattr(sd, name, None)
        if isinstance(written, types.FunctionType):
            assert code(used) == code(written), name
            compared += 1
        elif isinstance(written, type) and written.__module__ == "fresh":
            assert vars(used).keys() == vars(written).keys(), name
            for method, value in vars(written).items():
                if isinstance(value, (types.FunctionType, classmethod, staticmethod)):
                    assert code(vars(used)[method]) == code(value), f"{name}.{method}"
                    compared += 1
        elif name.isupper() and isinstance(written, (int, str, tuple, float)):
            assert used == written, name
    assert compared > 130
    methods = {name for name, value in vars(sd.StableDiffusion).items() if callable(value)}
    assert not methods & vars(tiny).keys()


EXCHANGED = (
    "Linear",
    "GEGLU",
    "Conv",
    "GroupNorm",
    "NormSilu",
    "LayerNorm",
    "Upsample",
    "Activation",
)
EXCHANGED += ("AttentionCore",)


@pytest.mark.parametrize("fast", [True, False])
def test_only_leaf_layers_are_exchanged(fast):
    """Those of the table, all of them, and with fast=False none. ResBlock, TransformerBlock and
    whole networks never are, nor is the shape of the tree."""
    model, exchanged = sd.StableDiffusion(fast=fast), set()
    for name, plain in sd.build_networks(model.config).items():
        used = getattr(model, name)
        assert type(used) is type(plain)
        mine, theirs = (dict(network.named_modules()) for network in (used, plain))
        assert mine.keys() == theirs.keys()
        for path, layer in theirs.items():
            if type(mine[path]) is not type(layer):
                exchanged.add(type(layer).__name__)
                name = type(layer).__name__
                assert name in EXCHANGED and (name == "Upsample" or not layer.children())
                assert type(mine[path]).__module__.startswith("sd_more.fast")
                assert not [k for k, v in vars(mine[path]).items() if isinstance(v, type(code))]
        names = ({n for n, _ in tree_flatten(network.parameters())} for network in (used, plain))
        assert next(names) == next(names)
    found = "GPU" if sd.on_gpu() else "CPU"
    assert exchanged == (set(EXCHANGED if found == "CPU" else ["AttentionCore"]) if fast else set())


def run_alone(folder, code, *args):
    """Python in a folder, where sd_more/ cannot be found, wherever it is installed."""
    code = f"import sys; sys.modules['sd_more'] = None; sys.argv = {list(args)!r}\n{code}"
    command = [sys.executable, "-c", code]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def close(a, b):
    """Two pictures that differ by no more than rounding: a level of 255."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


OPTIONS = {"seed": 7, "steps": 3, "width": 64, "height": 64}


def test_alone_in_a_folder_sd_py_paints_the_same_picture(tiny, tmp_path):
    """As a program, with nothing but a flat file beside it; and it says once that it is slower."""
    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copy(sd.TINY, tmp_path / "model.safetensors")
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    options += ["--model=model.safetensors", "--prompt=a red house at night"]
    code = "import runpy; runpy.run_path('sd.py', run_name='__main__')"
    done = run_alone(tmp_path, code, "sd.py", *options)
    assert done.stderr.count("sd_more") == 1 and "sd.py: sd_more/ is not there" in done.stderr
    assert done.stdout == "saved out.png\n" and "step 3" in done.stderr
    (picture,) = tiny.txt2img("a red house at night", **OPTIONS)
    assert close(picture, Image.open(tmp_path / "out.png"))
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"sd.py", "model.safetensors", "out.png"}


def test_alone_it_says_what_it_leaves_out(tmp_path):
    """Brackets, which it reads as letters, words beyond the 75th token, and a safety checker."""
    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copy(sd.TINY, tmp_path / "model.safetensors")
    code = "import runpy; runpy.run_path('sd.py', run_name='__main__')"
    prompt = "--prompt=" + "a (red) house " * 20 + "at the very end"
    small = ["--steps=1", "--width=64", "--height=64", "--model=model.safetensors"]
    said = run_alone(tmp_path, code, "sd.py", prompt, *small).stderr
    assert said.count("brackets") == said.count("at the very end") == 1
    metadata = sd.read_header(sd.TINY)
    safety = {"width": 64, "layers": 1, "heads": 1, "projection": 64}
    config = json.loads(metadata["config"]) | {"safety": safety}
    metadata["config"] = json.dumps(config)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), mx.load(str(sd.TINY)), metadata)
    assert "safety" in run_alone(tmp_path, code, "sd.py", *small).stderr


def test_a_notebooks_cell_paints_the_same_and_never_starts_the_command_line(tiny, tmp_path):
    """The text of sd.py, run as notebooks run a cell: __main__, without a __file__."""
    shutil.copy(sd.TINY, tmp_path / "model.safetensors")
    code = f"""
text = open({str(ROOT / "sd.py")!r}, encoding="utf-8").read()
exec(compile(text, "<ipython-input-1>", "exec"), globals())
assert HERE == Path.cwd()
StableDiffusion("model.safetensors").txt2img("a tree", **{OPTIONS})[0].save("cell.png")
"""
    done = run_alone(tmp_path, code, "ipykernel_launcher.py", "-f", "kernel.json")
    assert done.stdout == "" and done.stderr.count("sd.py: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "cell.png"}
    assert close(tiny.txt2img("a tree", **OPTIONS)[0], Image.open(tmp_path / "cell.png"))


def test_an_installed_sd_py_finds_the_miniature(tmp_path):
    """Beside it in sd_tiny/, as pip install lays it out; imported, it starts nothing."""
    (tmp_path / "site" / "sd_tiny").mkdir(parents=True)
    shutil.copy(ROOT / "sd.py", tmp_path / "site")
    shutil.copy(sd.TINY, tmp_path / "site" / "sd_tiny" / "tiny.safetensors")
    code = "sys.path.insert(0, 'site'); import sd; print(sd.TINY); sd.StableDiffusion()"
    done = run_alone(tmp_path, code, "sd.py")
    assert done.stdout.strip() == str(tmp_path / "site" / "sd_tiny" / "tiny.safetensors")


# %% What comments say -----------------------------------------------------------------------------

SCHEDULE = sd.Schedule(sd.scaled_linear())


TEXT = " ".join(line.strip().removeprefix("#").strip() for line in SOURCE.splitlines())


def said(pattern):
    """What sd.py says: the groups of the only place where this stands, as words and numbers."""
    found = re.findall(pattern, TEXT)
    assert len(found) == 1, f"{pattern!r} stands {len(found)} times in sd.py"
    return found[0]


def rounds_to(value, text):
    """A number, and how it is written."""
    digits = len(text.partition(".")[2])
    assert f"{value:.{digits}f}" == text, f"{value} is written {text}"


def test_the_examples_in_docstrings_are_true(tokenizer):
    """bpe("lighthouse") -> ... and the like."""
    found = 0
    for name, call in (
        ("bpe", lambda text: tokenizer.bpe(ast.literal_eval(text))),
        ("split", lambda text: tokenizer.split(ast.literal_eval(text))),
        ("leading", lambda text: SCHEDULE.timesteps("leading", int(text.split(", ")[1]))),
    ):
        for argument, result in re.findall(rf"\b{name}\(([^()]*)\) +-> +(.*[\])])", SOURCE):
            value, (start, dots, end) = call(argument), result.partition(", ..., ")
            if dots:
                start, end = ast.literal_eval(f"{start}]"), ast.literal_eval(f"[{end}")
                assert value[: len(start)] == start and value[-len(end) :] == end
            else:
                assert value == ast.literal_eval(result), argument
            found += 1
    assert found == 4
    (ids,) = re.findall(r'"a red house"\s+out\s+77 ids: \[([\d, ]+), \.\.\.\]', SOURCE)
    ids = [int(i) for i in ids.split(",")]
    assert tokenizer.encode("a red house")[: len(ids)] == ids and len(ids) >= 5


def test_the_numbers_of_the_schedule_are_true():
    """What is left of the signal and how much noise there is, at both ends; where runs begin."""
    for text, t in zip(
        said(r"abar +\"alpha bar\"[^:]*: (0\.\d+) to (0\.\d+)"), (0, 999), strict=True
    ):
        rounds_to(SCHEDULE.abar(t), text)
    for text, t in zip(said(r"sigma +sqrt[^:]*: (0\.\d+) to (\d+\.\d)"), (0, 999), strict=True):
        rounds_to(SCHEDULE.sigma(t), text)
    first, t, second, u = said(r"\(sigma is (\d+\.\d) at (\d{3}), (\d+\.\d) at (\d{3})\)")
    rounds_to(SCHEDULE.sigma(int(t)), first)
    rounds_to(SCHEDULE.sigma(int(u)), second)
    two, one = said(r"two at (\d+), (?:with )?one at (\d+)")
    assert [SCHEDULE.timesteps("leading", n)[0] for n in (2, 1)] == [int(two), int(one)]
    rounds_to(math.sqrt(1 - SCHEDULE.abar(0)), said(r"standard deviation of (0\.\d+) is left in"))


def test_the_ddim_step_in_numbers_is_true():
    """Section 7's example for a single latent: each number rounded as it stands there."""
    x, t, *factors, eps, x0, u = said(
        r"x = ([\d.]+) at t = (\d+), where sqrt\(abar\) = ([\d.]+) and sqrt\(1 - abar\) = ([\d.]+)"
        r", and the UNet says eps = ([\d.]+)\. So x0 = [^=;]* = ([\d.]+); at t = (\d+), "
    )
    *next_factors, x_next = said(
        rf"at t = {u}, where these are ([\d.]+) and ([\d.]+), x = [^=]* = ([\d.]+),"
    )
    for time, texts in ((int(t), factors), (int(u), next_factors)):
        rounds_to(math.sqrt(SCHEDULE.abar(time)), texts[0])
        rounds_to(math.sqrt(1 - SCHEDULE.abar(time)), texts[1])
    exact = SCHEDULE.remove_noise(float(x), float(eps), int(t))
    rounds_to(exact, x0)
    rounds_to(SCHEDULE.add_noise(exact, float(eps), int(u)), x_next)
    a, b = factors
    assert f"({x} - {b} * {eps}) / {a} = {x0}" in TEXT
    rounds_to((float(x) - float(b) * float(eps)) / float(a), x0)
    a, b = next_factors
    assert f"{a} * {x0} + {b} * {eps} = {x_next}" in TEXT
    rounds_to(float(a) * float(x0) + float(b) * float(eps), x_next)


def test_the_share_of_the_picture_at_the_end_is_true():
    """Section 6: what would be left of the picture at t = 999 without the scale, and what is."""
    deviation, percent = said(r"deviation of ([\d.]+) that they come with, (\d+) % of x's variance")
    abar = SCHEDULE.abar(999)
    rounds_to(1 / 0.18215, deviation)
    with_scale, without = (abar * v / (abar * v + 1 - abar) for v in (1, 1 / 0.18215**2))
    rounds_to(100 * without, percent)
    assert said("instead of (half a percent)") and 0.0045 < with_scale < 0.0055
    assert int(said(r"works on (\d+) times fewer numbers")) == 512 * 512 * 3 / (64 * 64 * 4)


def test_gelu_and_quick_gelu_differ_as_much_as_it_says():
    """By up to 0.02."""
    x = mx.linspace(-10, 10, 100_001)
    difference = mx.abs(sd.ACTIVATIONS["gelu"](x) - sd.ACTIVATIONS["quick_gelu"](x)).max()
    rounds_to(float(difference), said(r"quick_gelu[^.]* differs from it by up to ([\d.]+)\.")[:4])


def test_the_unets_eps_has_less_than_variance_1_near_the_end(tiny):
    """Section 1: there fine grain and noise look alike, and the mean answer is a cautious one."""
    rng = np.random.default_rng(0)
    pictures = np.stack([importlib.import_module("train").drawn(i) for i in range(50_000, 50_004)])
    x0 = tiny.encode(pictures.astype(np.float32) / 255)
    eps = mx.array(rng.standard_normal(x0.shape, np.float32))
    condition = sd.Condition(mx.repeat(tiny.encode_prompts([""]), len(pictures), axis=0))
    deviations = {}
    for t in (1, 981):
        answer = tiny.predict(SCHEDULE.add_noise(x0, eps, t), t, condition)
        deviations[t] = float(mx.sqrt(mx.var(answer)))
    assert deviations[1] < 0.9 and 0.95 < deviations[981] < 1.05
    assert said("eps has a variance (well below) the noise's 1")


def test_every_adams_bashforth_row_sums_to_one():
    """So that constant eps are followed exactly; and each is the mean of its polynomial."""
    assert [len(row) for row in sd.ADAMS_BASHFORTH] == [1, 2, 3, 4]
    for row in sd.ADAMS_BASHFORTH:
        assert sum(row) == pytest.approx(1, abs=1e-15)
        for degree in range(len(row)):  # the mean of s**degree over the coming step, 0 ... 1
            mean = sum(weight * (-k) ** degree for k, weight in enumerate(row))
            assert mean == pytest.approx(1 / (degree + 1), abs=1e-14)
