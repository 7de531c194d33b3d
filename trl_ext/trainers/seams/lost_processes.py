"""
A process that dies while others train with it. Those that wait for it in a collective would wait for `ddp_timeout`,
half an hour by default, and some for ever. Here every process holds a connection to the first one, which the system
closes when a process ends, however it ends. All then say who is gone, and end.
"""

import json
import os
import secrets
import selectors
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread, Timer
from typing import Any

from accelerate.logging import get_logger
from torch.distributed import distributed_c10d

from ...rewards.guard import RewardFunctionError


logger = get_logger(__name__)

# Seconds that the main thread has to end by itself, with what the collective raises, before its process is ended
GRACE = 10.0
# How long an error of the main thread waits for news of who is gone
NEWS = 2.0
# How long training waits for the connection to the first process: a death before that would not be noticed
CONNECT = 30.0
# Of a machine that is gone, nothing comes: the system asks for a sign of life, and gives up after 45 seconds
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}
# Where the first process says where it listens, in the store that the process group has for all processes
KEY = "trl_ext/watch/{}"
_runs = count()
# A process that is forked, such as a worker of a data loader, must not keep a connection open for one that is dead
_open: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_all() -> None:
    for connection in list(_open):
        connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _open.add(connection)
    return connection


class _Peer:
    """A connection, over which each side sends JSON in lines."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        self.connection, self.rank = _kept_alive(connection), rank
        self._rest = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # it is gone, which is noticed when it is read from
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """What has come, and whether the connection is closed."""
        try:
            read = self.connection.recv(65536)
        except OSError:
            read = b""
        *lines, self._rest = (self._rest + read).split(b"\n")
        return [json.loads(line) for line in lines], not read


class ProcessWatch:
    """
    Watches the other processes of a training.

    Args:
        rank, processes (`int`):
            Which of how many processes this is.
        store (`torch.distributed.Store`):
            What all processes have in common.
        host (`str`):
            Where the first process is.

    Attributes:
        news (`str`, *optional*):
            Which process is gone, and how.
    """

    def __init__(self, rank: int, processes: int, store: Any, host: str) -> None:
        self.rank, self.processes = rank, processes
        self.store, self.host = store, host
        self.news: str | None = None
        self.lost = False  # whether the process of the news said nothing before it ended
        self._key = KEY.format(next(_runs))
        self._told, self._left, self._connected = Event(), Event(), Event()
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._woken, self._wakes = socket.socketpair()
        _open.update((self._woken, self._wakes))
        self._thread = Thread(target=self._watch, name="trl_ext watch", daemon=True)

    def start(self) -> None:
        """Begin to watch, in a thread. Returns when the first process would notice the end of this one."""
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        if not self._connected.wait(CONNECT):
            logger.warning(
                f"Process {self.rank} has not reached the first one after {CONNECT:.0f} s. Training begins; if it "
                "dies soon, the others wait for it.",
                main_process_only=False,
            )

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this process needs none of them any more, or with which error it stops."""
        if isinstance(error, RuntimeError) and not isinstance(error, RewardFunctionError):
            self._told.wait(NEWS)  # it may be what a collective raises when another process is gone
        self._left.set()
        stop = "done" if error is None else f"{type(error).__name__}: {error}"[:500]
        for peer in list(self._peers):
            peer.send(rank=self.rank, end=stop)
        self._wakes.close()
        self._thread.join(timeout=5)
        if error is not None and self.lost:
            error.add_note(str(self.news))

    def _tell(self, rank: int, how: str, lost: bool) -> None:
        """The first news counts: others may follow from it."""
        if self.news is not None or self._left.is_set():
            return
        self.lost = lost
        self.news = (
            f"Process {rank} of {self.processes} {how}. The others can't go on without it. Checkpoints that were "
            "written before are whole: start again with resume_from_checkpoint=True."
        )
        logger.error(self.news, main_process_only=False)
        self._told.set()
        timer = Timer(GRACE, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if not self._left.is_set():
            text = f"Process {self.rank} still waits, and ends now. {self.news}\n"
            os.write(2, text.encode())
            os._exit(1)

    # In the thread

    def _watch(self) -> None:
        try:
            self._listen() if self.rank == 0 else self._connect()
            self._connected.set()
            while not self._left.is_set():
                for key, _ in self._selector.select():
                    if key.data is not None:
                        key.data()
        except Exception as error:  # without a watch, `ddp_timeout` is the limit
            if not self._left.is_set():
                logger.warning(
                    f"Process {self.rank} can't watch the others ({type(error).__name__}: {error}). If one of them "
                    "dies, it waits for ddp_timeout.",
                    main_process_only=False,
                )
        finally:
            self._connected.set()
            for key in list(self._selector.get_map().values()):
                self._selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()

    def _add(self, connection: socket.socket, read: Callable[[], None]) -> None:
        _open.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, read)

    def _close(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer in self._peers:
            self._peers.remove(peer)

    def _listen(self) -> None:
        """As the first process."""
        both = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=self.processes
        )
        secret = secrets.token_hex()  # or whoever finds the port could end the run
        self._add(server, lambda: self._accept(server, secret))
        self.store.set(self._key, json.dumps({"port": server.getsockname()[1], "secret": secret}))

    def _accept(self, server: socket.socket, secret: str) -> None:
        peer = _Peer(server.accept()[0])
        self._add(peer.connection, lambda: self._hear(peer, secret))

    def _hear(self, peer: _Peer, secret: str) -> None:
        try:
            messages, closed = peer.read()
        except ValueError:
            messages, closed = [], True
        for message in messages:
            if peer.rank is not None:
                self._pass_on(peer.rank, str(message["end"]))
                self._close(peer)
                return
            if message.get("secret") != secret:
                closed = True
                break
            peer.rank = int(message["rank"])
            self._peers.append(peer)
        if closed:
            known = peer in self._peers
            self._close(peer)
            if known and peer.rank is not None:
                self._pass_on(peer.rank, None)

    def _pass_on(self, rank: int, end: str | None) -> None:
        """`None`: it ended without saying so."""
        if end == "done":
            return
        for other in self._peers:
            if other.rank != rank:
                other.send(rank=rank, end=end)
        self._heard(rank, end)

    def _heard(self, rank: int, end: str | None) -> None:
        if end is None:
            self._tell(rank, "is gone without a word: it was killed, or its machine can't be reached", lost=True)
        else:
            self._tell(rank, f"has stopped ({end})", lost=False)

    def _connect(self) -> None:
        """As any other process."""
        while not self.store.check([self._key]):  # not `get`, which would keep the main thread from the store
            if self._left.wait(0.05):
                return
        at = json.loads(self.store.get(self._key))
        first = _Peer(socket.create_connection((self.host, at["port"]), timeout=60), rank=0)
        first.connection.settimeout(None)
        self._peers.append(first)
        first.send(rank=self.rank, secret=at["secret"])
        self._add(first.connection, lambda: self._hear_first(first))

    def _hear_first(self, first: _Peer) -> None:
        messages, closed = first.read()
        for message in messages:
            if message["rank"] == 0:  # after that, its connection ends
                self._close(first)
            if message["end"] != "done":
                self._heard(message["rank"], message["end"])
            if message["rank"] == 0:
                return
        if closed:
            self._close(first)
            self._heard(0, None)


@contextmanager
def watching_processes(trainer: Any) -> Iterator[None]:
    """
    While a trainer trains: if another process dies, or stops with an error, say so, and end this one if it still waits
    `GRACE` seconds later.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
    """
    accelerator, host = trainer.accelerator, os.environ.get("MASTER_ADDR")
    if accelerator.num_processes == 1 or host is None:
        yield
        return
    store = distributed_c10d._get_default_store()
    watch = ProcessWatch(accelerator.process_index, accelerator.num_processes, store, host)
    try:
        watch.start()
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    watch.leave()
