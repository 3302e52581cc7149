"""Many users personalized as one run: on this machine's processes, or on a Ray cluster.

    sources.py      whose histories there are
    worker.py       one user trained: the one function that every runner calls
    processes.py, on_ray.py, serial.py      runners: where workers live
    ledger.py       what is done, so that a run that was killed goes on
    discoveries.py, skewed_gains.py         who is published: false discoveries held down
    fleet.py        the run: hand out, settle, decide, report
    report.py       what came of it

Read `fleet.py` first. Nothing is published before every user is trained: what passes the gate waits
in the store as a candidate.
"""

from typing import TYPE_CHECKING

from langchain_cope._front_door import lazy_names

if TYPE_CHECKING:
    from langchain_cope.fleet.fleet import run_fleet
    from langchain_cope.fleet.processes import ProcessRunner
    from langchain_cope.fleet.report import FleetReport
    from langchain_cope.fleet.serial import SerialRunner
    from langchain_cope.fleet.sources import open_source
    from langchain_cope.fleet.tasks import Plan

__all__ = ["FleetReport", "Plan", "ProcessRunner", "SerialRunner", "open_source", "run_fleet"]

_MODULES = {
    "FleetReport": "report",
    "Plan": "tasks",
    "ProcessRunner": "processes",
    "SerialRunner": "serial",
    "open_source": "sources",
    "run_fleet": "fleet",
}
if not TYPE_CHECKING:  # type checkers read the imports above instead
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
