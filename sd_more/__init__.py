"""What people want besides sd.py, one subject a module; sd.py needs none of it."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  what pip checks, nobody has who copied the files
    sys.exit(f"sd.py needs Python 3.11 or later, and this is {sys.version.split()[0]}.")
