"""A round's updates into its community model: which files, in which privacy mode.

Rule: the model is in the store, durable, before anyone is told of it.
"""

from __future__ import annotations

from pathlib import Path

from metisfl.controller.aggregate import Update, fold
from metisfl.controller.effects import Fold
from metisfl.controller.encrypted_fold import EncryptedUpdate, context_of, fold_encrypted
from metisfl.controller.room import explained
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.proto.ckks_key import PublicPart

__all__ = ["fold_round"]


def fold_round(effect: Fold, store: ModelStore, spool: Spool, public: PublicPart | None) -> bytes:
    """Fold, put the model into the store, and return its digest. Raises MachineError, NoRoom."""
    paths = [spool.update_path(one.task_id) for one in effect.contributions]
    try:
        # An encrypted sum may hold both halves of its ciphertexts; an update holds one.
        largest = max((path.stat().st_size for path in paths if path.exists()), default=0)
        draft = store.draft(largest * (1 if public is None else 2))
        if public is None:
            digest = _fold_plain(effect, store, paths, draft)
        else:
            digest = _fold_encrypted(effect, public, paths, draft)
    except OSError as error:
        raise explained(spool.folder, error) from error
    return store.put(draft, digest)


def _fold_plain(effect: Fold, store: ModelStore, paths: list[Path], draft: Path) -> bytes:
    base = store.path(effect.base_digest) if effect.base_digest else None
    weights = [one.weight for one in effect.contributions]
    updates = [Update(path, weight) for path, weight in zip(paths, weights, strict=True)]
    return fold(updates, base, draft)


def _fold_encrypted(effect: Fold, public: PublicPart, paths: list[Path], draft: Path) -> bytes:
    # The initial model was not trained on anything: it has no examples.
    reference = 1.0 if effect.round == 0 or effect.opens else effect.reference_weight
    updates = [
        EncryptedUpdate(path, one.learner, one.weight / reference, one.digest)
        for path, one in zip(paths, effect.contributions, strict=True)
    ]
    return fold_encrypted(updates, context_of(public, partials=bool(effect.opens)), draft)
