import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, toy_settings
from helpers import TINY

from benchmarks.common import on_ranks
from model import GPTModel
from parallel import hang_guard as hang
from parallel import rendezvous as start_module
from parallel.process_group import Ranks, identity, refuse_shared_gpus, sum_ranks
from parallel.rendezvous import Rendezvous, agree_on_name
from runtime.setting_fields import UserError


def test_sums_stay_float64_and_leave_their_input_alone(group):
    values = torch.tensor([1e9 + 0.25], dtype=torch.float64)
    assert sum_ranks(values).item() == 1e9 + 0.25 and sum_ranks(values) is not values


def test_ranks_agree_on_the_largest_wish(group):
    assert Ranks().agree(15, 0) == [15, 0]
    assert Ranks(on_cpu=dist.group.WORLD).agree(0, True) == [0, 1]


def test_a_port_in_use_ends_with_one_line(program):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        out = program("train_ddp.py", *TINY.split(), ok=False, **env)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: no connection to the other ranks") and "Traceback" not in out


def different(ranks):
    """What each way of comparing says on all of two ranks that differ."""
    ranks = dataclasses.replace(ranks, host=f"host{ranks.rank}")
    said = []

    def fails_on_one(path):
        if ranks.rank == 1:
            raise UserError(f"{path}: no such file")
        return "data"

    def fails_on_both(path):
        raise UserError(f"{path}: no such file")

    for work in (
        lambda: ranks.each(fails_on_one, "a.txt"),
        lambda: ranks.each(fails_on_both, "a.txt"),
        lambda: ranks.must_agree({"torch": f"2.{ranks.rank}", "--seed": 3}),
        lambda: ranks.must_agree({"torch": "2.13", "--seed": 3}),
        lambda: ranks.each(len, "abc"),
    ):
        try:
            said.append(work())
        except UserError as reason:
            said.append(str(reason))
    everyone = [None] * ranks.world
    dist.all_gather_object(everyone, said)
    return everyone


def test_what_is_wrong_on_one_rank_stops_all_with_its_name():
    zero, one = on_ranks(2, different)
    assert zero == one
    assert zero[0] == (
        "rank 1 on host1: a.txt: no such file; the others have it: do all machines see the same "
        "files as host1?"
    )
    assert zero[1] == "a.txt: no such file"
    assert zero[2].startswith("the ranks differ in torch: 2.0 on rank 0 (host0), 2.1 on rank 1 (ho")
    assert zero[3:] == [None, 3]


def first_decides(ranks):
    def fails(path):
        raise UserError(f"{path}: seen by rank {ranks.rank}")

    called = []
    found = ranks.from_first(lambda word: called.append(1) or f"{word} {ranks.rank}", "rank")
    try:
        ranks.from_first(fails, "a.pt")
    except UserError as mistake:
        return ranks._all((found, len(called), str(mistake), mistake.of_all))


def test_all_ranks_get_what_the_first_one_found_or_its_mistake():
    said = ("a.pt: seen by rank 0", True)
    assert on_ranks(2, first_decides) == [("rank 0", 1, *said), ("rank 0", 0, *said)]


def test_a_rank_may_take_long_for_what_each_does_alone(group):
    assert Ranks().each(lambda: hang._progress.long_work) == 1
    before = hang._progress.exchanges
    Ranks().agree(1), sum_ranks(torch.ones(1))
    assert hang._progress.exchanges == before + 2 and hang._progress.long_work == 0


def test_identity_tells_one_changed_weight():
    args = toy_settings()
    data = {"train": {"fingerprint": "a", "source": "x"}, "val": {"fingerprint": "b"}}
    model = GPTModel(args.model, seed=1)
    before = identity(args, data, model)
    assert identity(args, {**data, "train": {"fingerprint": "a", "source": "y"}}, model) == before
    with torch.no_grad():
        model.wte.weight[3, 3] += 1e-6
    after = identity(args, data, model)
    assert [k for k in before if before[k] != after[k]] == ["initial weights"]
    assert identity(args, {**data, "val": {}}, model)["data"] != before["data"]


class Two:
    """Two ranks without torchrun, started by hand."""

    def __init__(self, program, *flags):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "train_ddp.py"), *TINY.split(), *flags],
                cwd=program.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**program.env, **env, "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"},
            )
            for r in (0, 1)
        ]  # fmt: skip

    def said(self):
        """What each printed on stderr."""
        return [process.communicate(timeout=90)[1] for process in self.processes]


def test_without_torchrun_a_mistake_of_all_ranks_is_said_once_too(program):
    ranks = Two(program, "--n-heads", "3")
    said = "".join(ranks.said())
    assert [p.returncode for p in ranks.processes] == [2, 2]
    assert said.count("\n") == 1 and "error: n_heads=3 does not divide" in said


@pytest.mark.parametrize("killed", [0, 1])
def test_without_torchrun_a_rank_that_is_killed_is_named_by_the_others(program, killed):
    ranks = Two(program, "--num-steps", "100000")
    ranks.processes[0].stdout.readline()  # both are connected
    ranks.processes[killed].kill()
    error = ranks.said()[1 - killed].splitlines()[-1]
    assert f"error: no connection to the other ranks: rank {killed} ended" in error


