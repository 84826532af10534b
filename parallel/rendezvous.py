"""How ranks find each other when they start, or are started again after one of them died: through
the store of the launcher, torchrun or a batch system that sets RANK, WORLD_SIZE and MASTER_ADDR.
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

# What torchrun, SLURM, Open MPI and MPICH call a rank's number on its machine, and how many it has.
_LOCAL_NAMES = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_START_SECONDS = 60.0  # in which all ranks have to be there
_LAST_WORDS_SECONDS = 5.0  # in which ranks that fail alike say so
_LOST = "no connection to the other ranks"
_SIOCGIFADDR = 0x8915  # ioctl that asks for the address of an interface: netdevice(7)


@dataclass(frozen=True)
class Rendezvous:
    """Which process this is, and where it meets the others."""

    store: dist.Store  # in which ranks that died have left nothing
    name: str = ""  # of this start, the same on all ranks
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_world: int = 1  # how many those are
    launched: bool = False  # by torchrun or the like
    restarted: bool = False  # by torchrun, after these ranks had begun to train


def rendezvous() -> Rendezvous:
    """Waits for all ranks. Raises UserError that names those that are missing."""
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
    """(number of this rank among those of its machine, how many those are): what the launcher says,
    or if it says nothing, what all ranks tell each other of their machines through the store.
    """
    for number, size in _LOCAL_NAMES:
        if number in os.environ and os.environ.get(size, "").isdigit():
            return int(os.environ[number]), int(os.environ[size])
    hosts = everyone(store, "host", socket.gethostname(), rank, world)
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def everyone(store: dist.Store, what: str, mine: str, rank: int, world: int) -> list[str]:
    """What each rank says of `what`, in order; all ranks call it."""
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
    """From here on there is something to continue, should torchrun start the ranks again."""
    if by_torchrun():
        with contextlib.suppress(OSError):
            _mark().touch()
            _remove_marks_of_the_dead()


def _mark() -> Path:
    """A file that stands for the torchrun on this machine that started this process: it is there
    once its ranks had begun. (Its count of restarts stays 0 when a machine leaves, and its store
    goes with the machine that had it.)
    """
    launcher = os.getppid()
    name = f"rosetrainer-{os.getuid()}-{launcher}-{_began(launcher)}"
    return Path(tempfile.gettempdir()) / name


def _began(process: int) -> str:
    """When a process of this machine began, in ticks of its clock; "0" where there is no /proc, and
    "gone" if there is no such process.
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
    """Their number would grow with each start. A mark cannot go earlier, with its run: torchrun may
    start the ranks again until it ends itself.
    """
    for mark in Path(tempfile.gettempdir()).glob(f"rosetrainer-{os.getuid()}-*-*"):
        launcher, since = mark.name.split("-")[2:4]
        if launcher.isdigit() and _began(int(launcher)) != since:
            mark.unlink(missing_ok=True)


def agree_on_name(
    store: dist.Store, rank: int, world: int, again: bool = False
) -> tuple[str, bool]:
    """A name that no earlier start had, and whether some rank says again. The store outlives ranks
    that died, and whatever they left in it, such as their addresses, is under other names. Raises
    UserError where a rank is missing.

    Rank 0 gives its own new name to all that it finds, until all of `world` have answered to it.
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
    """A connection of its own to the store that all starts share."""
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _await_address(where, seconds)
    wait = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(where, port, is_master=make, timeout=wait, wait_for_workers=False)


def _await_address(host: str, seconds: float) -> None:
    """Waits until the name of a machine has an address, as it may get one while a cluster starts.
    Raises UserError. (Torch's store tries up to twice as long as it is asked to, and prints the
    frames of its C++ code.)
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
    """What torch raises where another rank is not to be reached becomes a UserError. gone(): which
    ranks are known to have ended; torchrun knows itself, and says so.
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
        # Without torchrun the store ends with rank 0, and without it others know nothing.
        end = time.monotonic() + (0 if by_torchrun() or rank else _LAST_WORDS_SECONDS)
        while found < world and time.monotonic() < end:
            time.sleep(0.05)
            found = store.add(f"found {key}", 0)
        return first
    except dist.DistError:  # the launcher is gone
        return True


def _choose_interface(several_machines: bool) -> None:
    """Has Gloo talk to other machines over the network interface that leads to the first of them,
    unless GLOO_SOCKET_IFNAME says which. Its own choice is that of this machine's name, which often
    stands for the loopback interface.
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
