"""Key pairs and lists of known keys, in plain text files of one `keys` folder.

Rule: a secret never leaves the file that it was made in. `identity.key` is created with mode 0600,
never overwritten and never printed; `peers` and `servers` hold public keys only, one to a line.
A public key may contain `#`, so a comment is a line that starts with `#`, never the end of one.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.topics import check_name

__all__ = [
    "IDENTITY_FILE",
    "PEERS_FILE",
    "PRINCIPALS_ALLOWED",
    "SERVERS_FILE",
    "Identity",
    "add_peer",
    "add_server",
    "check_mode",
    "check_principal",
    "create_identity",
    "is_public_key",
    "load_identity",
    "load_peers",
    "load_servers",
    "write_new",
]

IDENTITY_FILE = "identity.key"
PEERS_FILE = "peers"
SERVERS_FILE = "servers"
SERVER_PRINCIPALS = ("broker", "controller")
NAMED_ROLES = ("learner", "driver")
PRINCIPALS_ALLOWED = "broker, controller, learner:<name> or driver:<name>"
FILE_BYTES_MAX = 4 << 20  # about 35,000 lines; checked before a file is read

IDENTITY_TEXT = """\
# MetisFL key pair of {principal}. Keep this file secret and on this machine: whoever has it can
# act as {principal}. Others need only the public key, which `metisfl keys show` prints.
principal {principal}
public {public}
secret {secret}
"""
PEERS_TEXT = """\
# Who may connect to this server: one `principal publickey` to a line. Keys not listed are refused.
"""
SERVERS_TEXT = """\
# The servers that this site trusts: `broker publickey` and `controller publickey`.
"""


@dataclass(frozen=True, slots=True)
class Identity:
    """One principal's CURVE key pair; keys in Z85, 40 bytes each. The secret stays out of repr."""

    principal: str
    public: bytes
    secret: bytes = field(repr=False)

    @property
    def public_line(self) -> str:
        """What others put into their `peers` or `servers` file."""
        return f"{self.principal} {self.public.decode()}"


def check_principal(text: str) -> str:
    """Return `text` if it is a principal, else raise UserError that says what is allowed."""
    role, colon, name = text.partition(":")
    if role in NAMED_ROLES and colon:
        check_name(name, f"{role} name")
    elif text not in SERVER_PRINCIPALS:
        raise UserError(f"principal {text!r}: use {PRINCIPALS_ALLOWED}")
    return text


def create_identity(folder: Path, principal: str) -> Identity:
    """Make a new key pair and write it to `folder`/identity.key, which must not exist.

    Raises UserError for a bad principal or an existing file, MachineError if it cannot be written.
    """
    check_principal(principal)
    public, secret = zmq.curve_keypair()
    identity = Identity(principal, public, secret)
    text = IDENTITY_TEXT.format(principal=principal, public=public.decode(), secret=secret.decode())
    path = folder / IDENTITY_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new(path, text.encode())
    except FileExistsError:
        raise UserError(
            f"{path} exists and a key pair is never overwritten; to make a new one, move the old "
            "file away first and replace its public key at the other sites afterwards"
        ) from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None
    return identity


def load_identity(folder: Path) -> Identity:
    """Read `folder`/identity.key. Raises UserError if it is missing, damaged or open to others."""
    path = folder / IDENTITY_FILE
    remedy = f"make one with `metisfl keys identity PRINCIPAL --folder {folder}`"
    fields: dict[str, str] = {}
    for number, words in _lines(path, remedy, mode_refused=0o077):
        if len(words) != 2 or words[0] not in ("principal", "public", "secret"):
            # The line is not shown: it may hold the secret.
            raise UserError(
                f"{path}:{number}: expected `principal NAME`, `public KEY` or `secret KEY`"
            )
        if words[0] in fields:
            raise UserError(f"{path}:{number}: a second {words[0]!r} line; keep one")
        fields[words[0]] = words[1]
    missing = [name for name in ("principal", "public", "secret") if name not in fields]
    if missing:
        raise UserError(f"{path}: no line {' and no line '.join(missing)}; {remedy}")
    principal = _principal_at(str(path), fields["principal"])
    public, secret = fields["public"].encode(), fields["secret"].encode()
    if not (is_public_key(public) and is_public_key(secret)) or zmq.curve_public(secret) != public:
        raise UserError(f"{path}: public and secret are not a key pair; the file is damaged")
    return Identity(principal, public, secret)


def load_peers(folder: Path) -> dict[bytes, str]:
    """Read `folder`/peers: public key (Z85) -> principal. Raises UserError."""
    remedy = "create it, with one line `principal publickey` for each site that may connect"
    return {key: principal for principal, key in _load_list(folder / PEERS_FILE, remedy).items()}


