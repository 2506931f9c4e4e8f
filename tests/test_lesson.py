"""examples/stable_diffusion.ipynb: what it says of itself and of sd.py, and that it runs.

    pip install -e '.[test,notebook]' && pytest -m notebook

runs it, in a clean kernel; plain pytest only reads it.
"""

import ast
import base64
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sd
from tests.write_lesson import LESSON, METADATA, execute, read, to_text

CELLS = read()["cells"]
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in CELLS}
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "\n\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
LESSONS, SOLUTIONS = PROSE.split("\n## Solutions", 1)


def code_of(cells):
    return "\n".join("".join(cell["source"]) for cell in cells)


# %% The file --------------------------------------------------------------------------------------


def test_it_is_a_notebook_as_the_script_writes_it():
    """Valid, small, in the order of a clean run, and nothing of the machine that ran it in it."""
    text = LESSON.read_text("utf-8")
    assert text == to_text(read()) and len(text.encode()) < 400_000
    notebook = read()
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == METADATA
    assert len(SOURCES) == len(CELLS) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in SOURCES)
    for cell in CELLS:
        outputs = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"id", "cell_type", "metadata", "source"} | outputs
        assert cell["metadata"] == {}, "times or states of a cell"
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert {o["output_type"] for cell in CODE for o in cell["outputs"]} == {
        "stream", "display_data",
    }  # fmt: skip
    said = [o for cell in CODE for o in cell["outputs"] if o["output_type"] == "stream"]
    assert {o["name"] for o in said} == {"stdout"}
    places = (
        r"/(home|root|tmp|usr|Users|work)/|site-packages|0x[0-9a-f]{6}|\d\d:\d\d:\d\d|20\d\d-\d\d"
    )
    plain = re.sub(r'"image/png": ".*?"', "", text)
    assert not re.search(places, plain)


def test_its_lines_are_no_wider_than_a_files():
    for source in SOURCES.values():
        assert all(len(line) <= 100 for line in source.splitlines())


def test_its_code_is_clean():
    """It parses, and ruff, which reads notebooks, finds nothing."""
    for cell in CODE:
        ast.parse("".join(cell["source"]))
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", str(LESSON)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


# %% The lesson ------------------------------------------------------------------------------------


def test_every_question_has_an_answer_and_every_exercise_a_solution():
    parts = re.split(r"\n## ", LESSONS)[1:]
    assert [int(re.match(r"\d+", part)[0]) for part in parts] == list(range(1, len(parts) + 1))
    for part in parts:
        kinds = re.findall(r"\*\*(Predict|Answer|Exercise)\b", part)
        assert kinds.count("Predict") == kinds.count("Answer") == 1, part[:60]
        assert kinds.index("Predict") < kinds.index("Answer")
        asked, answered = part.split("**Answer")
        letters = [re.findall(r"\(([a-z])\)", text) for text in (asked, answered)]
        assert sorted(set(letters[0])) == sorted(set(letters[1])), part[:60]
    exercises = re.findall(r"\*\*Exercise (\d+)\.\*\*", LESSONS)
    solutions = re.findall(r"\*\*Solution (\d+)\.\*\*", SOLUTIONS)
    assert exercises == solutions == [str(i) for i in range(1, len(exercises) + 1)]
    assert len(exercises) >= 8
    solved = [i for i in SOURCES if i.startswith("solution-")]
    assert len(solved) >= len(exercises)


def attributes(tree, name):
    """-> the attributes that are asked of that name."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if getattr(node.value, "id", None) == name}


def test_what_it_names_of_sd_py_is_there(tiny):
    tree = ast.parse(code_of(CODE))
    named = attributes(tree, "sd")
    assert len(named) >= 8
    for text in re.findall(r"`([^`]+)`", PROSE):
        named |= set(re.findall(r"\bsd\.([A-Za-z_]\w*)", text)) - {"py"}
    assert not [name for name in named if not hasattr(sd, name)]
    assert not [name for name in attributes(tree, "model") if not hasattr(tiny, name)]
    assert not [name for name in attributes(tree, "schedule") if not hasattr(tiny.schedule, name)]


def test_the_sections_it_names_are_there():
    """ "section 7", "sections 1, 5 and 7"."""
    marks = set(re.findall(r"^# %% (\d+)\. ", sd.SOURCE.read_text("utf-8"), re.MULTILINE))
    lists = re.findall(r"sections? (\d+(?:, \d+)*(?: and \d+)?)", PROSE)
    named = {number for each in lists for number in re.findall(r"\d+", each)}
    assert len(named) > 5 and named <= marks


def test_it_needs_nothing_but_sd_py():
    """And what sd.py needs, and IPython, which every notebook has."""
    tree = ast.parse(code_of(CODE))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in names}
    assert tops <= {"sd", "mlx", "numpy", "PIL", "IPython"} | sys.stdlib_module_names


# %% It runs ---------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def close(text, other):
    """The same words, and numbers that differ by two units of their last printed digit at most."""
    if NUMBER.sub("#", text).split() != NUMBER.sub("#", other).split():
        return False
    for a, b in zip(NUMBER.findall(text), NUMBER.findall(other)):
        unit = 10.0 ** -len(a.partition(".")[2])
        if abs(float(a) - float(b)) > 2.01 * unit:
            return False
    return True


def pixels(output):
    code = "".join(output["data"]["image/png"])
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"), float)


@pytest.mark.parametrize(
    ("text", "other", "good"),
    [("a 1.25 b", "a 1.27 b", True), ("a 1.25", "a 1.29", False), ("a 1.25", "b 1.25", False),
     ("3  4", " 3 5", True), ("3 4", "3", False)],
)  # fmt: skip
def test_close_tells_float_noise_from_other_numbers(text, other, good):
    assert close(text, other) == good


@pytest.mark.notebook
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "alone"])
def test_it_runs_and_shows_what_is_written_in_it(alone, tmp_path):
    """From the top in a clean kernel, with sd_more/ and with sd.py alone: no cell fails, and every
    output is the committed one: text but for float noise, pictures but for the chosen colours."""
    again = execute(tmp_path, alone)
    for old, new in zip(CELLS, again["cells"], strict=True):
        assert old["source"] == new["source"]
        if alone:  # it says once that it is slower
            told = [o for o in new.get("outputs", ()) if o.get("name") == "stderr"]
            new["outputs"] = [o for o in new.get("outputs", ()) if o not in told]
            assert all("sd_more/ is not there" in "".join(o["text"]) for o in told)
        for was, now in zip(old.get("outputs", ()), new.get("outputs", ()), strict=True):
            assert was["output_type"] == now["output_type"], old["id"]
            if was["output_type"] == "stream":
                a, b = "".join(was["text"]), "".join(now["text"])
                assert close(a, b), f"{old['id']}: committed\n{a}\nnow\n{b}"
            else:
                assert abs(pixels(was) - pixels(now)).mean() < 1, old["id"]
