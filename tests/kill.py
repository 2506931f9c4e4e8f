"""Kills, full disks and closed pipes: nothing the user had is lost, and nothing half-written stays.

    python tests/kill.py [--kills 400] [--seed 1] [--kinds paint,convert] [--only 17]

Each case runs a program in a new folder that holds things of the user's, and disturbs it, at a
random time or at a chosen call of the writer. Afterwards what was there must have the same bytes,
what is new under a real name must be complete, nothing but a message may be on stderr, and one more
run must leave none of the hidden files that a writer begins with. --only repeats one case of the
same --seed and --kinds. Random times are shares of how long an undisturbed run takes, so that they
are repeated as well as the machine allows. The exit status is 1 if a case failed.
"""

import argparse
import builtins
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PART = ".sd-part"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")

# %% Inside the program ----------------------------------------------------------------------------
# `python tests/kill.py --inside PLAN sd.py ...` is `python sd.py ...`, disturbed as the plan says:
#   call, n, when, what   the n-th call of this name raises a signal "before" or "after" it, or
#                         "fails" with an error; always: the calls after it fail, too
#   plain                 a simple file system, without hard links and nameless temporary files
#   limit                 the largest size of a file, in bytes
#   counts                the file to write to how often each was called

CALLS = {"mkstemp": tempfile, "flock": fcntl}
CALLS |= dict.fromkeys(("fsync", "fchmod", "link", "replace", "unlink"), os)
NAMES = (*CALLS, "open", "write", "flush")


class File:
    """A file whose writing is watched."""

    def __init__(self, file, around):
        self.file = file
        self.write, self.flush = around("write", file.write), around("flush", file.flush)

    def writelines(self, lines):
        for line in lines:
            self.write(bytes(line))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def disturb(plan):
    """Put the plan around the writer's calls. -> how often each was called, as it goes on"""
    counts = collections.Counter()

    def around(name, real):
        def call(*args, **options):
            counts[name] += 1
            hit = counts[name] == plan.get("n")
            hit |= plan.get("always", False) and counts[name] > plan["n"]
            when = plan["when"] if hit and name == plan["call"] else None
            if when == "fails":
                fail(plan["what"], name, real, *args)
            if when == "before":
                signal.raise_signal(signal.Signals[plan["what"]])
            result = real(*args, **options)
            if when == "after":
                if name == "write":
                    real.__self__.flush()
                signal.raise_signal(signal.Signals[plan["what"]])
            return result

        return call

    if plan.get("plain"):
        tempfile._O_TMPFILE_WORKS = False
        os.link = functools.partial(fail, "EPERM", "link", None)
    if "limit" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], plan["limit"]))
    for name, module in CALLS.items():
        setattr(module, name, around(name, getattr(module, name)))
    watch_open(around)
    return counts


def fail(what, name, real, *args):
    """The error, where it is possible: half of what is written may be there, and what is not there
    cannot be removed in any case."""
    if name == "write":
        real(bytes(args[0])[: len(bytes(args[0])) // 2])
        real.__self__.flush()
    if name == "unlink":
        os.stat(args[0])
    raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))


def watch_open(around):
    real = builtins.open
    reserve = around("open", real)

    def watched(path, mode="r", *args, **options):
        if mode == "xb":
            return reserve(path, mode, *args, **options)
        file = real(path, mode, *args, **options)
        return File(file, around) if mode == "wb" and str(path).endswith(PART) else file

    builtins.open = watched


def inside(plan, script, *args):
    plan = json.loads(plan)
    counts = disturb(plan)
    sys.argv, sys.path[0] = [str(ROOT / script), *args], str(ROOT)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if "counts" in plan:
            Path(plan["counts"]).write_text(json.dumps(counts))


# %% What must be true afterwards ------------------------------------------------------------------


class Ran(NamedTuple):
    """A program that has ended."""

    status: int
    out: str
    err: str
    signal: str | None = None  # the one that it was sent


def snapshot(folder):
    """-> {name: digest} of every file in the folder, hidden ones too"""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def parts(names):
    return {name for name in names if name.endswith(PART)}


def incomplete(path):
    """-> what is wrong with a file that has its real name; None for one that is complete"""
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    import sd

    try:
        if path.suffix == ".png":
            with sd.Image.open(path) as picture:
                picture.load()
                return None if picture.text.get("parameters") else "it has no text"
        if path.name.endswith(".flat.safetensors"):
            sd.read_flat(path)
            return None
    except (OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:120]
    return "nobody asked for it"


