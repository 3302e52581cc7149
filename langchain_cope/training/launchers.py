"""What launchers of distributed training leave in a process is kept from our trainers.

torchrun, accelerate, MPI, Slurm and others tell a process by its environment that it is one of
several, and which precision or plugin it is to use. A training here is one process on one device:
with a launcher's leftovers in sight (in a notebook, a batch job, a shell that once ran torchrun)
accelerate would wait for the others for ever.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState, PartialState

_NAMES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "MASTER_ADDR",
        "MASTER_PORT",
        "FORK_LAUNCHED",
    }
)
_PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "FP8_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
    "TORCHELASTIC_",
    "DEEPSPEED_",
    "DS_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_",
    "MV2_",
    "SLURM_",
    "SM_",
    "SAGEMAKER_",
)
# Accelerate's singletons: of an earlier training, or of the program that this runs in.
_STATES = (PartialState, AcceleratorState, GradientState)


@contextmanager
def launchers_hidden() -> Iterator[None]:
    """Run the block as if no launcher had started the process; all is as before afterwards."""
    hidden = _take_away()
    states = [dict(state._shared_state) for state in _STATES]
    _set_states([{} for _ in _STATES])
    try:
        yield
    finally:
        _take_away()  # what accelerate has set for itself
        os.environ.update(hidden)
        _set_states(states)


def _take_away() -> dict[str, str]:
    """Take what launchers set out of the environment, and return it."""
    names = [name for name in os.environ if name in _NAMES or name.startswith(_PREFIXES)]
    return {name: os.environ.pop(name) for name in names}


def _set_states(values: list[dict[str, object]]) -> None:
    for state, value in zip(_STATES, values, strict=True):
        state._shared_state.clear()
        state._shared_state.update(value)
