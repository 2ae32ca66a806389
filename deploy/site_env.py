"""A site's settings in its home: `site.env`, one METISFL_<FLAG>=value a line.

Rule: `metisfl join` writes its own lines and leaves all others. systemd's EnvironmentFile= and a
shell (`set -a; . site.env`) read the file alike: no value needs quotes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from metisfl.deploy.invitation_code import Code
from metisfl.deploy.key_lists import replace_file
from metisfl.proto.errors import UserError

__all__ = ["SITE_FILE", "write_site_env"]

SITE_FILE: Final = "site.env"
HEADING: Final = """\
# Where the federation is, as the code said; written by `metisfl join`. Add METISFL_APP,
# METISFL_PATH, METISFL_DATA and what else this site sets.
"""


def write_site_env(home: Path, code: Code) -> Path:
    """Write what `code` says to `home`/site.env and return its path. Raises MetisError."""
    path = home / SITE_FILE
    ours = {
        "METISFL_INGRESS": code.ingress,
        "METISFL_LIVE": code.live,
        "METISFL_BULK": code.bulk,
        "METISFL_FEDERATION": code.federation,
        "METISFL_NAME": code.principal.partition(":")[2],
    }
    try:
        before = path.read_text().splitlines() if path.exists() else HEADING.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; move it away") from None
    kept = [line for line in before if line.partition("=")[0].strip() not in ours]
    lines = [*kept, *(f"{name}={value}" for name, value in ours.items())]
    replace_file(path, "".join(f"{line}\n" for line in lines), mode=0o644)
    return path