def check_files(folder, before, may_change=()):
    """Yield what is wrong in a folder, of which there is a snapshot from before."""
    after = snapshot(folder)
    for name in sorted(before.keys() - after.keys() - parts(before)):
        yield f"lost: {name}"
    for name in sorted(after.keys() - parts(after)):
        if before.get(name, after[name]) != after[name] and name not in may_change:
            yield f"changed: {name}"
        elif before.get(name) != after[name] and (why := incomplete(folder / name)):
            yield f"incomplete: {name}, {(folder / name).stat().st_size} bytes ({why})"


def check_ran(ran):
    """Yield what is wrong with how a program ended."""
    if ran.signal == "SIGINT" and "KeyboardInterrupt" in ran.err and str(ROOT) not in ran.err:
        return  # Ctrl-C before the program's first line is Python's own business
    if re.search("Traceback|Exception ignored|Fatal Python|lost sys", ran.err):
        yield f"a traceback: {ran.err.strip()[-400:]}"
    allowed = {0, 2, 129, 130, 143} | ({-signal.Signals[ran.signal]} if ran.signal else set())
    if ran.status not in allowed:
        yield f"exit status {ran.status}: {ran.err.strip()[-200:]}"


# %% Programs --------------------------------------------------------------------------------------


@dataclass
class Program:
    """A command line, how many files it makes, which it may replace, and how it is disturbed."""

    args: list
    makes: int = 0
    replaces: tuple = ()
    plan: dict = field(default_factory=dict)


def paint(steps=1, seed=42, count=3, output="out.png", more=()):
    size = ["--width", "64", "--height", "64", "--seed", str(seed), "--save-every", "1"]
    args = ["sd.py", *size, "--steps", str(steps), "--n-images", str(count), "--output", output]
    return Program([*args, *more], steps * count)


MODEL = ("--model", "models/small.ckpt")
PROGRAMS = ("paint", "plain", "model", "convert", "over")


def choose(name, steps=1):
    """paint; plain, the same on a simple file system; model, which is converted first; ..."""
    if name in ("paint", "plain"):
        program = paint(steps)
        program.plan |= {"plain": True} if name == "plain" else {}
        return program
    if name == "model":
        return Program(paint(steps, more=MODEL).args, 3 * steps + 1)
    output = {"convert": "new", "over": "old"}[name] + ".flat.safetensors"
    args = ["convert_weights.py", "models/small.ckpt", "-o", output]
    return Program(args, int(name == "convert"), (output,))


@dataclass
class Bench:
    """What all cases share: the user's large files, and facts of undisturbed runs."""

    folder: Path
    seconds: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)  # {program: {call: how often}}


