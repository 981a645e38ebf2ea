"""Check an installation: import every package of requirements.txt, print its version, and the device.

    python check_setup.py

Prints one line a package, then Python and the device that training will use. A package that is missing or can't be
imported is named with the command that mends it; the exit status is then 2. 01_setup.sh ends with this.
"""

import argparse
import importlib
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NOT_IMPORTED = {"sounddevice"}  # it needs PortAudio, and playing and listening, which are optional, say so themselves


def read_pins(path):
    """Return {package: version} of a requirements file's lines such as numpy==2.4.6."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([\w.+!-]+)", line)))


def check_package(package):
    """Return (version, None), or (what is printed instead of it, what is wrong), of a package named as its module."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing", "is not installed"
    if package in NOT_IMPORTED:
        return version, None
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # a broken binary raises anything: OSError, RuntimeError, SystemError ...
        reason = (str(error).splitlines() or ["no reason given"])[0]
        return f"{version}, broken", f"can't be imported ({type(error).__name__}: {reason})"
    return version, None


def describe_device():
    """Return the device that `--device auto` takes, with its name or number of threads."""
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else f"cpu ({torch.get_num_threads()} threads)"


def fail(problems):
    """Print a line a problem and return exit status 2."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    pins = read_pins(REQUIREMENTS)
    mend = f"{sys.executable} -m pip install --force-reinstall --no-deps"
    problems = []
    for package, pin in pins.items():
        version, problem = check_package(package)
        # PyTorch's own index adds the build to the version: 2.14.1+cpu is 2.14.1.
        differs = not problem and version.split("+")[0] != pin
        print(f"{package:<16} {version}" + (f" (requirements.txt has {pin})" if differs else ""), flush=True)
        if problem:
            problems.append(f"{package} {problem}; mend it with: {mend} {package}=={pin}")
    print(f"{'Python':<16} {platform.python_version()} ({sys.executable})", flush=True)
    if problems:
        sys.exit(fail(problems))
    if "torch" in pins:
        print(f"{'device':<16} {describe_device()}")


if __name__ == "__main__":
    main()
