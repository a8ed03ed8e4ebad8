"""Cases on several processes: a top-level function, called on every rank of a gloo group, whose results come back.

    def case(width: int) -> float: ...                      # torch.distributed is initialized
    one, two = processes.run(case, 8, ranks=2)              # the fixture `processes` of tests/conftest.py
    wanted = processes.alone(case, 8)                       # on one rank, once for all tests that ask

One process imports torch once and forks the ranks of every case: a case costs a few milliseconds a rank, begins in a
new process with a group of its own, and leaves nothing behind for the next. A rank that raises, dies or does not come
back ends its case, with the tracebacks of all ranks, and no other. Ranks have one thread each and see no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.util
import io
import json
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist

__all__ = ["GLOO", "GRACE", "TIMEOUT", "Outcome", "Processes", "RankError"]

#: Seconds a case may take, on a machine that is busy with other things.
TIMEOUT = 120.0
#: Seconds the other ranks have to come back after one that failed, which they may be waiting for.
GRACE = 5.0
#: Of the environment: ranks of one machine need no name of it, nor any interface but this.
GLOO = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
#: What ranks use, imported before they are forked.
_PRELOADED = (
    *("pytest", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"),
    *("torch.distributed.optim", "torch.distributed.tensor.parallel", "torch.nn.parallel"),
    *("steepest", "support.training"),
)
_TESTS = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one rank of a case.

    kind: "returned" a value; "raised" an error, which is None where it cannot be pickled; "died" without a word;
    "waiting" when the time was over.   text: the traceback of an error.   log: what it wrote to stdout and stderr, and
    of a rank that waits where its threads are.
    """

    kind: Literal["returned", "raised", "died", "waiting"]
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    log: str = ""


class RankError(AssertionError):
    """A case did not return on every rank; outcomes: of all of them."""

    def __init__(self, case: str, outcomes: Sequence[Outcome], seconds: float) -> None:
        self.outcomes = list(outcomes)
        lines = [f"{case} on {len(outcomes)} ranks, after {seconds:.1f} s:"]
        for rank, outcome in enumerate(outcomes):
            lines.append(f"rank {rank} {'is still ' if outcome.kind == 'waiting' else ''}{outcome.kind}")
            if outcome.kind != "returned":
                lines += [f"    {line}" for line in (outcome.text + outcome.log[-4000:]).splitlines()]
        super().__init__("\n".join(lines))


class Processes:
    """Runs cases on ranks that are forked for each of them; begun by the first case, ended by `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._cases = 0
        self._alone: dict[bytes, Any] = {}

    def close(self) -> None:
        """Ends the process that forks, and any rank with it."""
        if self._control is not None:
            self._control.close()
        if self._server is not None:
            self._server.wait()
        self._server = self._control = None
        self._folder.cleanup()

    def run(
        self,
        case: Callable[..., Any],
        *args: Any,
        ranks: int,
        timeout: float = TIMEOUT,
        group_timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """What case(*args, **kwargs) returned, rank by rank. RankError unless it did on all of them.

        case, args and results are pickled: a function of a module, tensors, anything of a module.   timeout: seconds
        for the case.   group_timeout: seconds a collective may take, by default more than the case may.
        """
        begun = time.monotonic()
        outcomes = self.outcomes(case, *args, ranks=ranks, timeout=timeout, group_timeout=group_timeout, **kwargs)
        if any(outcome.kind != "returned" for outcome in outcomes):
            raise RankError(case.__qualname__, outcomes, time.monotonic() - begun)
        return [outcome.value for outcome in outcomes]

    def alone(self, case: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a case returns on one rank, where it is the same in every run: it runs once for all tests of a worker,
        which do not change what they get.
        """
        key = _packed(case, args, kwargs, 0)
        if key not in self._alone:
            [self._alone[key]] = self.run(case, *args, ranks=1, **kwargs)
        return self._alone[key]

    def outcomes(
        self,
        case: Callable[..., Any],
        *args: Any,
        ranks: int,
        timeout: float = TIMEOUT,
        group_timeout: float | None = None,
        grace: float = GRACE,
        **kwargs: Any,
    ) -> list[Outcome]:
        """As `run`, for cases that are to fail. grace: seconds for the others once a rank has raised or died."""
        folder = Path(self._folder.name) / str(self._cases)
        self._cases += 1
        folder.mkdir()
        (folder / "case").write_bytes(_packed(case, args, kwargs, group_timeout or 2 * timeout + 60))
        for rank in range(ranks):
            (folder / f"log-{rank}").touch()
        readers, pids = self._forked(folder, ranks)
        return _Watch(folder, readers, pids).wait(timeout, grace)

    def _forked(self, folder: Path, ranks: int) -> tuple[list[int], list[int]]:
        """The ends of pipes from which results are read, and the processes that write them."""
        if self._server is None or self._server.poll() is not None:
            self._begin()
        assert self._control is not None
        pipes = [os.pipe() for _ in range(ranks)]
        try:
            socket.send_fds(self._control, [str(folder).encode()], [writer for _, writer in pipes])
        finally:
            for _, writer in pipes:
                os.close(writer)
        answer = self._control.recv(1 << 16)
        if not answer:
            raise RuntimeError("the process that forks the ranks has ended: what it wrote to stderr says why")
        return [reader for reader, _ in pipes], json.loads(answer)

    def _begin(self) -> None:
        """Starts the process that forks, away from the terminal's Ctrl-C, and waits until it has imported all."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join([str(_TESTS), *filter(None, sys.path)])
        environment = {**os.environ, **threads, **GLOO, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "support.processes", str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )


class _Watch:
    """Waits for the ranks of one case, and ends those that do not come back."""

    def __init__(self, folder: Path, readers: Sequence[int], pids: Sequence[int]) -> None:
        self._folder, self._pids = folder, pids
        self._selector = selectors.DefaultSelector()
        self._received = [io.BytesIO() for _ in readers]
        self._outcomes: dict[int, Outcome] = {}
        for rank, reader in enumerate(readers):
            self._selector.register(reader, selectors.EVENT_READ, rank)

    def wait(self, timeout: float, grace: float) -> list[Outcome]:
        """The outcomes when all are back, when the time is over, or when the grace after a failure is."""
        end = time.monotonic() + timeout
        try:
            while self._selector.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in self._selector.select(left):
                    if self._read(key.fd, key.data) and self._outcomes[key.data].kind != "returned":
                        end = min(end, time.monotonic() + grace)
        finally:
            self._end()
        return [self._outcomes[rank] for rank in range(len(self._pids))]

    def _read(self, reader: int, rank: int) -> bool:
        """Takes what has come; whether it was all."""
        if data := os.read(reader, 1 << 20):
            self._received[rank].write(data)
            return False
        self._forget(reader)
        log = self._log(rank)
        try:
            kind, value, error, text = pickle.loads(self._received[rank].getvalue())
            self._outcomes[rank] = Outcome(kind, value, error, text, log)
        except EOFError:
            self._outcomes[rank] = Outcome("died", log=log)
        return True

    def _end(self) -> None:
        """Ends every rank: those that returned stay until all have, which may be listening to them."""
        waiting = {key.data: key.fd for key in list(self._selector.get_map().values())}
        for rank in waiting:
            _send(self._pids[rank], signal.SIGUSR1)  # has its stacks written into its log
        if waiting:
            time.sleep(0.5)
        for rank, reader in waiting.items():
            self._forget(reader)
            self._outcomes[rank] = Outcome("waiting", log=self._log(rank))
        for rank, outcome in self._outcomes.items():
            if outcome.kind in ("returned", "waiting"):
                _send(self._pids[rank], signal.SIGKILL)
        self._selector.close()

    def _forget(self, reader: int) -> None:
        self._selector.unregister(reader)
        os.close(reader)

    def _log(self, rank: int) -> str:
        return (self._folder / f"log-{rank}").read_text(errors="replace")


def _send(pid: int, what: signal.Signals) -> None:
    """Sends a signal to a rank, which may have ended: SIGUSR1 ends one that has not come to its case yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)


