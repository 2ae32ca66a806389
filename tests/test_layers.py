"""Which file may import what, checked against the tree.

A failure here is a question about design: does the file belong in another folder, or should what
it wanted arrive as an argument?
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("broker", "controller", "deploy", "learner", "native_c", "proto")

# What a folder may take from the other folders.
MAY_IMPORT = {
    "proto": (),
    "native_c": (),
    "deploy": ("proto", "broker.client"),
    "broker": ("proto", "deploy"),
    "controller": ("proto", "native_c", "broker.client", "deploy"),
    "learner": ("proto", "native_c", "broker.client", "deploy"),
}

# Only think: no clock, socket, file, thread, luck or logging. Whatever they need is an argument.
PURE = (
    "broker.access",
    "broker.dispatch",
    "broker.effects",
    "broker.enrolment",
    "broker.lane",
    "broker.offences",
    "broker.retention",
    "broker.sequencer",
    "broker.session",
    "broker.status",
    "broker.window",
    "controller.answers",
    "controller.conductor",
    "controller.effects",
    "controller.lease",
    "controller.messages",
    "controller.patience",
    "controller.plan",
    "controller.quorum",
    "controller.record",
    "controller.round",
    "controller.scheduling",
    "controller.snapshot",
    "controller.state",
    "controller.status",
    "deploy.audit_line",
    "deploy.audit_refusals",
    "deploy.bucket",
    "deploy.restarts",
    "deploy.view",
    "learner.ceremony",
    "learner.task",
    "learner.task_events",
    "proto.bulk",
    "proto.ceremony",
    "proto.chunk",
    "proto.ckks",
    "proto.ckks_key",
    "proto.credit",
    "proto.enrolment",
    "proto.envelope",
    "proto.errors",
    "proto.events",
    "proto.frame_parts",
    "proto.frames",
    "proto.limits",
    "proto.live_frames",
    "proto.records",
    "proto.topics",
)
PURE_LIBRARIES = (
    *("__future__", "abc", "base64", "binascii", "bisect", "collections", "contextlib", "copy"),
    *("dataclasses", "decimal", "enum", "errno", "fractions", "functools", "hashlib", "heapq"),
    *(
        "hmac",
        "itertools",
        "json",
        "math",
        "operator",
        "re",
        "string",
        "struct",
        "types",
        "typing",
        "zlib",
    ),
    *("google.protobuf", "msgpack", "numpy", "zmq.utils.z85"),
)
IMPURE_BUILTINS = frozenset({"breakpoint", "exec", "eval", "input", "open", "print"})

# What the other services link against, and the files behind it: the broker's own store and service
# are never dragged along.
CLIENT = "broker.client"
BEHIND_CLIENT = (
    "broker.client",
    "broker.credentials",
    "broker.feed",
    "broker.link",
    "broker.outbox",
    "broker.trouble",
    "broker.waiters",
)

# A heavy or delicate package enters through one file each. `deploy.examples` is what a user would
# write: applications that only a learner loads.
DOORS = {
    "tensorflow": ("learner.keras_trainer", "deploy.examples"),
    "keras": ("learner.keras_trainer", "deploy.examples"),
    "torch": ("learner.torch_trainer", "deploy.examples"),
    "sklearn": ("learner.sklearn_trainer", "deploy.examples"),
    "openfhe": ("learner.openfhe_door",),
    "nacl": ("deploy.sealing", "deploy.signing"),
    "cffi": ("native_c",),
    "_cffi_backend": ("native_c",),
    "metisfl.native_c._ffi": ("native_c",),
}
HEARTBEATS = ("heartbeat_ivl", "heartbeat_timeout", "heartbeat_ttl")
HEAVY = ("tensorflow", "keras", "torch", "sklearn", "openfhe")

FILES = [
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.name.endswith("_pb2.py")
]


def module_of(path: Path) -> str:
    """`broker/client.py` -> `broker.client`, `broker/__init__.py` -> `broker`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}".strip(".")
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_folder_imports_only_what_lies_below_it(path: Path) -> None:
    folder = path.parts[0]
    for line, name in imports(tree_of(path)):
        assert not name.startswith("."), f"{path}:{line} imports {name}: say it in full, metisfl.…"
        head, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if head == "metisfl" and other in FOLDERS and other != folder:
            assert any(within(rest, allowed) for allowed in MAY_IMPORT[folder]), (
                f"{path}:{line} imports {name}, but {folder} may import only "
                f"{', '.join(MAY_IMPORT[folder]) or 'the standard library and packages'}"
            )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_heavy_package_has_one_door(path: Path) -> None:
    for line, name in imports(tree_of(path)):
        for package, doors in DOORS.items():
            if within(name, package):
                assert any(within(module_of(path), door) for door in doors), (
                    f"{path}:{line} imports {name}: only {' and '.join(doors)} may"
                )


@pytest.mark.parametrize("module", PURE)
def test_a_pure_file_only_thinks(module: str) -> None:
    assert module in MODULES, f"{module} is listed as pure but is not there: renamed?"
    path = MODULES[module]
    for line, name in imports(tree_of(path)):
        ours = name.removeprefix("metisfl.")
        if ours != name:
            assert within(ours, "proto") or any(within(ours, other) for other in PURE), (
                f"{path}:{line} imports {name}: a pure file takes only proto and pure files"
            )
        else:
            assert any(within(name, library) for library in PURE_LIBRARIES), (
                f"{path}:{line} imports {name}: pass what it wants as an argument instead"
            )
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in IMPURE_BUILTINS, f"{path}:{node.lineno} calls {node.func.id}"


def test_the_broker_client_brings_nothing_of_the_broker_along() -> None:
    """Follows its imports inside `broker`."""
    seen: set[str] = set()
    waiting = [CLIENT]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for line, name in imports(tree_of(MODULES[module])):
            ours = name.removeprefix("metisfl.")
            if ours == name or within(ours, "proto"):
                continue
            neighbour = next((m for m in sorted(MODULES, reverse=True) if within(ours, m)), ours)
            assert neighbour in (*PURE, *BEHIND_CLIENT), (
                f"{MODULES[module]}:{line} imports {name}, and {CLIENT} reaches it: only proto, "
                f"pure files and {', '.join(BEHIND_CLIENT)} may be behind it"
            )
            if neighbour not in seen:
                waiting.append(neighbour)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_socket_has_heartbeats_of_the_transport(path: Path) -> None:
    """With them libzmq aborts the process when a receive queue is full (libzmq#4364)."""
    for node in ast.walk(tree_of(path)):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        assert str(name).lower() not in HEARTBEATS, (
            f"{path}:{getattr(node, 'lineno', '?')} sets {name}: use application beats and TCP "
            "keepalive"
        )


# Runs in a fresh interpreter: what is imported here already would hide what a daemon imports.
WITHOUT_HEAVY = f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is not for this process", name=name)

sys.meta_path.insert(0, Missing())
importlib.import_module(sys.argv[1])
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""


@pytest.mark.parametrize("service", ["broker", "controller", "learner"])
def test_a_service_starts_where_the_heavy_packages_are_missing(service: str) -> None:
    """Broker and controller never need them; a learner tells it is ready before it imports them."""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_HEAVY, f"metisfl.{service}.service"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]", f"imported after all: {ran.stdout}"
