"""What tests of whole federations share: the models of runs that nobody disturbs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from daemons import Daemons
from watched import APP, digest_of, watched

Undisturbed = Callable[[Daemons, int], str]
"""Gives the digest of the final model of a run like these daemons', of so many rounds."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """One federation for each privacy mode, started when it is needed first, and each run once.

    Neither time nor place nor the key of the sites is in a model.
    """
    others: dict[tuple[str, ...], Daemons] = {}
    found: dict[tuple[str, ...], dict[int, str]] = {}

    def digest(daemons: Daemons, rounds: int) -> str:
        like = (daemons.privacy, *daemons.sites)
        if like not in others:
            folder = tmp_path_factory.mktemp("undisturbed")
            sites = dict.fromkeys(daemons.sites, "0")
            encrypted = daemons.privacy == "ckks"
            others[like] = Daemons(folder, sites, encrypted=encrypted, app=APP)
        digests = found.setdefault(like, {})
        if rounds not in digests:
            view = asyncio.run(watched(others[like], rounds=rounds))
            digests[rounds] = digest_of(others[like], view)
        return digests[rounds]

    yield digest
    for one in others.values():
        one.stop()
