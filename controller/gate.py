"""Whom the controller's bulk endpoint lets in, from one second to the next.

Rule: the list of peers in `keys/` is the truth; of it only those that may be in this federation.
Whoever is taken off it is cut off at once, with all others, who go on where they were.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from metisfl.controller.bulk import BulkEndpoint
from metisfl.deploy.audit import Audit
from metisfl.deploy.registry import Watch
from metisfl.deploy.run import StopSignal

__all__ = ["keep_gate"]

LOOK_S: Final = 1.0
log = structlog.get_logger()


async def keep_gate(
    watch: Watch, federation: str, bulk: BulkEndpoint, audit: Audit, stop: StopSignal
) -> None:
    """Follow the list until `stop`."""
    while not stop.requested:
        before = watch.registry.of(federation)
        if watch.changed():
            registry = watch.registry.of(federation)
            change = registry.since(before)
            bulk.replace_peers(registry.keys, cut=bool(change.expelled))
            log.info("list of peers read again", peers=len(registry.peers))
            for what, peers in (("expelled", change.expelled), ("admitted", change.admitted)):
                for peer in peers:
                    audit.record(what, principal=peer.principal, public=peer.public.decode())
        try:
            await asyncio.wait_for(stop.wait(), LOOK_S)
        except asyncio.TimeoutError:
            continue
