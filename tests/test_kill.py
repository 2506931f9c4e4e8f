"""Kills, full disks and closed pipes: the short, repeatable part. kill.py tries many more.

Nothing the user had is lost, no file is half-written under its real name, and what a process that
was killed has left hidden is removed by the next run, but never a living process's.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

import sd
from convert_weights import clear_stale
from tests import kill
from tests.reference import ROOT


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = kill.make_bench(tmp_path_factory.mktemp("bench"))
    bench.counts = {name: {"write": 2} for name in kill.PROGRAMS}
    bench.seconds = dict.fromkeys(kill.PROGRAMS, 1.0)
    return bench


@pytest.fixture
def case(bench, tmp_path):
    """A folder with the user's things; afterwards nothing may be wrong there."""
    case = kill.Case(bench, random.Random(1), tmp_path).lay_out()
    yield case
    assert case.problems == [], case.story


# %% The writer itself -----------------------------------------------------------------------------
# One process imports sd, and forks for each case. It ends as a program would: 2 for an error.

NEW = b"new" * 10_000
WRITER = """
import json, os, signal, sys
from pathlib import Path

sys.path[:0] = sys.argv[1:3]
import kill, sd

def write(file):
    for _ in range(4):
        file.write(b"new" * 2500)

def run(i, plan, overwrite):
    kill.disturb(plan)
    try:
        sd.write_complete(Path(str(i), "a.bin"), write, overwrite)
    except OSError:
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code
    return 0

def end(number, frame):
    sys.exit(128 + number)

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, end)
statuses = []
for i, (plan, overwrite) in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        os._exit(run(i, plan, overwrite))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


@pytest.fixture
def write(tmp_path):
    """Call sd.write_complete once for each plan, over a file that is there, and see what is there
    afterwards. -> [(plan, exit status, hidden files that are left, what is wrong)]"""

    def write(plans, overwrite):
        folders = [tmp_path / str(i) for i in range(len(plans))]
        for folder in folders:
            folder.mkdir()
            (folder / "a.bin").write_bytes(b"old")
        command = [sys.executable, "-c", WRITER, ROOT, ROOT / "tests"]
        given = json.dumps([(plan, overwrite) for plan in plans])
        done = subprocess.run(
            command, input=given, text=True, capture_output=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        looked = zip(plans, json.loads(done.stdout), folders)
        return [(plan, status, *look(folder, status, overwrite)) for plan, status, folder in looked]

    def look(folder, status, overwrite):
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        hidden = kill.parts(files)
        old, real = files.pop("a.bin"), {name: files[name] for name in files.keys() - hidden}
        wrong = [f"{name} has {len(data)} bytes" for name, data in real.items() if data != NEW]
        wrong += (
            ["the old file is lost"] if old != b"old" and not (overwrite and old == NEW) else []
        )
        wrong += ["nothing was written"] if status == 0 and NEW not in (old, *real.values()) else []
        for name in hidden:
            os.utime(folder / name, (time.time() - 3600,) * 2)
        clear_stale(folder)
        left = kill.parts(file.name for file in folder.iterdir())
        return hidden, wrong + [f"{name} was not cleared" for name in left]

    return write


def calls_of(overwrite, plain):
    """-> the calls that the writer makes, each with how often at most"""
    calls = dict.fromkeys(("mkstemp", "flock", "flush", "fsync", "fchmod", "unlink"), 1)
    calls |= {"write": 4} | ({"replace": 1} if overwrite or plain else {})
    return calls | ({} if overwrite else {"link": 2}) | ({"open": 2} if plain else {})


KINDS = pytest.mark.parametrize(
    "overwrite, plain", [(True, False), (False, False), (False, True)], ids=str
)


@KINDS
def test_a_signal_in_any_window_of_the_writer_loses_nothing(write, overwrite, plain):
    ends = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
    plans = [
        {"call": call, "n": n, "when": when, "what": what, "plain": plain}
        for call, most in calls_of(overwrite, plain).items()
        for n in range(1, most + 1)
        for when in ("before", "after")
        for what in ends
    ]
    results = write(plans, overwrite)
    assert [result for result in results if result[3]] == []
    reached = {plan["call"] for plan, status, *_ in results if status == ends[plan["what"]]}
    assert reached | {"open"} >= calls_of(overwrite, plain).keys()  # no name need be reserved


@KINDS
def test_any_call_of_the_writer_may_fail(write, overwrite, plain):
    """A full or broken disk: all or nothing, and no hidden file but one that can't be removed."""
    plans = [
        {"call": call, "n": n, "when": "fails", "what": what, "plain": plain, "always": always}
        for call, most in calls_of(overwrite, plain).items()
        for n in range(1, most + 1)
        for what in ("ENOSPC", "EIO")
        for always in (False, True)
    ]
    results = write(plans, overwrite)
    assert [result for result in results if result[3]] == []
    assert all(status in (0, 2) for _, status, *_ in results)
    assert not any(hidden for plan, _, hidden, _ in results if plan["call"] != "unlink")
    assert {plan["call"] for plan, status, *_ in results if status == 2} >= {"write", "fsync"}


