"""Makes a virtual environment with pip, also where Debian's python3-venv is not installed.

Debian splits `ensurepip` off its Python. Without it, pip comes from the package index through any pip
that this interpreter has; where there is none at all, the message says what to install.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Make the environment named on the command line; 0 on success."""
    folder = Path(sys.argv[1])
    if sys.version_info < (3, 11):  # noqa: UP036 - the interpreter that runs this may be any
        print(f"{sys.executable} is Python {sys.version.split()[0]}; expected 3.11 or newer: make env PYTHON=python3.11", file=sys.stderr)
        return 2
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return subprocess.call([sys.executable, "-m", "venv", str(folder)])
    if importlib.util.find_spec("pip") is None:
        print("this Python has neither ensurepip nor pip; install one: apt-get install python3-venv", file=sys.stderr)
        return 2
    if importlib.util.find_spec("virtualenv") is None:
        made = subprocess.call([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        target = next(folder.glob("lib/python3*/site-packages"), None)
        if made or target is None:
            return made or 2
        return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "pip"])
    return subprocess.call([sys.executable, "-m", "virtualenv", str(folder)])


if __name__ == "__main__":
    sys.exit(main())
