"""Write README.md's table of what was checked, from a run of test_sd.py.

    python tests/write_table.py

The tests print a line for each figure, with checked() in reference.py:

    checked: what | against what | how close

Lines that differ only in the figure, as a parametrised test prints them, become one, which has the
largest number. So do neighbours that differ only in the first part: their row lists what was
checked. Rows stand in the order of the tests. Nothing is written if a test fails.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- checked -->", "<!-- /checked -->"
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[-+]\d+)?")


def number_in(figure):
    found = NUMBER.search(figure)
    return float(found[0].replace(",", "")) if found else 0.0


def table(output):
    """What pytest -rP printed -> the table's lines, in Markdown."""
    figures = {}  # {(what, against, the figure's words without its number): the largest figure}
    for line in re.findall(r"^checked: (.*)$", output, re.MULTILINE):
        what, against, figure = line.split(" | ")
        key = what, against, NUMBER.sub("", figure, count=1)
        figures[key] = max(figures.get(key, figure), figure, key=number_in)
    lines = ["| what | against | how close, at worst |", "|---|---|---|"]
    for (against, _), group in itertools.groupby(figures, key=lambda key: key[1:]):
        keys = list(group)
        figure = max((figures[key] for key in keys), key=number_in)
        figure = re.sub(r"e([-+])0(\d)", r"e\1\2", figure)  # 1e-05 -> 1e-5
        figure = figure.replace("relative error 0.0e+0", "equal")
        lines.append(f"| {'; '.join(what for what, *_ in keys)} | {against} | {figure} |")
    return lines


def main():
    command = [sys.executable, "-m", "pytest", "-rP", "test_sd.py"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        sys.exit(f"{run.stdout}\nREADME.md is as it was: test_sd.py did not pass.")
    readme = ROOT / "README.md"
    before, rest = readme.read_text("utf-8").split(START)
    after = rest.split(END)[1]
    lines = table(run.stdout)
    readme.write_text("\n".join([before + START, *lines, END + after]), "utf-8")
    print(f"wrote {len(lines) - 2} rows into README.md")


if __name__ == "__main__":
    main()