@pytest.mark.parametrize("what", ["EPERM", "EOPNOTSUPP", "EMLINK"])
def test_without_hard_links_a_file_is_written_all_the_same(write, what):
    plan = {"call": "link", "n": 1, "when": "fails", "what": what, "always": True}
    [(_, status, hidden, wrong)] = write([plan], overwrite=False)
    assert (status, hidden, wrong) == (0, set(), [])


# %% Programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("redirect", kill.REDIRECTS)
def test_closed_and_full_streams_cost_no_picture(case, redirect):
    if "/dev/full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    program = kill.paint()
    ran = case.run(program, redirect=redirect)
    assert ran.status == (2 if redirect.startswith(">/dev/full") else 0)
    if redirect == ">/dev/full":
        assert "sd.py: the standard output is not writable" in ran.err
    case.check(program, all_there=True)


@pytest.mark.parametrize("gone", kill.GONE, ids=" ".join)
def test_readers_that_are_gone_cost_no_picture(case, gone):
    program = kill.paint()
    assert case.run(program, gone=gone).status == 0
    case.check(program, all_there=True)


@pytest.mark.parametrize("i", range(3))
def test_names_that_cannot_be_shown_are_no_problem(case, i):
    if sys.platform == "darwin":
        pytest.skip("there names are UTF-8")
    output, prompt = kill.STRANGE[i] + ".png", kill.STRANGE[i - 1]
    program = kill.paint(count=1, output=output, more=["--prompt", prompt])
    assert case.run(program, **kill.LOCALES[-i]).status == 0
    case.check(program, all_there=True)


@pytest.mark.parametrize(
    "name, plan",
    [
        ("paint", {"call": "write", "n": 9, "when": "after", "what": "SIGTERM"}),
        ("plain", {"call": "replace", "n": 2, "when": "after", "what": "SIGKILL"}),
        ("convert", {"call": "write", "n": 500, "when": "after", "what": "SIGHUP"}),
        ("over", {"call": "write", "n": 500, "when": "after", "what": "SIGINT"}),
        ("over", {"call": "write", "n": 900, "when": "after", "what": "SIGKILL"}),
        ("over", {"call": "write", "n": 900, "when": "fails", "what": "ENOSPC"}),
        ("model", {"limit": 10_000_000}),
        ("paint", {"call": "link", "n": 1, "always": True, "when": "fails", "what": "EPERM"}),
    ],
    ids=str,
)
def test_a_program_that_is_disturbed_loses_nothing(case, name, plan):
    """And the next run finds all as it should be."""
    kill.disturbed(case, name, plan)


def test_three_processes_that_take_the_same_name_keep_all_pictures(case):
    case.rng.random = lambda: 1.0  # none is killed
    kill.together(case)
    assert len(case.new()) == 8


def test_what_a_living_process_has_half_written_is_left_alone(case):
    kill.alive(case)


def test_a_hidden_name_that_is_no_file_is_left_alone(case):
    """One that is gone again when it is opened, as another process's may be, is like a link to
    nothing."""
    (case.folder / f".folder{kill.PART}").mkdir()
    (case.folder / f".nothing{kill.PART}").symlink_to("nowhere")
    os.mkfifo(case.folder / f".pipe{kill.PART}")
    program = kill.paint()
    assert case.run(program).status == 0
    case.check(program, all_there=True)


# %% The check -------------------------------------------------------------------------------------


def test_the_check_finds_what_is_wrong(case):
    """What the tests above never see, or else they would fail."""
    folder, found = case.folder, lambda: [*kill.check_files(case.folder, case.before)]
    assert found() == []
    whole = (ROOT / "tiny" / "red-house.png").read_bytes()
    (folder / "whole.png").write_bytes(whole)
    shutil.copy(sd.TINY, folder / "whole.flat.safetensors")
    assert found() == []
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    Image.new("RGB", (64, 64)).save(folder / "textless.png")
    half = sd.TINY.read_bytes()[:1_000_000]
    (folder / "half.flat.safetensors").write_bytes(half)
    (folder / "tmpabc").touch()
    names = "empty.png", "half.flat.safetensors", "half.png", "textless.png", "tmpabc"
    assert [line.split(",")[0] for line in found()] == [f"incomplete: {name}" for name in names]
    for name in names:
        (folder / name).unlink()
    (folder / "out.png").write_bytes(whole)
    (folder / "notes.txt").unlink()
    assert found() == ["lost: notes.txt", "changed: out.png"]


@pytest.mark.parametrize(
    "status, err, sent, fine",
    [
        (0, "step 1/1", None, True), (2, "sd.py: no", None, True), (-9, "", "SIGKILL", True),
        (1, "KeyboardInterrupt", "SIGINT", True), (120, "", None, False),
        (1, "", None, False), (-9, "", None, False), (-15, "", "SIGINT", False),
        (130, f"Traceback: {ROOT}: KeyboardInterrupt", "SIGINT", False),
        (0, "Exception ignored", None, False),
    ],
)  # fmt: skip
def test_the_check_knows_how_a_program_may_end(status, err, sent, fine):
    assert bool([*kill.check_ran(kill.Ran(status, "", err, sent))]) != fine
