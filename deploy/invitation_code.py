"""The code that `metisfl invite` prints and `metisfl join` takes: one word with all a site needs.

Rule: a code is whole or it is refused, and in words: cut off, damaged, or of another version. It
has letters and digits only, so that one double-click takes all of it; mail programs may break it
into lines and change its case.

    metisfl1_ base32( length, expiry, token, public keys of broker and controller, texts, CRC-32 )

Integers are little-endian. The checksum finds every slip of a finger; it is no protection against
people who mean harm: that is the token, which the broker knows only the public key of.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

import zmq
from zmq.utils import z85

from metisfl import __version__
from metisfl.deploy.keys import check_principal
from metisfl.deploy.settings import ENDPOINT
from metisfl.proto.errors import UserError
from metisfl.proto.topics import check_name

__all__ = ["CHARACTERS_MAX", "TOKEN_BYTES", "Code", "format_code", "parse_code"]

VERSION: Final = 1
TOKEN_BYTES: Final = 16
TEXT_BYTES_MAX: Final = 255
CHARACTERS_MAX: Final = 4096  # of what is looked at; a code of ours has under 2,300
KEY_LABEL: Final = b"metisfl invite 1"  # another use of the token would give another key

_FIXED: Final = struct.Struct("<HQ16s32s32s")
_CRC: Final = struct.Struct("<I")
_SHAPE: Final = re.compile(r"metisfl(\d{1,4})_(.*)", re.ASCII)
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz234567")
_LENGTH_CHARACTERS: Final = 4  # hold the first two bytes
_COPY: Final = "copy all of it, from metisfl to the end, or ask the operator for a new one"


@dataclass(frozen=True, slots=True)
class Code:
    """What a code says. Keys are in Z85; `token` opens the door and stays out of repr."""

    principal: str
    federation: str
    ingress: str
    live: str
    bulk: str
    broker: bytes
    controller: bytes
    expires_unix_s: int
    token: bytes = field(repr=False)

    def key_pair(self) -> tuple[bytes, bytes]:
        """The CURVE key pair (public, secret; Z85) that the invitation is known by."""
        secret = z85.encode(hashlib.blake2b(self.token, digest_size=32, person=KEY_LABEL).digest())
        return zmq.curve_public(secret), secret


def format_code(code: Code) -> str:
    """Write it as one word. Raises UserError if a text is too long for it."""
    texts = b""
    for text in (code.principal, code.federation, code.ingress, code.live, code.bulk):
        part = text.encode()
        if len(part) > TEXT_BYTES_MAX:
            raise UserError(f"{text!r} has {len(part)} bytes; at most {TEXT_BYTES_MAX} fit in")
        texts += bytes([len(part)]) + part
    keys = z85.decode(code.broker), z85.decode(code.controller)
    length = _FIXED.size + len(texts) + _CRC.size
    body = _FIXED.pack(length, code.expires_unix_s, code.token, *keys) + texts
    body += _CRC.pack(zlib.crc32(body))
    return f"metisfl{VERSION}_{_base32(body)}"


def parse_code(text: str) -> Code:
    """Read a code, with whatever white space is in it. Raises UserError that says what is wrong."""
    if len(text) > CHARACTERS_MAX:
        raise UserError(f"{len(text)} characters are no code; {_COPY}")
    word = "".join(text.split())
    shape = _SHAPE.fullmatch(word.lower())
    if shape is None:
        raise UserError(f"{word[:24]!r} is no code: those of `metisfl invite` begin with metisfl")
    if int(shape[1]) != VERSION:
        raise UserError(
            f"this code is of version {int(shape[1])}, and metisfl {__version__} here reads "
            f"version {VERSION}: install the version of metisfl that the operator has"
        )
    return _fields(_body(shape[2], before=len(word) - len(shape[2])))


def _body(letters: str, before: int) -> bytes:
    """The bytes in `letters`, which stand behind `before` characters; whole and unchanged."""
    for at, letter in enumerate(letters):
        if letter not in _LETTERS:
            raise UserError(
                f"the code is damaged: {letter!r} (character {before + at + 1}) cannot be in it; "
                f"{_COPY}"
            )
    found = before + len(letters)
    if len(letters) < _LENGTH_CHARACTERS:
        raise UserError(f"the code is cut off after {found} characters; {_COPY}")
    head = base64.b32decode(letters[:_LENGTH_CHARACTERS].upper() + "====")
    length = int.from_bytes(head[:2], "little")
    whole = before + -(-length * 8 // 5)
    if found != whole:
        how = "is cut off" if found < whole else "has something behind it"
        raise UserError(f"the code {how}: {found} characters instead of {whole}; {_COPY}")
    try:
        body = base64.b32decode(letters.upper() + "=" * (-len(letters) % 8))
    except binascii.Error:
        body = b""
    # The last letter may hold bits that belong to no byte.
    sound = _base32(body) == letters and len(body) >= _FIXED.size + _CRC.size
    if not sound or zlib.crc32(body[: -_CRC.size]) != _CRC.unpack(body[-_CRC.size :])[0]:
        raise UserError(f"the code is damaged: one or more characters are wrong; {_COPY}")
    return body


def _fields(body: bytes) -> Code:
    _, expires_unix_s, token, broker, controller = _FIXED.unpack_from(body)
    texts: list[str] = []
    at, end = _FIXED.size, len(body) - _CRC.size
    while at < end:
        start = at + 1
        at = start + body[at]
        texts.append(body[start:at].decode("ascii", errors="replace"))
    remedy = "`metisfl invite` makes no such code; ask the operator for a new one"
    if at != end or len(texts) != 5:
        raise UserError(f"the code has {len(texts)} texts instead of 5: {remedy}")
    principal, federation, ingress, live, bulk = texts
    if ":" not in check_principal(principal):
        raise UserError(f"the code is for {principal}: {remedy}")
    check_name(federation, "federation")
    for endpoint in (ingress, live, bulk):
        match = ENDPOINT.fullmatch(endpoint)
        if match is None or int(match[2]) > 65535:
            raise UserError(f"the code names the endpoint {endpoint!r}: {remedy}")
    return Code(
        principal,
        federation,
        ingress,
        live,
        bulk,
        z85.encode(broker),
        z85.encode(controller),
        expires_unix_s,
        token,
    )


def _base32(body: bytes) -> str:
    return base64.b32encode(body).decode().rstrip("=").lower()