def make_bench(folder):
    """A small random model in PyTorch's format, and an older flat file of it."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.reference import original_names, small_networks

    weights = {name: w.half() for name, w in original_names(*small_networks()).items()}
    torch.save({"state_dict": weights}, folder / "small.ckpt")
    command = [sys.executable, ROOT / "convert_weights.py", "small.ckpt", "--dtype", "bfloat16"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return Bench(folder)


def measure(bench):
    """Run each program undisturbed, to know how long it takes and how often it calls what."""
    for name in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            case, program = Case(bench, random.Random(0), Path(folder)).lay_out(), choose(name, 2)
            start, counts = time.perf_counter(), case.folder / "models/counts"
            case.run(program, {"counts": str(counts)})
            bench.seconds[name] = time.perf_counter() - start
            bench.counts[name] = json.loads(counts.read_text())
            counts.unlink()
            case.check(program)
            if case.problems or any(ran.status for ran in case.ran):
                sys.exit(f"Undisturbed, {name} fails: {case.problems} {case.ran}")


# %% A case ----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A folder with the user's things, and what ran in it."""

    bench: Bench
    rng: random.Random
    folder: Path
    ran: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    story: list = field(default_factory=list)

    def lay_out(self):
        (self.folder / "models").mkdir()
        shutil.copy(self.bench.folder / "small.ckpt", self.folder / "models")
        old = self.folder / "old.flat.safetensors"
        shutil.copy(self.bench.folder / "small.flat.safetensors", old)
        (self.folder / "out.png").write_bytes(b"mine, and no picture")
        (self.folder / "notes.txt").write_text("mine, too")
        (self.folder / f".left{PART}").write_text("left by a process that was killed")
        self.age()
        self.before = snapshot(self.folder)
        return self

    def age(self):
        """Make hidden files look older than those that may be just about to be locked."""
        for part in self.folder.rglob(f".*{PART}"):
            os.utime(part, (time.time() - 3600,) * 2)

    def start(self, program, plan=None, redirect="", gone=(), **env):
        """redirect: as a shell writes it. gone: the streams that nobody reads any more."""
        plan = program.plan | (plan or {})
        self.story.append(
            " ".join(map(str, (*program.args, plan or "", redirect, *gone, env or "")))
        )
        command = [sys.executable, str(ROOT / program.args[0]), *program.args[1:]]
        if plan:
            command = [sys.executable, __file__, "--inside", json.dumps(plan), *program.args]
        if redirect:
            command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
        env = os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")} | env
        streams = {name: subprocess.PIPE for name in ("stdout", "stderr")}
        with contextlib.ExitStack() as stack:
            for name in gone:
                reader, streams[name] = os.pipe()
                os.close(reader)
                stack.callback(os.close, streams[name])
            return subprocess.Popen(command, cwd=self.folder, env=env, **streams)

    def end(self, process, sent=None):
        said = (text or b"" for text in process.communicate(timeout=300))
        out, err = (text.decode("utf-8", "surrogateescape") for text in said)
        self.ran.append(Ran(process.returncode, out, err, sent))
        self.problems += check_ran(self.ran[-1])
        return self.ran[-1]

    def run(self, program, plan=None, **how):
        what = (plan or {}).get("what", "")
        return self.end(self.start(program, plan, **how), what if what.startswith("SIG") else None)

    def kill(self, process, seconds):
        """A signal at a random time, half of them near the end, where files are written."""
        share = self.rng.uniform(0.6 * self.rng.randint(0, 1), 1.1)
        sent = self.rng.choice(SIGNALS)
        self.story.append(f"{sent} at {share:.3f} of {seconds:.2f} s")
        time.sleep(share * seconds)
        process.send_signal(signal.Signals[sent])
        return sent

    def new(self):
        """The names that were not there before, hidden ones aside."""
        names = snapshot(self.folder).keys() - self.before.keys()
        return sorted(names - parts(names))

    def check(self, *programs, all_there=False):
        """Find what is wrong with the files. all_there: whatever the exit status."""
        replaced, now = {n for program in programs for n in program.replaces}, snapshot(self.folder)
        self.problems += check_files(self.folder, self.before, replaced)
        wrote = {*self.new(), *(n for n in replaced if now.get(n) != self.before.get(n))}
        if wrote and len(self.ran) == 1 and "Nothing was written" in self.ran[0].err:
            self.problems.append(f"it says that nothing was written, but wrote {sorted(wrote)}")
        makes = sum(program.makes for program in programs)
        if (all_there or not any(ran.status for ran in self.ran)) and len(self.new()) != makes:
            self.problems.append(f"{makes} files were to be made, but there are {self.new()}")

    def again(self, program):
        """One more run, undisturbed: all is well, and what was left hidden is gone."""
        self.age()
        between = snapshot(self.folder)
        if status := self.run(program).status:
            self.problems.append(f"the next run fails ({status}): {self.ran[-1].err[-200:]}")
        found = [*check_files(self.folder, between, program.replaces)]
        found += [f"never cleared: {name}" for name in sorted(parts(snapshot(self.folder)))]
        self.problems += [f"after the next run: {what}" for what in found]


# %% Kinds of cases --------------------------------------------------------------------------------


def random_time(name, case):
    program = choose(name, case.rng.randint(1, 3))
    process = case.start(program)
    case.end(process, case.kill(process, case.bench.seconds[name]))
    case.check(program)
    case.again(program)


def chosen_moment(names, calls, case):
    """A signal before or after one of the writer's calls."""
    name = case.rng.choice(names)
    when, what = case.rng.choice(["before", "after"]), case.rng.choice(SIGNALS)
    disturbed(case, name, draw_call(case, name, calls) | {"when": when, "what": what})


def draw_call(case, name, calls=NAMES):
    """-> the name of a call that the program makes, and which of them"""
    counts = {call: n for call, n in case.bench.counts[name].items() if call in calls}
    call = case.rng.choice(sorted(counts))
    return {"call": call, "n": case.rng.randint(1, counts[call])}


def disturbed(case, name, plan):
    program = choose(name, case.rng.randint(1, 3))
    ran = case.run(program, plan)
    case.check(program)
    case.again(program)
    return ran


def failing_call(case):
    """A full or a broken disk, at one of the writer's calls and perhaps from then on."""
    name = case.rng.choice(PROGRAMS)
    plan = draw_call(case, name) | {"when": "fails", "always": case.rng.random() < 0.5}
    disturbed(case, name, plan | {"what": case.rng.choice(["ENOSPC", "EIO", "EDQUOT"])})


ODD = (("link", "EPERM"), ("link", "EOPNOTSUPP"), ("link", "EMLINK"), ("fchmod", "EPERM"))
ODD += (("flock", "ENOLCK"), ("flock", "EOPNOTSUPP"))


