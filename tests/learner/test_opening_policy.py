"""Weights, contributors and a site's own update are looked at before it gives anything away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from joint_models import JointSites
from sealed_models import PUBLIC, SECRET, community, floats, quiet

from metisfl.learner.crypto import Crypto
from metisfl.learner.partial_file import make_partial
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import Tensor

MODELS = [floats(np.full(20, number / 8)) for number in range(3)]


@pytest.fixture(scope="module")
def sites() -> JointSites:
    return JointSites(min_contributors=2, max_share=0.8)


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before the share is used."""

    def used(self: Crypto, *_: Any) -> NoReturn:
        raise AssertionError("a partial was computed of a model that is not opened")

    monkeypatch.setattr(Crypto, "partials", used)


def refused(
    sites: JointSites,
    folder: Path,
    story: str,
    *,
    models: Sequence[Sequence[Tensor]] = MODELS,
    weights: Sequence[float] = (),
    given: bytes | None = None,
    **more: Any,
) -> None:
    """Ada gives no partial of the sum, and leaves no file."""
    updates = sites.updates(folder, models, weights=weights)
    digest = sites.model(updates, folder / "model")
    own = updates[0].digest if given is None else given
    before = sorted(folder.iterdir())
    with pytest.raises(PeerError, match=story):
        sites.partial("ada", folder / "model", digest, given=own, **more)
    assert sorted(folder.iterdir()) == before


def test_a_sum_of_too_few_is_not_opened(sites: JointSites, tmp_path: Path) -> None:
    refused(sites, tmp_path, "it holds 1 updates; .* no model of fewer than 2", models=MODELS[:1])


def test_a_sum_that_is_mostly_one_sites_is_not_opened(sites: JointSites, tmp_path: Path) -> None:
    weights = [2.7, 0.2, 0.1]
    refused(sites, tmp_path, "ada is 90.0% of it; .* more than 80.0%", weights=weights)


def test_the_initial_model_is_one_sites_and_no_sum_of_few_is_taken_for_it(
    sites: JointSites, tmp_path: Path
) -> None:
    weights = [0.95, 0.05]
    refused(sites, tmp_path, "ada is 95.0% of it", models=MODELS[:2], weights=weights, initial=True)
    with pytest.raises(AssertionError, match="a partial was computed"):
        refused(sites, tmp_path, "none", models=MODELS[:1], initial=True)


@pytest.mark.parametrize(
    ("given", "story"), [(b"", "gave no update"), (b"u" * 32, f"gave the update {'75' * 32}")]
)
def test_a_sum_that_names_another_update_as_ones_own_is_not_opened(
    sites: JointSites, tmp_path: Path, given: bytes, story: str
) -> None:
    refused(sites, tmp_path, f"as this site's, which {story} in this round", given=given)


def test_a_sum_that_leaves_ones_own_update_out_is_opened(sites: JointSites, tmp_path: Path) -> None:
    """It may have come too late."""
    digest = sites.model(sites.updates(tmp_path, MODELS)[1:], tmp_path / "model")
    with pytest.raises(AssertionError, match="a partial was computed"):
        sites.partial("ada", tmp_path / "model", digest, given=b"u" * 32)


def test_an_update_of_who_is_no_site_of_the_key_hides_nobody(
    sites: JointSites, tmp_path: Path
) -> None:
    """Anybody can encrypt zeros under a joint key, and call that the update of many."""
    ada, bob, cyd = sites.updates(tmp_path, MODELS)
    digest = sites.model([ada, bob, replace(cyd, learner="mallory")], tmp_path / "model")
    with pytest.raises(PeerError, match="an update of mallory, which is no site of the key"):
        sites.partial("ada", tmp_path / "model", digest, given=ada.digest)


def test_a_key_that_is_shared_has_no_partials(tmp_path: Path) -> None:
    path = community(Crypto(PUBLIC, SECRET), tmp_path, [floats(np.zeros(3))] * 2)
    with open_model(path) as model, pytest.raises(PeerError, match="key is not a joint one"):
        make_partial(
            Crypto(PUBLIC, SECRET),
            model,
            tmp_path / "partial",
            model_digest=bytes(32),
            own=("ada", b""),
            initial=False,
            progress=quiet,
        )
