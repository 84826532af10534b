"""How CPU threads wait for each other. The OpenMP library reads it when torch loads, so this module
is imported before.
"""

from __future__ import annotations

import os

# Threads that wait for the others of a matrix product spin by default. On a machine with other
# work they take the cores from those they wait for: one busy process made steps 3 to 4 times as
# long, two made small ones 70 times as long, and with threads that sleep it is at most twice, at
# the price of small steps on an idle machine (docs/speed.md). What the user has set stays.
WAITING_SET_BY_USER = {
    name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ
}
if WAITING_SET_BY_USER in ({}, {"OMP_WAIT_POLICY": "passive"}):  # the latter from who started this
    WAITING_SET_BY_USER = {}
    os.environ["OMP_WAIT_POLICY"] = "passive"