def odd_disk(case):
    """A file system that refuses what a picture can do without: it must be there all the same."""
    call, what = case.rng.choice(ODD)
    plan = {"call": call, "n": 1, "always": True, "when": "fails", "what": what}
    if disturbed(case, "paint", plan).status:
        case.problems.append(f"no picture was saved where {call} fails: {case.ran[0].err[-120:]}")


def size_limit(case):
    """No file may be larger than this, as with some quotas."""
    name = case.rng.choice(PROGRAMS)
    most = 30_000_000 if name in ("convert", "over") else 12_000
    disturbed(case, name, {"limit": case.rng.randrange(most)})


def full_disk(case):
    """A disk with room for a part of what is to be written; where none can be made, a limit."""
    outside, disk = case.folder, case.folder / "disk"
    disk.mkdir()
    if not mount(disk, "size=300m"):
        size_limit(case)
        return
    try:
        case.folder = disk
        case.lay_out()
        name = case.rng.choice(PROGRAMS)
        room = int(case.rng.uniform(0, 60_000 if name in ("paint", "plain") else 35_000_000))
        case.story.append(f"on a disk with room for {room} bytes")
        mount(disk, f"remount,size={shutil.disk_usage(disk).used + room}")
        program = choose(name, 2)
        case.run(program)
        case.check(program)
        mount(disk, "remount,size=300m")
        case.again(program)
    finally:
        case.folder = outside
        subprocess.run(["umount", disk], check=True)


def mount(folder, options):
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    found = shutil.which("mount")
    return found and not subprocess.run(command, capture_output=True, check=False).returncode


def together(case):
    """Three processes that all paint out.png at once; one may be killed."""
    seeds = [1, 11, 21]
    programs = [paint(seed=seed, count=2) for seed in seeds]
    several(case, programs, case.bench.seconds["paint"] * 2)
    texts = [(case.folder / name).read_bytes() for name in case.new()]
    found = {int(seed) for text in texts for seed in re.findall(rb"Seed: (\d+)", text)}
    done = {seed for ran, seed in zip(case.ran, seeds) if ran.status == 0}
    if lost := {i for seed in done for i in (seed, seed + 1)} - found:
        case.problems.append(f"the pictures with the seeds {sorted(lost)} were saved, but are gone")
    case.check(*programs)
    case.again(programs[0])


def one_model(case):
    """Two processes that convert the same checkpoint at once, and paint; one may be killed."""
    program = paint(more=MODEL)
    several(case, [program] * 2, case.bench.seconds["model"] * 1.5)
    case.check(program, program, Program([], 1))
    case.again(program)


def several(case, programs, seconds):
    processes = [case.start(program) for program in programs]
    sent = case.kill(processes[0], seconds) if case.rng.random() < 0.6 else None
    for process in processes:
        case.end(process, sent if process is processes[0] else None)


def alive(case):
    """A process that is held up while it writes keeps its hidden file, and goes on later."""
    name, other = case.rng.choice(PROGRAMS), case.rng.choice(PROGRAMS)
    plan = draw_call(case, name, ("write", "flush", "fsync", "fchmod", "link"))
    first, second = choose(name, 2), choose(other)
    process = case.start(first, plan | {"when": "before", "what": "SIGSTOP"})
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"it ended with {status} before it was held up"
    case.age()
    held = parts(snapshot(case.folder)) - case.before.keys()
    case.run(second)
    lost = held - snapshot(case.folder).keys()
    case.problems += [f"taken from a process that is alive: {name}" for name in sorted(lost)]
    process.send_signal(signal.SIGCONT)
    if case.end(process).status:
        case.problems.append(f"the process that was held up fails: {case.ran[-1].err[-200:]}")
    replaced = *first.replaces, *second.replaces
    case.problems += check_files(case.folder, case.before, replaced)
    case.again(choose("convert"))


