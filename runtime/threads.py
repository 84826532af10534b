"""Makes CPU threads sleep, not spin, while they wait for each other, unless the user has set this.
The OpenMP library reads it when torch loads, so this module must be imported before torch.
"""

from __future__ import annotations

import os

# By default a thread that has finished its part of a matrix product spins until the others have.
# On a machine with other work it takes the cores from the threads that it waits for: one busy
# process made steps 3 to 4 times as long, and two made small steps 70 times as long. With threads
# that sleep, steps are at most twice as long, but small steps on an idle machine get slower
# (docs/speed.md). What the user has set stays.
WAITING_SET_BY_USER = {
    name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ
}
if WAITING_SET_BY_USER in ({}, {"OMP_WAIT_POLICY": "passive"}):  # passive: by a parent process
    WAITING_SET_BY_USER = {}
    os.environ["OMP_WAIT_POLICY"] = "passive"
