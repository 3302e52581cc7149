"""Many trainings in one process: what one has used is the system's again when it is done."""

import sys
from pathlib import Path

import psutil
import pytest
import torch
from personal import QUICK, ROWS

from langchain_cope import PersonalizeUser
from langchain_cope.engine import give_back


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is asked of Linux")
def test_trainings_leave_no_memory_that_could_be_given_back(tmp_path: Path) -> None:
    personalize = PersonalizeUser(model="starter", store=tmp_path, recipe=QUICK)
    personalize.invoke({"user_id": "alice", "history": ROWS})
    kept = psutil.Process().memory_info().rss
    give_back(torch.device("cpu"))
    assert kept - psutil.Process().memory_info().rss < 40_000_000
