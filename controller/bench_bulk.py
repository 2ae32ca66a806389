"""The controller's end of `metisfl bench bulk`: a bulk endpoint in a process of its own.

Rule: it is the endpoint of a real controller, with its spool and its store on disk, and nothing
around it. It says in one JSON line where it is, and ends when its stdin does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy import logs
from metisfl.deploy.curve import Insecure
from metisfl.deploy.keys import create_identity
from metisfl.deploy.run import ExitCode

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one learner: --model can be fetched by its digest, updates go to t0, t1, ..."""
    parser = argparse.ArgumentParser(prog="metisfl.controller.bench_bulk")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a model file to serve")
    parser.add_argument("--tasks", type=int, required=True, help="how many updates may come")
    parser.add_argument("--learner", required=True, help="the principal that may come")
    parser.add_argument("--public", help="its public key; without one, it needs none (--insecure)")
    options = parser.parse_args(argv)
    logs.configure("metisfl", level="warning")
    with ExitCode("metisfl bench bulk") as exit_code:
        _serve(options)
    return exit_code.value


def _serve(options: argparse.Namespace) -> None:
    keys = create_identity(options.home / "keys", "controller") if options.public else None
    store = ModelStore(options.home / "models")
    draft = store.draft(options.model.stat().st_size)
    shutil.copyfile(options.model, draft)
    store.put(draft)
    bulk = BulkEndpoint(
        endpoint="tcp://127.0.0.1:*",
        identity=keys or Insecure(),
        peers={options.public.encode(): options.learner} if keys else {},
        store=store,
        spool=Spool(options.home / "spool"),
        on_stored=lambda *_: None,
    )
    bulk.expect({f"t{number}": Expected(options.learner) for number in range(options.tasks)})
    bulk.start()
    try:
        public = keys.public.decode() if keys else ""
        print(json.dumps({"endpoint": bulk.endpoint, "public": public}), flush=True)
        sys.stdin.read()
    finally:
        bulk.close()
    bulk.finished.result()


if __name__ == "__main__":
    sys.exit(main())
