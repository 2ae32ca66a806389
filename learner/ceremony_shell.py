"""The shell around ceremony.py: reads the log, makes what is asked for, and says it, signed.

Rule 1: it has no opinion about steps. What the state calls for is on disk before it is published.
Rule 2: nothing is published before the log was read to its end once: a site that has lost its
secrets finds out so, and does not say a second thing.
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from metisfl.broker.client import Batch, BrokerClient, Outbox, Record
from metisfl.deploy.database import transaction
from metisfl.deploy.keys import Identity
from metisfl.deploy.sealing import box_for, content_of
from metisfl.deploy.signing import is_signed, sign
from metisfl.learner import ceremony as core
from metisfl.learner.ceremony_install import install
from metisfl.learner.ceremony_kept import Kept, begin_kept, load, save
from metisfl.learner.joint_key import joint_key, make_share
from metisfl.proto import ceremony as c
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ceremony import Manifest
from metisfl.proto.ckks_key import PublicPart, SecretPart
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import decode
from metisfl.proto.topics import ceremony_topic

__all__ = ["Ceremony"]

NAMES_TOLD: Final = 10
WHAT: Final = {
    1: "to begin (1 of 5)",
    2: "to reveal their parts of the coin (2 of 5)",
    3: "to make their shares (3 of 5)",
    4: "to reveal their shares (4 of 5)",
    5: "to confirm the key (5 of 5)",
}

_log = structlog.get_logger()


class Ceremony:
    """One site's part in the ceremony of `manifest`, whose names include this site's."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        identity: Identity,
        folder: Path,
        connection: sqlite3.Connection,
        outbox: Outbox,
        client: BrokerClient,
    ) -> None:
        """Take up what `folder` keeps of it, or begin. Raises UserError, MachineError."""
        self._manifest = manifest
        self._identity = identity
        self._name = identity.principal.partition(":")[2]
        self._folder = folder
        self._connection = connection
        self._outbox = outbox
        self._client = client
        self._topic = ceremony_topic(manifest.federation)
        kept = load(folder, manifest, self._name)
        self._kept = begin_kept(manifest, self._name) if kept is None else kept
        self._through = self._kept.through
        self._caught_up = False
        self._made: tuple[PublicPart, SecretPart] | None = None
        self._finished: PublicPart | None = None

    @property
    def waits_for(self) -> str:
        """In words."""
        state = self._kept.state
        if not self._caught_up:
            return "for the broker"
        others = [name for name in state.waits_for if name != self._name]
        if not others:
            return "for the broker to take what this site says"
        more = len(others) - NAMES_TOLD
        names = ", ".join(others[:NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")
        return f"for {names} {WHAT[state.step]}"

    async def until_made(self) -> PublicPart:
        """Return when all sites hold the key, which is in force here.

        Raises PeerError, which names the site that broke the rules; UserError, MachineError.
        """
        save(self._folder, self._kept)
        await self._perform(core.resume(self._kept.state))
        if self._finished is None:
            async for batch in self._client.records(self._topic):
                await self._apply(batch)
                if self._finished is not None:
                    break
        assert self._finished is not None, "a feed ends with an error, or here"
        return self._finished

    # ---- What is heard -----------------------------------------------------------------

    async def _apply(self, batch: Batch) -> None:
        self._check_whole(batch)
        for record in batch.records:
            if record.sequence <= self._kept.through:
                continue
            self._through = record.sequence
            if (said := _said(record)) is not None:
                await self._happen(core.Heard(record.publisher, said))
            if self._finished is not None:
                return
        self._through = max(self._through, batch.through)
        if batch.caught_up and not self._caught_up:
            self._caught_up = True
            await self._perform(core.resume(self._kept.state))

    def _check_whole(self, batch: Batch) -> None:
        begun = (1, self._name) in self._kept.state.heard
        if begun and batch.trimmed_to > self._kept.through:
            raise UserError(
                "the broker has trimmed its log, and part of this ceremony with it, before this "
                "site had read it: nothing can be made of the rest. Begin again with a new manifest"
            )

    async def _happen(self, event: core.Event) -> None:
        state, effects = core.handle(self._kept.state, event, is_signed)
        if state != self._kept.state:
            self._save(replace(self._kept, state=state))
        await self._perform(effects)

    def _save(self, kept: Kept) -> None:
        self._kept = replace(kept, through=self._through)
        save(self._folder, self._kept)

    # ---- What there is to do --------------------------------------------------------------

    async def _perform(self, effects: tuple[core.Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, core.Say):
                if self._caught_up:
                    self._say(effect)
            elif isinstance(effect, core.MakeShare):
                await self._make_share(effect.coin)
            elif isinstance(effect, core.MakeKey):
                await self._happen(await asyncio.to_thread(self._make_key, effect))
            elif isinstance(effect, core.Finish):
                self._finish()
            elif isinstance(effect, core.Stopped):
                raise self._stopped(effect)
            else:
                _log.warning(
                    "a record that is not signed by the site that it is said to be of",
                    learner=effect.site,
                )

    def _say(self, effect: core.Say) -> None:
        signed = c.signed_bytes(self._manifest, self._name, effect.step, effect.body)
        said = pb.CeremonyStep(
            ceremony=self._manifest.ceremony,
            learner=self._name,
            step=effect.step,
            body=effect.body,
            signature=sign(self._identity, signed),
        )
        with transaction(self._connection):
            self._outbox.append(self._topic, said)
        self._client.flush()

    async def _make_share(self, coin: bytes) -> None:
        names, part = self._manifest.names, self._kept.mask_part
        share = await asyncio.to_thread(make_share, sites=names, coin=coin)
        keys = (key for name, key in self._manifest.sites if name != self._name)
        offer = c.Offer(
            share.public,
            c.mask_commitment(self._manifest, self._name, part),
            tuple(box_for(key, part) for key in keys),
        )
        self._kept = replace(self._kept, share=share.secret)
        await self._happen(core.ShareMade(c.pack_offer(offer)))

    def _make_key(self, effect: core.MakeKey) -> core.KeyMade | core.KeyWrong:
        manifest, parts = self._manifest, {self._name: self._kept.mask_part}
        for name, box in effect.boxes.items():
            part = content_of(box, self._identity)
            bound = effect.mask_commitments[name]
            if part is None or c.mask_commitment(manifest, name, part) != bound:
                return core.KeyWrong(c.BOX, name)
            parts[name] = part
        mask_key = c.mask_key(manifest, parts)
        try:
            self._made = joint_key(
                sites=manifest.names,
                error=manifest.error,
                min_contributors=manifest.min_contributors,
                max_share=manifest.max_share,
                verify=manifest.verify,
                coin=effect.coin,
                shares=effect.shares,
                secret=self._kept.share,
                mask_key=mask_key,
            )
        except PeerError as error:
            told = (name for name in manifest.names if f"share of {name} " in str(error))
            return core.KeyWrong(c.SHARE, next(told))
        return core.KeyMade(self._made[0].fingerprint, mask_key)

    def _finish(self) -> None:
        assert self._made is not None, "a key is made before all sites confirm it"
        install(self._folder, self._manifest, *self._made)
        self._finished = self._made[0]

    def _stopped(self, effect: core.Stopped) -> PeerError:
        return PeerError(
            f"the ceremony makes no key: {effect.reason}. Find out why; then write a new manifest "
            "with `metisfl keys ceremony new`, without that site if need be, and begin again"
        )


def _said(record: Record) -> pb.CeremonyStep | None:
    """A step of whatever ceremony; None for what is none, which nobody can have signed."""
    try:
        said = decode(record.type, record.payload)
    except PeerError as error:
        _log.warning("a record that cannot be read", by=record.publisher, error=str(error))
        return None
    return said if isinstance(said, pb.CeremonyStep) else None
