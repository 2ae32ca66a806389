"""Attacks on the broker by who is let in and asks for more than anybody needs."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import Final

import zmq

from attacks.publishing import OTHERS, Ingress
from attacks.target import Attack, End, Tally, Target, answers, dealer, sent
from metisfl.proto import events_pb2 as pb
from metisfl.proto import frames, topics

CONNECTIONS: Final = 7  # with the one that publishes it is all that a principal may have
PREFIXES: Final = 10_000


def others_lanes(target: Target, end: End, tell: Tally) -> None:
    """What is not the attacker's to read: it is fetched, and its cursors are moved."""
    f = target.federation
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello(reads_only=True)
        lanes = [topics.federation_lane(f), topics.ledger_topic(f, "all"), "other/", "f/x"]
        for name in OTHERS:
            lanes += [topics.task_topic(f, name), topics.done_topic(f, name)]
        while not end.wait(0.002):
            lane = random.choice(lanes)
            ingress.send(frames.pack_fetch(frames.Fetch(1, 0, 256, lane)))
            ingress.send(frames.pack_cursor(frames.CursorReport(2**63, lane)))
            ingress.send([frames.STATUS])
            for reply in ingress.take():
                if isinstance(reply, frames.FetchedBatch):
                    tell("read what is others'", len(reply.records))


def hellos(target: Target, end: End, tell: Tally) -> None:
    """Hello, again and again, on one connection."""
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        good = pb.Hello(protocol=frames.PROTOCOL, software="attack" * 9)
        while not end.wait(0.001):
            other = pb.Hello(protocol=random.randrange(99), epoch=random.randrange(2**63))
            ingress.send(frames.pack_hello(random.choice([good, other])))
            ingress.take()


def reconnects(target: Target, end: End, tell: Tally) -> None:
    """New connections to each port as quickly as it goes, and none is closed in good order."""
    while not end.come:
        with zmq.Context() as context, ExitStack() as stack:
            sockets = []
            for endpoint, kind, whose in target.doors * 30:
                socket = stack.enter_context(context.socket(kind))
                socket.linger = 0
                target.credentials(whose).put_on(socket)
                socket.connect(endpoint)
                if kind == zmq.SUB:
                    socket.subscribe(b"hb/")
                else:
                    sent(socket, frames.pack_hello(pb.Hello(protocol=frames.PROTOCOL)), 0)
                sockets.append(socket)
                tell("opened")
            end.wait(1)
            tell("answered", sum(len(list(answers(socket))) for socket in sockets))


def unread(target: Target, end: End, tell: Tally) -> None:
    """Large answers are asked for on many connections, and none is read."""
    lane = topics.member_topic(target.federation, target.name)
    with zmq.Context() as context, ExitStack() as stack:
        first = stack.enter_context(dealer(target, target.ingress, "broker"))
        ingress = Ingress(first, target, tell)
        ingress.hello()
        sockets = []
        for _ in range(CONNECTIONS):
            socket = stack.enter_context(context.socket(zmq.DEALER))
            socket.linger, socket.rcvhwm = 0, 1
            target.credentials("broker").put_on(socket)
            socket.connect(target.ingress)
            sockets.append(socket)
        next_event = time.monotonic()
        while not end.wait(0.002):
            if time.monotonic() > next_event:
                next_event = time.monotonic() + 0.2
                for socket in sockets:
                    sent(socket, frames.pack_hello(pb.Hello(protocol=frames.PROTOCOL)), 0)
                ingress.publish(ingress.envelope(lane, "LearnerJoined", bytes(64 * 1024)))
                ingress.take()
            for socket in sockets:
                asked = sent(socket, frames.pack_fetch(frames.Fetch(1, 0, 256, lane)), 0)
                tell("asked" if asked else "not taken")


def subscriptions(target: Target, end: End, tell: Tally) -> None:
    """Ten thousand prefixes, most of them others', and what is heard of these."""
    f = target.federation
    credentials = target.credentials("broker")
    while not end.come:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            credentials.put_on(socket)
            socket.connect(target.live)
            mine = (topics.run_topic(f).encode(), b"hb/", f"{f}/".encode() + b"done/" + b"x" * 999)
            for prefix in (b"", f.encode(), f"{f}/done/ada/".encode(), *mine):
                socket.subscribe(prefix)
            for number in range(PREFIXES):
                socket.subscribe(f"{f}/task/n{number}/".encode())
                tell("asked")
            until = time.monotonic() + 2
            while time.monotonic() < until and not end.come:
                for parts in answers(socket, 100):
                    heard = parts[0].startswith(mine)
                    tell("heard" if heard else "heard what is others'")


def beats(target: Target, end: End, tell: Tally) -> None:
    """Transient events of its own, as quickly as it goes."""
    own = topics.beat_topic(target.federation, target.name)
    with dealer(target, target.ingress, "broker") as socket:
        ingress = Ingress(socket, target, tell)
        ingress.hello(reads_only=True)
        while not end.come:
            progress = pb.Progress(
                task_id="r.1.train.ada", learner=random.choice([target.name, "ada"]), state="x"
            )
            beat = frames.Beat(own, "Progress", progress.SerializeToString())
            for _ in range(50):
                ingress.send(frames.pack_beat(beat))
            ingress.take()
            end.wait(0.01)


ATTACKS: Final[dict[str, Attack]] = {
    "others-lanes": others_lanes,
    "hellos": hellos,
    "reconnects": reconnects,
    "unread": unread,
    "subscriptions": subscriptions,
    "beats": beats,
}
