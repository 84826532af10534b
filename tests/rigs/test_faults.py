"""A short version of the fault rig; `python -m tests.rigs.faults` is the whole of it."""

import os

import pytest

from tests.rigs.faults import GROUPS, Rig

pytestmark = pytest.mark.long

# What numbers, outside and worlds try has short tests beside the modules.
SHORT = "damage signals second_signal hangs restarts storage kills rank_kills".split()


@pytest.mark.parametrize("group", SHORT)
@pytest.mark.timeout(400)
def test_no_fault_hangs_loses_a_checkpoint_or_changes_a_number(tmp_path, group):
    rig = Rig(tmp_path / "rig", short=True, at_once=os.cpu_count() or 1)
    (tmp_path / "rig").mkdir()
    GROUPS[group](rig)
    assert rig.rows and rig.bad() == 0, "\n".join([rig.table(), *rig.notes])
