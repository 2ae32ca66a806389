"""A subscriber in a process of its own, to be killed or stopped: `python subscriber.py FOLDER …`.

Of each event it first writes the sequence to FOLDER/seen, then, in one transaction, to the table
`effect` of FOLDER/effects.db, where the cursor is. It says `up` when it has caught up the first
time, and ends when asked to.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.deploy.database import open_database, transaction
from metisfl.deploy.keys import load_identity


async def subscribe(folder: Path, ingress: str, live: str, server: str, lane: str) -> None:
    identity = load_identity(folder)
    database = open_database(folder / "effects.db")
    database.execute("create table if not exists effect (sequence integer not null)")
    outbox = Outbox(database, identity.principal)
    client = BrokerClient(
        ingress=ingress,
        live=live,
        keys=ClientKeys(identity.public, identity.secret, server.encode()),
        principal=identity.principal,
        outbox=outbox,
        software="subscriber",
    )
    is_up = False
    with (folder / "seen").open("a") as seen:
        async with client:
            async for batch in client.records(lane):
                for record in batch.records:
                    seen.write(f"{record.sequence}\n")
                seen.flush()
                with transaction(database):
                    database.executemany(
                        "insert into effect values (?)",
                        [(record.sequence,) for record in batch.records],
                    )
                    outbox.advance(lane, batch.through)
                if batch.caught_up and not is_up:
                    is_up = True
                    print("up", flush=True)


if __name__ == "__main__":
    asyncio.run(subscribe(Path(sys.argv[1]), *sys.argv[2:]))
