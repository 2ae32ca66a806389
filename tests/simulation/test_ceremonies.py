"""Joint keys are made under every kind of trouble: the laws of ceremonies.py hold, seed by seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulated import ceremony_site
from simulated.ceremonies import hold_ceremony
from simulated.ceremony_site import CeremonySite, _Part

from metisfl.learner import ceremony as core

SEEDS = 400
DEFECT_SEEDS = 200
Patch = pytest.MonkeyPatch


def test_every_seed_comes_to_one_key() -> None:
    failures = [failure for seed in range(SEEDS) if (failure := hold_ceremony(seed))]
    assert not failures, failures[0]


def site_draws_anew_after_a_restart(patch: Patch) -> None:
    patch.setattr(_Part, "_save", lambda self: None)


def site_speaks_before_its_disk_has_it(patch: Patch) -> None:
    patch.setattr(ceremony_site, "STATE_IS_SYNCED", False)


def site_says_a_step_once_in_its_life(patch: Patch) -> None:
    """Whoever dies between its disk and its outbox never says it."""
    begin = CeremonySite.boot

    def boot(self: CeremonySite) -> None:
        resume = core.resume
        first = self.disk.read(ceremony_site.STATE) is None
        patch.setattr(core, "resume", resume if first else lambda state: ())
        try:
            begin(self)
        finally:
            patch.setattr(core, "resume", resume)

    patch.setattr(CeremonySite, "boot", boot)


@pytest.mark.parametrize(
    ("mutate", "law"),
    [
        (site_draws_anew_after_a_restart, "C"),
        (site_speaks_before_its_disk_has_it, "C"),
        (site_says_a_step_once_in_its_life, "C3"),
    ],
)
def test_a_defect_is_found(monkeypatch: Patch, mutate: Callable[[Patch], None], law: str) -> None:
    mutate(monkeypatch)
    found = next((f for seed in range(DEFECT_SEEDS) if (f := hold_ceremony(seed))), "")
    assert found, f"{mutate.__name__}: {DEFECT_SEEDS} seeds have not noticed"
    assert f"breaks {law}" in found, found
