"""Agree with the other processes of a run that torchrun started, one on each device, without waiting for one that is lost.

Processes meet in the key-value store of the run (`torch.distributed.TCPStore`), not in collectives: while one waits for the
others it watches their signs of life, so that a process that ends, hangs or is cut off is named in bounded time, on any
backend, and a long computation of another is waited for.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

from pytest_lmeval.errors import LmevalError, RankError, described
from pytest_lmeval.records._share import Share

T = TypeVar("T")
PULSE = 2.0  # seconds between two signs of life
LOST = 45.0  # seconds without one, after which a process is lost
STEP = 0.05  # seconds, at most, between two looks at the store
PIECE = 1 << 23  # bytes of a value of the store


@dataclass(eq=False)
class Ranks:
    """The processes of a run.

    rank, world  the number of this process among all, from 0, and how many there are
    local        its number among those of its machine, which names its device
    rounds       exchanges so far, the same in all processes
    """

    rank: int
    world: int
    local: int
    rounds: int = 0
    _store: Any = None
    _others: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # rank -> its last sign of life, and when it came
    _stopped: threading.Event = field(default_factory=threading.Event)
    _pieces: dict[int, int] = field(default_factory=dict)  # of the value that this process sent in a round
    hosts_store: bool = False

    @classmethod
    def joined(cls) -> Ranks:
        """Those of this run, from the variables that torchrun sets. Raises RankError if its store cannot be reached."""
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        ranks = cls(rank, world, local)
        ranks._connect()
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the reports, and has the terminal."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """The share of the examples that this process scores."""
        return Share(self.rank + 1, self.world)

    def _connect(self) -> None:
        distributed: Any = importlib.import_module("torch.distributed")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        name = f"lmeval {os.environ.get('TORCHELASTIC_RUN_ID', '')} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
        options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True, "timeout": timedelta(seconds=LOST)}
        try:
            store = distributed.TCPStore(host, port, self.world, is_master=self.is_first and not of_agent, **options)
            self._store, pulse = (distributed.PrefixStore(name, one) for one in (store, store.clone()))
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.world} cannot reach the store of this run at {host}:{port} within {LOST:g} s "
                f"({described(error)}). Is MASTER_ADDR the machine of rank 0, and its port open?"
            ) from None
        self.hosts_store = self.is_first and not of_agent
        threading.Thread(target=self._give_signs, args=(pulse,), daemon=True).start()

    def _give_signs(self, store: Any) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone: whoever waits is told
            while not self._stopped.wait(PULSE if number else 0):
                number += 1
                store.set(f"alive {self.rank}", f"{number} {socket.gethostname()}")

    def exchange(self, what: str, value: Any) -> list[tuple[str, Any]]:
        """What each process says in this round: what it is about, and a value; in the order of their ranks.

        Raises RankError if a process is lost, and for a value that cannot be sent.
        """
        try:
            raw = pickle.dumps((what, value))
        except Exception as error:
            raise RankError(f"{what}: rank {self.rank} cannot send its result to the others ({described(error)}).") from error
        number, self.rounds = self.rounds, self.rounds + 1
        pieces = [raw[at : at + PIECE] for at in range(0, len(raw), PIECE)]
        self._ask(lambda: [self._store.set(f"{number} {self.rank} {at}", piece) for at, piece in enumerate(pieces)])
        self._ask(lambda: self._store.set(f"{number} {self.rank}", str(len(pieces))))
        self._pieces[number] = len(pieces)
        found = [
            (what, value) if rank == self.rank else pickle.loads(self._received(number, rank, what))
            for rank in range(self.world)
        ]
        self._forget(number - 1)  # whoever is in this round has read all of the one before
        return found

    def together(self, what: str, value: T) -> list[T]:
        """The values of all processes, which all have come to the same point. Raises RankError where one is elsewhere."""
        found = self.exchange(what, value)
        for rank, (theirs, said) in enumerate(found):
            if theirs != what:
                ended = f": {said}" if isinstance(said, str) else ""
                raise RankError(f"rank {rank} is not at {what}, but at {theirs}{ended}")
        return [said for _, said in found]

    def from_first(self, what: str, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, while the others wait. Its error is raised in all."""
        found = self.together(what, attempt(make) if self.is_first else Attempt[T]())
        return self.results(found[:1])[0]

    def of_all(self, what: str, make: Callable[[], T]) -> list[T]:
        """What `make` returns in each process. If it fails in one, its error is raised there, and RankError in the others."""
        return self.results(self.together(what, attempt(make)))

    def in_each(self, what: str, make: Callable[[], T], *, first_alone: bool = False) -> T:
        """What `make` returns in this process; all call it at once, or the first before the others, which find what it has
        left. Nothing of it is sent: a model may be in it. An error in one is raised there, and RankError in the others."""
        own = Attempt[T]()
        if first_alone:
            own = attempt(make) if self.is_first else own
            self.results(self.together(f"{what}, in the first rank", Attempt(None, own.error, own.raised)))
        if not (first_alone and self.is_first):
            own = attempt(make)
        self.results(self.together(what, Attempt(None, own.error, own.raised)))
        return own.value  # type: ignore[return-value]

    def results(self, found: list[Attempt[T]]) -> list[T]:
        for rank, one in enumerate(found):
            if one.error is not None:
                if rank == self.rank and one.raised is not None:
                    raise one.raised
                raise RankError(f"rank {rank} failed: {one.error}")
        return [one.value for one in found]  # type: ignore[misc]

    def end(self, what: str, value: str | None) -> list[str | None]:
        """The values of all processes at the end of a test, once all have come to it: whoever is still in the midst of it is
        told that this one has ended."""
        while True:
            found = self.exchange(what, value)
            if all(theirs == what for theirs, _ in found):
                return [said for _, said in found]

    def leave(self) -> None:
        """Tell the others that this process ends, and wait until the first has written the reports: torchrun ends all others as
        soon as one ends with an error. The one that holds the store waits for all. A process that is lost is not waited for."""
        awaited = range(self.world) if self.hosts_store else range(1)
        with suppress(RuntimeError, RankError):
            self._store.set(f"left {self.rank}", "")
            for rank in awaited:
                while not self._store.check([f"left {rank}"]):
                    self._check_alive(rank, "the end of the run")
                    time.sleep(STEP)
        self._stopped.set()

    def lost(self) -> list[int]:
        """The ranks of which no sign of life comes any more, after two that should have come."""
        with suppress(RuntimeError):
            before = {rank: self._sign(rank) for rank in range(self.world)}
            time.sleep(2.5 * PULSE)
            left = [rank for rank in before if not self._store.check([f"left {rank}"])]
            return [rank for rank in left if rank != self.rank and self._sign(rank) == before[rank]]
        return []

    def _sign(self, rank: int) -> bytes:
        return bytes(self._store.get(f"alive {rank}")) if self._store.check([f"alive {rank}"]) else b""

    def _received(self, number: int, rank: int, what: str) -> bytes:
        key, pause = f"{number} {rank}", 0.001
        while not self._ask(lambda: self._store.check([key])):
            self._check_alive(rank, what)
            time.sleep(pause)
            pause = min(STEP, 2 * pause)
        count = int(self._ask(lambda: self._store.get(key)))
        return b"".join(self._ask(partial(self._store.get, f"{key} {at}")) for at in range(count))

    def _check_alive(self, rank: int, what: str) -> None:
        """Raise RankError if a process that is waited for has ended, or gave no sign of life for a while."""
        if self._ask(lambda: self._store.check([f"left {rank}"])):
            raise RankError(f"{what}: rank {rank} has ended its run, and this one waits for it.")
        sign, now = self._ask(lambda: self._sign(rank)), time.monotonic()
        last, since = self._others.get(rank, (None, now))
        self._others[rank] = (sign, since if sign == last else now)
        if now - self._others[rank][1] > LOST:
            where = sign.decode().partition(" ")[2] or "unknown"
            raise RankError(
                f"{what}: rank {rank} (on {where}) is lost: no sign of life for {LOST:g} s. It was killed, ran out of memory, "
                "or the network is down. What is finished is kept; start the run again, and it goes on from there."
            )

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:  # DistNetworkError, DistStoreError
            raise RankError(
                f"rank {self.rank} has lost the store of this run ({described(error)}): the process that holds it, torchrun or "
                "rank 0, has ended, or the network is down. What is finished is kept; start the run again."
            ) from None

    def _forget(self, number: int) -> None:
        count = self._pieces.pop(number, None)
        with suppress(RuntimeError):
            for at in range(count or 0):
                self._store.delete_key(f"{number} {self.rank} {at}")
            if count is not None:
                self._store.delete_key(f"{number} {self.rank}")


@dataclass
class Attempt(Generic[T]):
    """What a function returned, or its error; the error itself stays in the process that raised it."""

    value: T | None = None
    error: str | None = None
    raised: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value, "error": self.error, "raised": None}


def attempt(make: Callable[[], T]) -> Attempt[T]:
    try:
        return Attempt(make())
    except Exception as error:  # noqa: BLE001 - the other processes have to know
        return Attempt(None, str(error) if isinstance(error, LmevalError) else described(error), error)
