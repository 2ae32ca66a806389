"""Who a process is: its principal and its key pair, in the file `identity.key` of a `keys` folder.

Rule: a secret never leaves the file that it was made in, which is created with mode 0600, never
overwritten and never printed. Lists of others' public keys are in `key_lists.py`.
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
    "PRINCIPALS_ALLOWED",
    "Identity",
    "check_mode",
    "check_principal",
    "create_identity",
    "is_public_key",
    "load_identity",
    "principal_at",
    "read_lines",
    "write_new",
]

IDENTITY_FILE = "identity.key"
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
    """Read `folder`/identity.key, or the systemd credential of that name if the unit has one.

    Raises UserError if it is missing, damaged or open to others.
    """
    path = _identity_path(folder)
    remedy = f"make one with `metisfl keys identity PRINCIPAL --folder {folder}`"
    fields: dict[str, str] = {}
    for number, words in read_lines(path, remedy, mode_refused=0o077):
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
    principal = principal_at(str(path), fields["principal"])
    public, secret = fields["public"].encode(), fields["secret"].encode()
    if not (is_public_key(public) and is_public_key(secret)) or zmq.curve_public(secret) != public:
        raise UserError(f"{path}: public and secret are not a key pair; the file is damaged")
    return Identity(principal, public, secret)


def _identity_path(folder: Path) -> Path:
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and (path := Path(credentials) / IDENTITY_FILE).exists():
        return path
    return folder / IDENTITY_FILE


def read_lines(path: Path, remedy: str, mode_refused: int) -> list[tuple[int, list[str]]]:
    """Number and words of each line that is neither blank nor a comment.

    A public key may contain `#`, so a comment is a line that starts with it, never the end of one.
    Raises UserError: with `remedy` if there is no file, and for a mode that is refused.
    """
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


def principal_at(where: str, text: str) -> str:
    """`check_principal` for what stands in a file: `where` is named in the error."""
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
