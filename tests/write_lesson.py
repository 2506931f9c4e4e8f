"""Run examples/stable_diffusion.ipynb in a clean kernel, and write what it shows into it.

    pip install -e '.[notebook]' && python tests/write_lesson.py

The notebook runs in a folder of its own, where nothing of this repository lies beside it. What
would change from run to run or tell of the machine is not kept: times, the kernel's versions.
Nothing is written if a cell fails.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LESSON = ROOT / "examples" / "stable_diffusion.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# As a first cell: sd_more/ cannot be found, wherever it is installed.
HIDE = 'import sys; sys.modules["sd_more"] = None'


def read():
    return json.loads(LESSON.read_text("utf-8"))


def to_text(notebook):
    """A notebook as it stands in the file: one line of it a line, letters as they are."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def execute(folder, alone=False):
    """-> the notebook with new outputs, run in that empty folder. alone: from sd.py and the
    miniature's file beside it, and nothing else. Raises nbclient's CellExecutionError."""
    import nbclient
    import nbformat

    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {"IPYTHONDIR": str(folder / "ipython")}  # no start-up files
    if alone:
        environment.pop("PYTHONPATH", None)
        shutil.copy(ROOT / "sd.py", folder)
        (folder / "tiny").mkdir()
        shutil.copy(ROOT / "tiny" / "tiny.safetensors", folder / "tiny")
    else:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, places)])
    notebook = nbformat.read(LESSON, as_version=4)
    if alone:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(HIDE))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    return tidy(notebook.cells[1:] if alone else notebook.cells)


def tidy(cells):
    """-> a notebook of these cells, without what changes from run to run."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = number
    for cell in cells:
        cell.metadata = {}
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.loads(json.dumps(by_lines(notebook), sort_keys=True))


def by_lines(notebook):
    """Sources and printed text as lists of lines, as notebooks have them on the disk."""
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].splitlines(keepends=True)
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = output["text"].splitlines(keepends=True)
    return notebook


def main():
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(Path(folder))
    LESSON.write_text(to_text(notebook), "utf-8")
    print(f"wrote {LESSON.relative_to(ROOT)}, {LESSON.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
