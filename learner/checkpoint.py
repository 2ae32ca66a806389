"""The newest model that a site has opened in a run, kept for a run that goes on from it.

Rule: it is on disk for good, under the run's name. A new key may have been made since, with other
sites: the model is plain here, and its next owner encrypts it anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from metisfl.proto.model_file import sync_file, sync_folder

__all__ = ["RUNS_KEPT", "keep"]

RUNS_KEPT: Final = 2


def keep(opened: Path, checkpoint: Path) -> None:
    """Keep the model file `opened`, which is not changed any more, also as `checkpoint`.

    Those of older runs go. Raises OSError.
    """
    sync_file(opened)
    draft = checkpoint.with_suffix(".partial")
    draft.unlink(missing_ok=True)
    os.link(opened, draft)
    os.replace(draft, checkpoint)
    sync_folder(checkpoint.parent)
    others = (path for path in checkpoint.parent.glob("*.model") if path != checkpoint)
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True)[
        RUNS_KEPT - 1 :
    ]:
        path.unlink(missing_ok=True)
