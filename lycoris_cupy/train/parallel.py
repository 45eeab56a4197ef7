"""Several processes that train one adapter together, each on its share of every batch.

The parent starts them, hands their messages on, and watches: if one fails or is lost, all others
are killed, whatever they wait for, and the error says which. Messages of a child:

    ("join", NCCL's id or None)   answered by the id of process 0, when all have joined
    ("mean", array)               answered by the mean, when all have sent theirs
    ("done", result), ("error", error, elsewhere)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import LycorisError
from .reducers import NcclReducer, ParentReducer, require_gpus

_GRACE = 3.0  # seconds in which others may say more of an error that all of them have met


class LostProcessError(LycorisError, RuntimeError):
    """A process ended without a word, or was killed. rank: which."""

    def __init__(self, rank: int, size: int, code: int | None):
        self.rank = rank
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        super().__init__(
            f"process {rank} of {size} {how}: the others were stopped, the last checkpoint is "
            "whole: resume from it"
        )


def launch(function: Callable[..., Any], size: int, *arguments: Any, device: str = "cuda") -> Any:
    """function(reducer, *arguments) in `size` new processes; what it returns in process 0.

    The function is one of a module, and makes its engine on `reducer.device`. device: 'cuda', GPU i
    for process i, or 'cpu'. Raises what a process has raised, or LostProcessError, when none of the
    processes is left.
    """
    if size < 1:
        raise LycorisError(f"{size} processes were asked for, expected at least 1")
    if device == "cuda":
        require_gpus(size)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    processes, connections, lives = [], [], []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            alive, life = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(function, arguments, theirs, alive, rank, size, device),
                name=f"lycoris-cupy {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            alive.close()
            processes.append(process)
            connections.append(ours)
            lives.append(life)
        return _Parent(processes, connections).serve()
    finally:
        for process in processes:
            process.kill()  # one that has ended does not mind
        for process in processes:
            process.join()
        for connection in (*connections, *lives):
            connection.close()


class _Parent:
    """Answers messages until all processes are done."""

    def __init__(self, processes: list, connections: list[Connection]):
        self._processes, self._connections = processes, connections
        self._waiting: dict[int, Any] = {}  # rank -> what it has sent and waits for
        self._results: dict[int, Any] = {}
        self._errors: list[tuple[BaseException, bool]] = []
        self._open = set(range(len(processes)))
        self._deadline: float | None = None

    def serve(self) -> Any:
        while self._open and not self._late():
            left = None if self._deadline is None else self._deadline - time.monotonic()
            by_connection = {self._connections[rank]: rank for rank in self._open}
            for connection in wait(list(by_connection), left):
                self._receive(by_connection[connection])  # pyright: ignore[reportArgumentType]
        if self._errors:
            # Who has met the cause knows more than who has heard of it.
            raise min(self._errors, key=lambda pair: pair[1])[0]
        for process in self._processes:
            process.join(_GRACE)  # what it has printed is written when it ends
        return self._results[0]

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _receive(self, rank: int) -> None:
        try:
            kind, *content = self._connections[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(1)
            lost = LostProcessError(rank, len(self._processes), self._processes[rank].exitcode)
            self._fail(rank, lost, False)
            return
        if kind == "error":
            self._fail(rank, *content)
        elif kind == "done":
            self._results[rank] = content[0]
            self._open.discard(rank)
        else:
            self._waiting[rank] = content[0]
            if len(self._waiting) == len(self._processes):
                self._answer(kind)

    def _answer(self, kind: str) -> None:
        sent = [self._waiting[rank] for rank in range(len(self._processes))]
        self._waiting.clear()
        answer = sent[0] if kind == "join" else sum(sent[1:], sent[0]) / len(sent)
        for connection in self._connections:
            try:
                connection.send(answer)
            except OSError:
                pass  # it is gone: the next look at it says so

    def _fail(self, rank: int, error: BaseException, elsewhere: bool) -> None:
        self._errors.append((error, elsewhere))
        self._open.discard(rank)
        if isinstance(error, LostProcessError):
            self._deadline = 0.0  # the others can only wait for it
        elif self._deadline is None:
            self._deadline = time.monotonic() + _GRACE


def _child(function, arguments, connection, alive, rank: int, size: int, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, args=(alive,), daemon=True).start()
    try:
        kind = ParentReducer if device == "cpu" else NcclReducer
        reducer = kind(connection, rank, size)  # NCCL takes leave of the others when it goes
        result = function(reducer, *arguments)
        connection.send(("done", result if rank == 0 else None))
    except (LycorisError, OSError) as error:
        connection.send(("error", _plain(error), getattr(error, "elsewhere", False)))
    except BaseException as error:
        traceback.print_exc()
        what = f"process {rank} of {size} failed: {type(error).__name__}: {error}"
        connection.send(("error", LycorisError(what), False))


def _plain(error: Exception) -> Exception:
    """The error as one that can be sent: of the builtin or our own kind nearest to it."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    for kind in type(error).__mro__:
        if kind.__module__ == LycorisError.__module__:
            return kind(str(error))
    return LycorisError(str(error))


def _die_with_parent(alive: Connection) -> None:
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(1)