REDIRECTS = [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full >&-"]
REDIRECTS += [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"]
GONE = [["stdout"], ["stderr"], ["stdout", "stderr"]]
OTHERS = {  # that write nothing
    "help": ["sd.py", "--help"], "tokens": ["sd.py", "--show-tokens"],
    "nonsense": ["sd.py", "--nonsense"],
    "info": ["convert_weights.py", "--info", "models/small.ckpt"],
}  # fmt: skip


def streams(case):
    """Standard streams that are closed, full, or that nobody reads."""
    name = case.rng.choice(["paint", "paint", "convert", *OTHERS])
    program = Program(OTHERS[name]) if name in OTHERS else choose(name)
    closed = case.rng.random() < 0.7 and Path("/dev/full").exists()
    redirect = case.rng.choice(REDIRECTS) if closed else ""
    gone = () if closed else case.rng.choice(GONE)
    ran = case.run(program, redirect=redirect, gone=gone)
    wanted = {2} if name == "nonsense" or redirect.startswith(">/dev/full") else {0}
    if ran.status not in wanted | ({0} if name == "help" else set()):
        case.problems.append(f"exit status {ran.status}, where {wanted} was right")
    if ran.status == 2 and not ran.err and "2>" not in redirect and "stderr" not in gone:
        case.problems.append("exit status 2 without a word")
    case.check(program, all_there=True)


STRANGE = ["caf\u00e9 \u5bcc\u5dbd", os.fsdecode(b"caf\xe9"), "two\nlines", "\x1b[31m"]
LOCALES = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}]
LOCALES += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


def strange_names(case):
    """Names and prompts that the terminal cannot show."""
    prompt, output = case.rng.choice(STRANGE), case.rng.choice(STRANGE) + ".png"
    program = paint(count=1, output=output, more=["--prompt", prompt])
    ran = case.run(program, **case.rng.choice(LOCALES))
    refused = sys.platform == "darwin" and ran.status == 2  # there names must be UTF-8
    if ran.status and not refused:
        case.problems.append(f"exit status {ran.status}: {ran.err[-200:]}")
    case.check(program, all_there=not refused)


KINDS = {name: functools.partial(random_time, name) for name in PROGRAMS}
KINDS |= {"moment": functools.partial(chosen_moment, PROGRAMS, NAMES)}
RESERVING = ("open", "replace", "link", "unlink")
KINDS |= {"nolink": functools.partial(chosen_moment, ["plain"], RESERVING)}
KINDS |= {"fails": failing_call, "odd": odd_disk, "limit": size_limit, "disk": full_disk}
KINDS |= {"together": together, "onemodel": one_model, "alive": alive}
KINDS |= {"streams": streams, "names": strange_names}

# %% Command line ----------------------------------------------------------------------------------


def run_case(bench, seed, kinds, number):
    """-> kind, how it ended, what was wrong, what was done"""
    kind = kinds[number % len(kinds)]
    rng = random.Random(f"{seed}/{number}/{kind}")
    with tempfile.TemporaryDirectory() as folder:
        case = Case(bench, rng, Path(folder)).lay_out()
        try:
            KINDS[kind](case)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            case.problems.append(f"{type(error).__name__}: {error}")
    status = case.ran[0].status if case.ran else 0
    ended = {0: "complete", 2: "message"}.get(status, "killed" if status < 0 else "stopped")
    return kind, ended, list(dict.fromkeys(case.problems)), case.story


def show(results, kinds):
    columns = "complete", "message", "stopped", "killed", "failed"
    print("\n" + "".join(f"{word:>10}" for word in ("kind", *columns)))
    for kind in kinds:
        mine = [(ended, bool(wrong)) for of, ended, wrong, _ in results if of == kind]
        counts = collections.Counter(ended for ended, _ in mine)
        counts["failed"] = sum(wrong for _, wrong in mine)
        print("".join(f"{word:>10}" for word in (kind, *(counts[c] for c in columns))))
    print(f"\n{len(results)} cases, {sum(bool(wrong) for _, _, wrong, _ in results)} failed")


def main():
    parser = argparse.ArgumentParser(description="Kills, full disks and closed pipes.")
    parser.add_argument("--kills", type=int, default=400, help="how many cases; default 400")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default %(default)s")
    parser.add_argument("--only", type=int, metavar="N", help="repeat this case alone")
    args = parser.parse_args()
    kinds, results = args.kinds.split(","), []
    os.nice(10)
    # What was ignored where this was started would be ignored by the programs, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    numbers = range(args.kills) if args.only is None else [args.only]
    chosen = "" if args.kinds == ",".join(KINDS) else f"--kinds {args.kinds} "
    repeat = f"python tests/kill.py --seed {args.seed} {chosen}--only"
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        bench = make_bench(Path(folder))
        measure(bench)
        run = functools.partial(run_case, bench, args.seed, kinds)
        for number, result in zip(numbers, pool.map(run, numbers)):
            results.append(result)
            kind, _, wrong, story = result
            if wrong:
                lines = [f"{kind} {number} failed", *wrong, *story, f"{repeat} {number}"]
                print(*(ascii(line)[1:-1] for line in lines), sep="\n    ", flush=True)
    show(results, kinds)
    sys.exit(any(wrong for _, _, wrong, _ in results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        main()
