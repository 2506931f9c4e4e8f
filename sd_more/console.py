"""Around a program: what it says, and how it ends.

with command("sd.py"):
    ...
"""

import contextlib
import io
import os
import signal
import sys
import warnings

import sd


class Steady:
    """Standard output or error as something that never fails: what a terminal can't show, or would
    obey, is escaped, and when nobody reads it any more, or its disk is full, the work goes on.
    """

    def __init__(self, stream):
        self.stream, self.problem = stream or io.StringIO(), None  # it may be closed
        self.lines = 0  # that were written

    def write(self, text):
        code = self.stream.encoding or "utf-8"
        self.lines += text.count("\n")
        if text != "\r":  # which begins the line anew, and is not part of a name
            text = "".join(c if c in "\n\t" else sd.printable(c) for c in text)
        try:
            self.stream.write(text.encode(code, "backslashreplace").decode(code))
            self.stream.flush()
        except OSError as error:
            self.problem = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def command(name):
    """Around a program: what the user can mend ends in one line and exit status 2, without a
    traceback. Ctrl-C and kill end it only after what is half written is removed.
    """
    for number in range(3):  # what is opened next must not become a closed standard error
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    quiet = warnings.catch_warnings(action="ignore")  # what matters of them is said in words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), signals(), quiet:
        try:
            yield
            if out.problem and not isinstance(out.problem, BrokenPipeError):
                raise sd.SDError(f"the standard output is not writable ({out.problem.strerror}).")
        except FileNotFoundError as error:
            stop(name, f"there is no file {error.filename}. Is the name right?")
        except OSError as error:
            stop(name, f"{error.filename or 'a file'}: {error.strerror or error}.")
        except sd.SDError as error:
            stop(name, error)
        except MemoryError:
            stop(name, "there is not enough memory for this. Try smaller or fewer pictures.")
        except KeyboardInterrupt:
            sd.say("")  # behind the line that tells the progress
            stop(name, "stopped", 130)


def stop(name, message, status=2):
    sd.say(f"{name}: {message}")
    sys.exit(status)


@contextlib.contextmanager
def signals():
    """Ctrl-C, kill and a closed terminal as exceptions, where nobody has chosen otherwise."""
    old = {}
    handlers = {signal.SIGINT: signal.default_int_handler}
    handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), lambda n, _: sys.exit(128 + n))
    for number, handler in handlers.items():
        if signal.getsignal(number) == signal.SIG_DFL:
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