def test_marks_of_launchers_that_are_gone_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(start_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    user, ended = os.getuid(), subprocess.Popen(["true"])
    ended.wait()
    mine = f"rosetrainer-{user}-{os.getpid()}-{start_module._began(os.getpid())}"
    kept = {
        mine,
        f"rosetrainer-{user + 1}-{ended.pid}-5",
        "rosetrainer-x",
        f"rosetrainer-{user}-x-5",
    }
    reused = f"rosetrainer-{user}-{os.getpid()}-5"  # the number of a process is used again
    for name in (*kept, f"rosetrainer-{user}-{ended.pid}-5", reused):
        (tmp_path / name).touch()
    start_module.mark_started()
    own = start_module._mark().name
    assert {p.name for p in tmp_path.iterdir()} == kept | {own}


def test_missing_ranks_are_named(monkeypatch):
    monkeypatch.setattr(start_module, "_START_SECONDS", 0.3)
    store = dist.HashStore()
    store.set("rank1", "of a start before, whose process is gone")
    with pytest.raises(UserError, match=r"rank 1, 2 of 3 did not start within 0 s"):
        agree_on_name(store, 0, 3)


def test_ranks_that_start_again_meet_under_another_name():
    store, names = dist.HashStore(), set()
    for world in (3, 2, 3):  # the store stays, with what the starts before have left
        with ThreadPoolExecutor(world) as pool:
            one_knows = world == 2  # whose launcher was there before; another's is new
            work = partial(agree_on_name, store, world=world)
            found = list(pool.map(lambda r: work(r, again=one_knows and r == 1), range(world)))  # noqa: B023
        assert len(set(found)) == 1 and found[0][1] == one_knows
        names.add(found[0][0])
    assert len(names) == 3


def test_a_mistake_of_all_ranks_is_said_once(program):
    out = program("train_ddp.py", *TINY.split(), "--n-heads", "3", ok=False, ranks=3)
    assert out.count("error: n_heads=3 does not divide") == 1
    assert "n_heads=3 does not divide" in out[out.index("Root Cause") :]  # torchrun's last words


def test_torchrun_with_the_script_for_one_process_names_the_other(program):
    out = program("train_minimal.py", *TINY.split(), ok=False, ranks=2)
    said = (
        "error: this is one of 2 processes, and train_minimal.py trains in one; start train_ddp.py"
    )
    assert out.count(said) == 1 and "in use" not in out
    program("train_minimal.py", *TINY.split(), "--num-steps", "2", ranks=1)


def test_data_that_one_rank_lacks_is_an_error_of_all(tmp_path, program):
    # Two processes in different folders, as on two machines; no torchrun.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (tmp_path / "a/text.txt").write_text("to be or not to be. " * 2000)
    command = [sys.executable, str(ROOT / "train_ddp.py"), "--train-data", "text.txt"]
    env = {**program.env, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [*command, "--device", "cpu"], cwd=tmp_path / "ab"[rank], text=True,
            env={**env, "RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    start = time.monotonic()
    said = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert time.monotonic() - start < 60
    for text in said:
        assert text.startswith("error: rank 1 on ") and "text.txt" in text
        assert "Traceback" not in text


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    from runtime.device import use_threads

    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    use_threads(0, 1)  # alone: torch's own choice
    for threads, local_world in ((0, 2), (0, 3), (0, 16), (5, 1), (5, 2)):
        use_threads(threads, local_world)
    assert chosen == [4, 2, 1, 5, 5]


def on_threads(world, work):
    """What work(rank) returns or raises in so many threads at once, as text where it raises."""

    def one(rank):
        try:
            return work(rank)
        except UserError as reason:
            return str(reason)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.mark.parametrize(
    "said, wanted",
    [
        ({"SLURM_LOCALID": "3", "SLURM_NTASKS_PER_NODE": "8"}, [(3, 8)] * 4),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, [(1, 2)] * 4),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "SLURM_LOCALID": "0"}, [(2, 4)] * 4),
        ({}, [(0, 3), (0, 1), (1, 3), (2, 3)]),  # only RANK: ranks 0, 2 and 3 are on one machine
    ],
)
def test_a_rank_knows_its_place_on_its_machine(monkeypatch, said, wanted):
    for name in {n for pair in start_module._LOCAL_NAMES for n in pair}:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    store, host = dist.HashStore(), threading.local()
    monkeypatch.setattr(start_module.socket, "gethostname", lambda: host.name)

    def work(rank):
        host.name = "b" if rank == 1 else "a"
        return start_module.place_on_machine(store, rank, 4)

    assert on_threads(4, work) == wanted


@pytest.mark.parametrize(
    "gpus, said",
    [
        (["a 1", "a 2", "b 1", "b 2"], None),
        (["a 1", "a 2", "a 1", "b 1"], "ranks 0, 2 would all use GPU 1 of a"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_on_all(gpus, said):
    store = dist.HashStore()

    def work(rank):
        refuse_shared_gpus(Rendezvous(store, "name", rank, 4), gpus[rank])

    found = on_threads(4, work)
    assert all(f is None if said is None else f.startswith(said) for f in found)


def test_a_machine_without_an_address_is_waited_for_and_then_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(
        UserError, match=r"no connection .* MASTER_ADDR=no\.such\.host\.invalid has no"
    ):
        start_module.store_of_launcher(0.1)
    asked = []

    def third_time(*_):
        asked.append(1)
        if len(asked) < 3:
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(start_module.socket, "getaddrinfo", third_time)
    start_module._await_address("node7", 5.0)
    assert len(asked) == 3


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_its_store(tmp_path):
    # The launcher dies before its process has got to the store, which nobody serves.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from parallel import rendezvous as r; "
    )
    script += "open('started', 'w').close(); r.rendezvous()"
    launcher = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
    )
    launcher += "open('pid', 'w').write(str(p.pid)); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", launcher, script], env=env, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # its thread knows its parent now
    run.kill()
    run.wait()
    pid, end = int((tmp_path / "pid").read_text()), time.monotonic() + 8
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the rank is still there")
