"""How ranks find each other when they start, or start again after one of them died: through a store
of torch.distributed at MASTER_ADDR, where torchrun or a batch system has set RANK and WORLD_SIZE.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
import struct
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from runtime.setting_fields import UserError
from runtime.signals import end_with_parent

# Local rank and local world size, as torchrun, SLURM, Open MPI and MPICH call them.
_LOCAL_NAMES = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_START_SECONDS = 60.0  # within which all ranks must have started
_LAST_WORDS_SECONDS = 5.0  # how long rank 0 waits for other ranks to report the same error
_LOST = "no connection to the other ranks"
_SIOCGIFADDR = 0x8915  # ioctl that asks for the address of an interface: netdevice(7)


@dataclass(frozen=True)
class Rendezvous:
    """The rank of this process, and the store through which it exchanges values with the others."""

    store: dist.Store  # holds nothing of ranks that died
    name: str = ""  # unique to this start, and the same on all ranks
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # the rank among the processes of this machine
    local_world: int = 1  # the number of processes on this machine
    launched: bool = False  # whether by torchrun or another launcher
    restarted: bool = False  # whether by torchrun, after training had begun


def rendezvous() -> Rendezvous:
    """Waits until all ranks have started; without a launcher, this process is rank 0 of 1. Raises
    UserError that names what is missing: ranks, or variables of the environment.
    """
    if "RANK" not in os.environ:
        return Rendezvous(dist.HashStore())
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(f"RANK is set, and {' and '.join(missing)} not; start it with torchrun")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if by_torchrun():
        end_with_parent()
    with lost_ranks_are_one_line():
        # Torchrun has a store since before it started this process, so there is nothing to wait for
        # but a launcher that is gone. Otherwise rank 0 makes the store.
        there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = store_of_launcher(10.0 if there else _START_SECONDS, rank == 0 and not there)
        name, again = agree_on_name(store, rank, world, by_torchrun() and _mark().exists())
        own = dist.PrefixStore(name, store)
        local, here = place_on_machine(own, rank, world)
        _choose_interface(world > here)
        return Rendezvous(own, name, rank, world, local, here, True, again)


def place_on_machine(store: dist.Store, rank: int, world: int) -> tuple[int, int]:
    """Returns (local rank, local world size): from the variables of the launcher, or without them
    from the host names that all ranks exchange through the store.
    """
    for number, size in _LOCAL_NAMES:
        if number in os.environ and os.environ.get(size, "").isdigit():
            return int(os.environ[number]), int(os.environ[size])
    hosts = everyone(store, "host", socket.gethostname(), rank, world)
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def everyone(store: dist.Store, what: str, mine: str, rank: int, world: int) -> list[str]:
    """All-gathers a string, by the store: every rank's `mine`, in order of rank. what: its key."""
    store.set(f"{what} of {rank}", mine)
    return [_get(store, f"{what} of {r}") for r in range(world)]


def must_be_alone() -> None:
    """Raises UserError if a launcher has started several processes of train_minimal.py, which
    trains in one (RANK is set, and WORLD_SIZE is not 1).
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world != "1":
        raise UserError(
            f"this is one of {world} processes, and train_minimal.py trains in one; start "
            f"train_ddp.py instead: torchrun --nproc-per-node={world} train_ddp.py"
        )


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def mark_started() -> None:
    """Records that training has begun: ranks that torchrun starts again then continue the run."""
    if by_torchrun():
        with contextlib.suppress(OSError):
            _mark().touch()
            _remove_marks_of_the_dead()


def _mark() -> Path:
    """The path of a file that exists once the ranks of the torchrun that started this process have
    begun to train. (The restart count of torchrun stays 0 when a machine leaves, and its store goes
    with the machine that had it.)
    """
    launcher = os.getppid()
    name = f"rosetrainer-{os.getuid()}-{launcher}-{_began(launcher)}"
    return Path(tempfile.gettempdir()) / name


def _began(process: int) -> str:
    """The start time of a process of this machine, in clock ticks since boot; "0" where there is no
    /proc, and "gone" if there is no such process.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # another user's
        pass
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return "0"


def _remove_marks_of_the_dead() -> None:
    """Deletes the marks of torchruns that have ended, which would pile up otherwise. A mark cannot
    be deleted with its run: torchrun may start the ranks again until it ends itself.
    """
    for mark in Path(tempfile.gettempdir()).glob(f"rosetrainer-{os.getuid()}-*-*"):
        launcher, since = mark.name.split("-")[2:4]
        if launcher.isdigit() and _began(int(launcher)) != since:
            mark.unlink(missing_ok=True)