def _packed(case: Callable[..., Any], args: Any, kwargs: Any, group_timeout: float) -> bytes:
    file = getattr(sys.modules[case.__module__], "__file__", None)
    if "<" in case.__qualname__ or file is None:
        raise ValueError(f"a case must be a function of a module, so that ranks can import it, but is: {case!r}")
    return pickle.dumps((case.__module__, file, case.__qualname__, pickle.dumps((args, kwargs)), group_timeout))


# ---- the other side ------------------------------------------------------------------------------------------------


def _serve(control: socket.socket) -> None:
    """Forks the ranks of one case after another, until the tests close their end."""
    torch.set_num_threads(1)
    for name in _PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks: their pipes say when they are done
    while True:
        message, writers, _, _ = socket.recv_fds(control, 1 << 16, 256)
        if not message:
            return
        folder = Path(message.decode())
        pids = []
        for rank in range(len(writers)):
            if not (pid := os.fork()):
                control.close()
                _be_rank(rank, writers, folder)
            pids.append(pid)
        for writer in writers:
            os.close(writer)
        control.send(json.dumps(pids).encode())


def _be_rank(rank: int, writers: Sequence[int], folder: Path) -> None:
    """The life of a rank; does not return."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other, writer in enumerate(writers):
            if other != rank:
                os.close(writer)
        log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        returned, answer = _called(rank, len(writers), folder)
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(writers[rank], "wb") as pipe:
            pipe.write(answer)
        while returned:  # gloo takes it for an error of its own when a rank leaves; one that raised leaves at once
            signal.pause()
    finally:
        os._exit(0)


def _called(rank: int, ranks: int, folder: Path) -> tuple[bool, bytes]:
    """Whether the case returned on this rank, and its outcome, pickled."""
    try:
        module, file, name, arguments, group_timeout = pickle.loads((folder / "case").read_bytes())
        case: Any = _module(module, file)
        for part in name.split("."):
            case = getattr(case, part)
        args, kwargs = pickle.loads(arguments)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=group_timeout),
        )
        dist.barrier()  # a rank that raises at once would leave while others are still connecting to it
        return True, pickle.dumps(("returned", case(*args, **kwargs), None, ""))
    except BaseException as error:
        text = traceback.format_exc()
        with contextlib.suppress(Exception):
            return False, pickle.dumps(("raised", None, pickle.loads(pickle.dumps(error)), text))
        return False, pickle.dumps(("raised", None, None, text))


def _module(name: str, file: str) -> ModuleType:
    """A module of the tests, by its file: pytest imports them under names that are on no path."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # at once: nothing is to be put away