def load_servers(folder: Path, *needed: str) -> dict[str, bytes]:
    """Read `folder`/servers: "broker" and/or "controller" -> public key (Z85).

    Raises UserError, also if one of `needed` is not there.
    """
    path = folder / SERVERS_FILE
    remedy = "create it, with the lines that the operator of broker and controller gave you"
    servers = _load_list(path, remedy)
    for principal in servers:
        if principal not in SERVER_PRINCIPALS:
            raise UserError(f"{path}: {principal!r} is not a server; use broker or controller")
    for principal in needed:
        if principal not in servers:
            raise UserError(f"{path} has no line for the {principal}")
    return servers


def add_peer(folder: Path, principal: str, public: bytes) -> None:
    """Add a line to `folder`/peers. The same line twice is one; a conflict raises UserError."""
    _add(folder / PEERS_FILE, PEERS_TEXT, principal, public)


def add_server(folder: Path, principal: str, public: bytes) -> None:
    """Add a line to `folder`/servers. The same line twice is one; a conflict raises UserError."""
    if principal not in SERVER_PRINCIPALS:
        raise UserError(f"server {principal!r}: use broker or controller")
    _add(folder / SERVERS_FILE, SERVERS_TEXT, principal, public)


def _load_list(path: Path, remedy: str) -> dict[str, bytes]:
    """Read lines `principal z85key`, in file order."""
    keys: dict[str, bytes] = {}
    lines: dict[str | bytes, int] = {}  # where each principal and each key was first seen
    for number, words in _lines(path, remedy, mode_refused=0o002):
        if len(words) != 2:
            raise UserError(
                f"{path}:{number}: {len(words)} words; allowed is `principal publickey`"
            )
        principal, key = _principal_at(f"{path}:{number}", words[0]), words[1].encode()
        if not is_public_key(key):
            raise UserError(
                f"{path}:{number}: {words[1]!r} is not a public key: 40 characters, as printed by "
                "`metisfl keys show`"
            )
        for seen in (principal, key):
            if seen in lines:
                what = "principal" if seen is principal else "key"
                raise UserError(f"{path}:{number}: the {what} of line {lines[seen]} again")
            lines[seen] = number
        keys[principal] = key
    return keys


def _add(path: Path, heading: str, principal: str, public: bytes) -> None:
    check_principal(principal)
    if not is_public_key(public):
        raise UserError(f"{public!r} is not a public key: 40 characters of Z85")
    known = _load_list(path, "") if path.exists() else {}
    if known.get(principal) == public:
        return
    if principal in known or public in known.values():
        raise UserError(
            f"{path} already lists {principal} with another key, or this key for another principal;"
            " remove that line first"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else heading
        gap = "" if before.endswith("\n") else "\n"
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
        replacement = path.with_name(f".{path.name}.{os.getpid()}")
        replacement.unlink(missing_ok=True)
        write_new(replacement, f"{before}{gap}{principal} {public.decode()}\n".encode())
        replacement.chmod(mode)
        os.replace(replacement, path)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def _lines(path: Path, remedy: str, mode_refused: int) -> list[tuple[int, list[str]]]:
    """Number and words of each line that is neither blank nor a comment."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())  # of the file that is read, not of its name
            check_mode(path, status.st_mode, mode_refused)
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_BYTES_MAX:
                raise UserError(
                    f"{path}: {status.st_size} bytes; expected a file of up to {FILE_BYTES_MAX}"
                )
            text = file.read(FILE_BYTES_MAX).decode()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    numbered = enumerate(text.split("\n"), start=1)
    return [(n, line.split()) for n, line in numbered if line.strip() and line.strip()[0] != "#"]


def check_mode(path: Path, mode: int, refused: int) -> None:
    """Raise UserError if any of the bits `refused` is set: others could read or change it."""
    # systemd shows a credential that an ACL gives to the unit's user as 0440: the group bits are
    # the ACL's mask, and the folder is closed to everybody else.
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and path.parent.resolve() == Path(credentials).resolve():
        refused &= ~0o040
    if mode & refused:
        readable = "read" if refused & 0o004 else "changed"
        allowed = "600" if refused & 0o004 else "644"
        raise UserError(
            f"{path}: mode {stat.S_IMODE(mode):04o} lets it be {readable} by others; "
            f"`chmod {allowed} {path}`"
        )


def _principal_at(where: str, text: str) -> str:
    try:
        return check_principal(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def is_public_key(text: bytes) -> bool:
    """Tell whether `text` is 32 bytes in Z85; five characters can stand for more than 32 bits."""
    if len(text) != 40 or not set(text) <= z85.Z85MAP.keys():
        return False
    groups = (text[start : start + 5] for start in range(0, 40, 5))
    return all(
        sum(z85.Z85MAP[c] * 85 ** (4 - i) for i, c in enumerate(group)) < 1 << 32
        for group in groups
    )


def write_new(path: Path, content: bytes) -> None:
    """Create `path` with mode 0600 from its first moment; FileExistsError if there is one."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()  # half a key would be in the way of the next attempt
        raise