def agree_on_name(
    store: dist.Store, rank: int, world: int, again: bool = False
) -> tuple[str, bool]:
    """Returns (a name that no earlier start had, whether any rank passed again=True), the same on
    all ranks. The store outlives ranks that died, and whatever they left in it, such as their
    addresses, is under other names. Raises UserError if a rank is missing.

    Rank 0 offers its own new name to all ranks that it finds, until all `world` have answered to
    it.
    """
    me, given = f"{uuid.uuid4().hex} {int(again)}", dict[int, str]()
    store.set(f"rank{rank}", me)
    end = time.monotonic() + _START_SECONDS + (5 if rank else 0)  # rank 0 knows more
    while time.monotonic() < end:
        if rank == 0:
            for r in range(world):
                if store.check([f"rank{r}"]) and given.get(r) != (one := _get(store, f"rank{r}")):
                    given[r] = one
                    store.set(f"leader of {one}", me)
            there = [r for r, one in given.items() if r == 0 or store.check([f"{one} of {me}"])]
            if len(there) == world:
                again = any(one.endswith("1") for one in given.values())
                store.set(f"go {me}", str(int(again)))
                return me, again
        elif store.check([f"leader of {me}"]):
            leader = _get(store, f"leader of {me}")
            store.set(f"{me} of {leader}", "1")
            if store.check([f"go {leader}"]):
                return leader, _get(store, f"go {leader}") == "1"
        time.sleep(0.05)
    missing = [0] if rank else sorted(set(range(world)) - set(there))
    raise UserError(
        f"rank {', '.join(map(str, missing))} of {world} did not start within "
        f"{_START_SECONDS:.0f} s; was the command given on every machine, with the same number of "
        "processes?"
    )


def _get(store: dist.Store, key: str) -> str:
    return store.get(key).decode()


def store_of_launcher(seconds: float = 10.0, make: bool = False) -> dist.TCPStore:
    """A new connection to the store that all starts share. seconds: the timeout; make: whether this
    process hosts the store.
    """
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _await_address(where, seconds)
    wait = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(where, port, is_master=make, timeout=wait, wait_for_workers=False)


def _await_address(host: str, seconds: float) -> None:
    """Waits until the name of a machine resolves to an address, which can take a while when a
    cluster starts. Raises UserError after `seconds`. (Torch's store tries up to twice as long as it
    is asked to, and prints the frames of its C++ code.)
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as reason:
            if time.monotonic() >= end:
                cause = f"MASTER_ADDR={host} has no address ({reason.strerror})"
                raise UserError(
                    f"{_LOST}: {cause}; is the name of the first machine right?"
                ) from None
            time.sleep(min(0.5, seconds))


@contextmanager
def lost_ranks_are_one_line(gone: Callable[[], list[int]] = list) -> Iterator[None]:
    """Context manager that turns torch's errors about unreachable ranks into a UserError. gone():
    the ranks known to have ended; not called under torchrun, which names them itself.
    """
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as reason:
        cause = " ".join(str(reason).split())
        if isinstance(reason, dist.DistError) or "gloo" in cause or "rendezvous" in cause:
            ended = [] if by_torchrun() else gone()
            named = f": rank {', '.join(map(str, ended))} ended" if ended else ""
            raise UserError(
                f"{_LOST}{named} ({cause[:200]}); where one of them failed, its own message says "
                "why"
            ) from reason
        raise


def is_first_reporter(text: str) -> bool:
    """Whether this rank is the first one to report an error, so that ranks with the same error
    print it once (without torchrun, once on each machine). A lost connection is reported by every
    rank.

    The text is also written to the file of TORCHELASTIC_ERROR_FILE, from which torchrun prints the
    root cause at its end.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if "RANK" not in os.environ or world == 1 or text.startswith(_LOST):
        return True
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = hashlib.sha256(f"{attempt} {text}".encode()).hexdigest()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK") or 0)
    terminal = "" if by_torchrun() else f" on machine of {rank - local_rank}"
    try:
        store = store_of_launcher()
        first = store.add(f"said {key}{terminal}", 1) == 1
        found = store.add(f"found {key}", 1)
        # Without torchrun the store ends with rank 0, so rank 0 waits for the others to use it.
        end = time.monotonic() + (0 if by_torchrun() or rank else _LAST_WORDS_SECONDS)
        while found < world and time.monotonic() < end:
            time.sleep(0.05)
            found = store.add(f"found {key}", 0)
        return first
    except dist.DistError:  # the launcher is gone
        return True


def _choose_interface(several_machines: bool) -> None:
    """Has Gloo use the network interface that leads to the first machine, unless GLOO_SOCKET_IFNAME
    names another. Gloo's own choice is the interface of this machine's host name, which often
    stands for loopback. Does nothing on a single machine.
    """
    if not several_machines or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # one without an address
                    request = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24] == mine:
                        os.environ["GLOO_SOCKET_IFNAME"] = name
    except (ImportError, OSError):
        return  # not Linux, or IPv6 alone: Gloo chooses
