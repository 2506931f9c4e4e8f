"""The fuzzer finds what it should, and in a few hundred cases nothing else.

`python tests/fuzz.py` tries more of them.
"""

import subprocess
import sys

from tests.reference import ROOT


def fuzz(*options):
    """-> exit status, what it printed"""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout


def test_a_few_cases_of_each_format_are_read_or_refused():
    status, said = fuzz("--cases", 15)
    assert status == 0 and "240 cases" in said, said


def test_the_fuzzer_can_fail():
    """It names a leak, harm, a crash, a hang and the rest, each by its case."""
    bad = ["leak", "harm-process", "harm-import", "harm-file", "crash", "hang", "memory", "escape"]
    bad += ["warning", "leftover"]
    status, said = fuzz("--cases", 1, "--formats", ",".join(bad))
    assert status == 1
    outcomes, *rows = [line.split() for line in said.splitlines()[: len(bad) + 1]]
    for name, *counts in rows:
        (found,) = (outcomes[i + 1] for i, count in enumerate(counts) if count == "1")
        assert found == name.split("-")[0].upper(), said
        assert f"{name}:0 (1 like it)" in said
