"""ceremony_kept.py: a site comes back as it was, and what it keeps is known for a secret."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from ceremony_world import Log, Site, manifest_of, run
from hypothesis import given
from hypothesis import strategies as st

from metisfl.deploy.ckks_keys import refuse_secret_parts
from metisfl.learner import ceremony as core
from metisfl.learner.ceremony_kept import STATE_FILE, Kept, begin_kept, load, pack, parse, save
from metisfl.proto.ckks_key import CEREMONY_MAGIC
from metisfl.proto.errors import UserError

MANIFEST = manifest_of()
OTHER = manifest_of(number="1" * 32)


def in_the_middle() -> Kept:
    log: Log = []
    sites = [Site(MANIFEST, name, log) for name in MANIFEST.names]
    for _ in range(7):
        for site in sites:
            site.read()
    return replace(sites[0]._kept, through=20)


KEPT = in_the_middle()
DATA = pack(KEPT)


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    for kept in (begin_kept(MANIFEST, "ada"), KEPT):
        save(tmp_path, kept)
        assert load(tmp_path, MANIFEST, "ada") == kept
        assert stat.S_IMODE((tmp_path / STATE_FILE).stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert load(tmp_path / "elsewhere", MANIFEST, "ada") is None


def test_two_beginnings_have_nothing_in_common() -> None:
    one, two = begin_kept(MANIFEST, "ada"), begin_kept(MANIFEST, "ada")
    assert one.coin_part != two.coin_part
    assert one.mask_part != two.mask_part
    assert one.coin_part != one.mask_part


def test_a_server_that_finds_it_does_not_start(tmp_path: Path) -> None:
    save(tmp_path, KEPT)
    with pytest.raises(UserError, match="must never hold it"):
        refuse_secret_parts("a controller", [tmp_path])


def test_nothing_of_it_is_shown() -> None:
    fresh = begin_kept(MANIFEST, "ada")  # in KEPT the part of the coin was revealed to all
    for kept, secret in (
        (fresh, fresh.coin_part),
        (KEPT, KEPT.mask_part),
        (KEPT, KEPT.share),
        (KEPT, KEPT.state.own[4]),
    ):
        assert repr(secret)[2:-1][:50] not in repr(kept)


def test_a_ceremony_that_is_under_way_is_not_forgotten_for_another(tmp_path: Path) -> None:
    save(tmp_path, KEPT)
    for manifest, name in ((OTHER, "ada"), (MANIFEST, "bob")):
        with pytest.raises(UserError, match="another ceremony, which is under way"):
            load(tmp_path, manifest, name)
    stopped = core.Stopped("bob", "bob has lied")
    save(tmp_path, replace(KEPT, state=replace(KEPT.state, stopped=stopped)))
    assert load(tmp_path, OTHER, "ada") is None, "one that never ends makes way"
    again = load(tmp_path, MANIFEST, "ada")
    assert again is not None
    assert again.state.stopped == stopped


@given(st.binary(max_size=300) | st.integers(0, len(DATA) - 1).map(lambda end: DATA[:end]))
def test_damage_is_never_taken_for_a_state(content: bytes) -> None:
    for data in (content, CEREMONY_MAGIC + content):
        with pytest.raises(ValueError, match=r"."):
            parse(data, MANIFEST, "ada")


def test_the_remedy_for_damage_is_told(tmp_path: Path) -> None:
    save(tmp_path, KEPT)
    path = tmp_path / STATE_FILE
    path.write_bytes(DATA[:-1])
    with pytest.raises(UserError, match="is damaged: it is no msgpack"):
        load(tmp_path, MANIFEST, "ada")
    path.chmod(0o644)
    with pytest.raises(UserError, match="mode 0644 lets it be read by others"):
        load(tmp_path, MANIFEST, "ada")


def test_a_share_is_on_disk_before_what_binds_the_site_to_it() -> None:
    """At the moment of its third step a site's disk has the whole of its fourth."""
    log: Log = []
    said_with: list[Kept] = []

    def look(said: core.Heard) -> list[core.Heard]:
        if said.step.step == 3:
            kept = parse(ada._disk, MANIFEST, "ada")
            assert isinstance(kept, Kept)
            said_with.append(kept)
        return [said]

    ada = Site(MANIFEST, "ada", log, look)
    run([ada, Site(MANIFEST, "bob", log), Site(MANIFEST, "cyd", log)])
    assert said_with, "ada has said its third step"
    assert said_with[0].share == b"secret"
    shown = next(h.step.body for h in log if (h.step.learner, h.step.step) == ("ada", 4))
    assert said_with[0].state.own[4] == shown
