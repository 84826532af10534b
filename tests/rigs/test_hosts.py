"""Two hosts on one machine; `python -m tests.rigs.hosts` does things to them."""

import pytest

from reporting.metrics_file import read_records
from tests.rigs.hosts import ended, hosts, why_not

pytestmark = pytest.mark.long


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
        # torchrun on host 1 may say "failed to shutdown the rendezvous ... due to an error of type
        # RendezvousConnectionError": it closes the store of host 0, which may have ended before.
        said = place.said(0) + place.said(1)
        assert "error:" not in said and "Traceback" not in said
