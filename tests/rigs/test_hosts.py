"""Two hosts on one machine; `python -m tests.rigs.hosts` does things to them."""

import re

import pytest

from reporting.metrics_file import read_records
from tests.rigs.hosts import ended, hosts, why_not

pytestmark = pytest.mark.long
# torchrun closes the store of host 0, which may have ended before that of host 1 gets to it.
LATE = (
    r"has failed to (shutdown the rendezvous|send a keep-alive heartbeat to the rendezvous) '7' due "
    r"to an error of type RendezvousConnectionError"
)


def test_two_hosts_train_one_run():
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    with hosts() as place:
        short = ["--num-steps", "30", "--eval-steps", "30"]
        codes = ended([place.start(i, "2", *short) for i in (0, 1)], 120)
        assert codes == [0, 0], place.said(0) + place.said(1)
        records = read_records(place.folder / "logs/train_ddp.jsonl")
        # Rank 0 alone wrote: one run record, 30 of training, two evaluations.
        assert [p.name for p in (place.folder / "logs").glob("*.jsonl")] == ["train_ddp.jsonl"]
        assert len(records) == 1 + 30 + 2 and records[0]["environment"]["processes"] == 4
        said = re.sub(LATE, "", place.said(0) + place.said(1))
        assert "error" not in said and "Traceback" not in said
