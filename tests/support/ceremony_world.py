"""Sites that make a joint key over one log, in one process, with arithmetic in the place of crypto.

Signatures, shares and boxes are hashes here: what is tested is who says what when, and who is
blamed. A site is what is on its disk; whatever happens between two writes is lost in a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from zmq.utils import z85

from metisfl.learner import ceremony as core
from metisfl.learner.ceremony_kept import Kept, begin_kept, pack, parse
from metisfl.proto import ceremony as c
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ceremony import Manifest

__all__ = ["Log", "Site", "is_signed", "manifest_of", "run", "signature", "step"]

PADDING = bytes(48)


def manifest_of(names: tuple[str, ...] = ("ada", "bob", "cyd"), number: str = "0" * 32) -> Manifest:
    """A ceremony of these sites; a site's key is a hash of its name."""
    sites = tuple((name, z85.encode(hashlib.sha256(name.encode()).digest())) for name in names)
    return Manifest("f", number, sites, 1e-6, 2, 0.95, "none")


def signature(key: bytes, message: bytes) -> bytes:
    return hashlib.sha512(key + message).digest()


def is_signed(key: bytes, message: bytes, found: bytes) -> bool:
    return found == signature(key, message)


def step(manifest: Manifest, site: str, number: int, body: bytes) -> core.Heard:
    """A record as `site` itself would have it in the log."""
    signed = signature(manifest.keys[site], c.signed_bytes(manifest, site, number, body))
    said = pb.CeremonyStep(
        ceremony=manifest.ceremony, learner=site, step=number, body=body, signature=signed
    )
    return core.Heard(f"learner:{site}", said)


def box(site: str, other: str, part: bytes) -> bytes:
    """For `other`; whoever else opens it finds something else."""
    return _mixed(site, other, part) + PADDING


def _mixed(site: str, other: str, part: bytes) -> bytes:
    mask = hashlib.sha256(f"{site} to {other}".encode()).digest()
    return bytes(a ^ b for a, b in zip(part, mask, strict=True))


Log = list[core.Heard]


class Site:
    """An honest site. `alter` stands between it and the log: by it a site becomes another one."""

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        log: Log,
        alter: Callable[[core.Heard], list[core.Heard]] = lambda said: [said],
    ) -> None:
        self.manifest, self.name, self._log, self._alter = manifest, name, log, alter
        self.key: tuple[bytes, bytes] | None = None  # fingerprint and mask key, once all have it
        self.doubts: list[str] = []
        self.shares_made = 0
        self._disk = b""
        self._kept = begin_kept(manifest, name)
        self._read = 0
        self._made: core.KeyMade | None = None
        self.start()

    @property
    def stopped(self) -> core.Stopped | None:
        return self._kept.state.stopped

    @property
    def behind(self) -> bool:
        return self._read < len(self._log)

    def start(self) -> None:
        self._save()
        self._perform(core.resume(self._kept.state))

    def restart(self) -> None:
        """Killed and started again: it has what is on disk."""
        kept = parse(self._disk, self.manifest, self.name)
        assert isinstance(kept, Kept)
        self._kept, self._read, self._made = kept, kept.through, None
        self._perform(core.resume(kept.state))

    def read(self) -> None:
        """Apply one record."""
        event = self._log[self._read]
        self._read += 1
        self._happen(event)

    def _happen(self, event: core.Event) -> None:
        state, effects = core.handle(self._kept.state, event, is_signed)
        changed = state != self._kept.state
        self._kept = replace(self._kept, state=state)
        if changed:
            self._save()
        self._perform(effects)

    def _save(self) -> None:
        self._kept = replace(self._kept, through=self._read)
        self._disk = pack(self._kept)

    def _perform(self, effects: tuple[core.Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, core.Say):
                said = step(self.manifest, self.name, effect.step, effect.body)
                self._log.extend(self._alter(said))
            elif isinstance(effect, core.MakeShare):
                self._make_share()
            elif isinstance(effect, core.MakeKey):
                self._happen(self._make_key(effect))
            elif isinstance(effect, core.Doubted):
                self.doubts.append(effect.site)
            elif isinstance(effect, core.Finish):
                assert self._made is not None
                self.key = self._made.fingerprint, self._made.mask_key

    def _make_share(self) -> None:
        self.shares_made += 1
        share = hashlib.sha256(self._kept.coin_part + b"share").digest() * (c.SHARE_BYTES // 32)
        part = self._kept.mask_part
        others = (name for name in self.manifest.names if name != self.name)
        body = c.pack_offer(
            c.Offer(
                share,
                c.mask_commitment(self.manifest, self.name, part),
                tuple(box(self.name, other, part) for other in others),
            )
        )
        self._kept = replace(self._kept, share=b"secret")
        self._happen(core.ShareMade(body))

    def _make_key(self, effect: core.MakeKey) -> core.KeyMade | core.KeyWrong:
        parts = {self.name: self._kept.mask_part}
        for name, sealed in effect.boxes.items():
            part = _mixed(name, self.name, sealed[:32])
            if c.mask_commitment(self.manifest, name, part) != effect.mask_commitments[name]:
                return core.KeyWrong(c.BOX, name)
            parts[name] = part
        for name, share in effect.shares.items():
            if share.startswith(b"\xff" * 8):
                return core.KeyWrong(c.SHARE, name)
        told = hashlib.sha256(effect.coin + b"".join(effect.shares.values())).digest()[:16]
        self._made = core.KeyMade(told, c.mask_key(self.manifest, parts))
        return self._made


def run(sites: list[Site]) -> None:
    """Let all read until nobody has anything left."""
    while any(site.behind for site in sites):
        for site in sites:
            if site.behind:
                site.read()
