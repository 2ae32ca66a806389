"""The locks beside this file: what `make setup` installs, every file by its hash.

Law: a lock belongs to the dependency tables it was made from. Each begins with their fingerprint,
so that `check` sees without a network when pyproject.toml has moved on. No lock holds an address.

Run by `make lock` and `make check`; needs nothing of ours installed but `tomli` on Python 3.10.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UV = Path(sys.executable).with_name("uv")
LOCKS = {"py310.txt": "3.10", "py312.txt": "3.12"}
# Not torch: its only wheel for Linux brings 5 GB of CUDA; a site that trains with it adds it.
EXTRAS = ("tensorflow", "fhe", "grpc", "ui", "dev")
# The oldest Debian and Ubuntu with a Python 3.10 have glibc 2.35; TensorFlow's wheels ask for 2.27.
PLATFORM = "x86_64-manylinux_2_28"


def fingerprint() -> str:
    """SHA-256 in hex over everything in pyproject.toml that a lock is made from."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tables["project"]
    chosen = {
        "requires-python": project["requires-python"],
        "dependencies": project["dependencies"],
        "extras": {extra: project["optional-dependencies"][extra] for extra in EXTRAS},
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def header() -> str:
    return f"# Made by `make lock`; change pyproject.toml instead. Made from {fingerprint()}\n"


def check() -> int:
    """0 when both locks were made from today's pyproject.toml, else 1 and a sentence on stderr."""
    stale = [name for name in LOCKS if not (HERE / name).read_text().startswith(header())]
    if stale:
        names = ", ".join(stale)
        print(f"{names}: made from another pyproject.toml: run `make lock`", file=sys.stderr)
    return 1 if stale else 0


def compile_lock(name: str, source: str, options: list[str]) -> None:
    """Resolve `source` (a file, or "-" for uv itself) into the lock `name`.

    Versions already in it stay while they fit, unless `--upgrade` is among the options.
    """
    lock = HERE / name
    command = [str(UV), "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate"]
    command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links"]
    command += ["--python-platform", PLATFORM, "--output-file", str(lock), *options, source]
    subprocess.run(command, cwd=ROOT, check=True, input=b"uv", stdout=subprocess.DEVNULL)
    lock.write_text(header() + lock.read_text(encoding="utf-8"), encoding="utf-8")


def write(options: list[str]) -> int:
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    for name, version in LOCKS.items():
        compile_lock(name, "pyproject.toml", ["--python-version", version, *extras, *options])
    compile_lock("uv.txt", "-", ["--python-version", "3.10", *options])
    return 0


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["check"] else write(sys.argv[2:]))
