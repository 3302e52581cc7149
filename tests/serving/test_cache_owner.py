"""Nobody learns from timing what others asked: what a prompt left behind stays with its owner."""

import shutil
from pathlib import Path
from typing import Any

from serving.conftest import Running, running

SECRET = "The merger with Initech is to be announced on Monday, " * 6


def num_reused(server: Running, role: str, text: str, **fields: Any) -> int:
    """Tokens that an answer did not have to compute."""
    engine = server.state.engine
    assert engine is not None
    before = engine.statistics().prefix_tokens_reused
    assert server.ask(role, text, max_tokens=2, **fields).status_code == 200
    return engine.statistics().prefix_tokens_reused - before


def test_a_prompt_of_anothers_is_read_anew_and_ones_own_is_not(server: Running) -> None:
    assert num_reused(server, "bob", SECRET) == 0
    assert num_reused(server, "alice", SECRET) == 0
    assert num_reused(server, "base", SECRET) == 0
    assert num_reused(server, "app", SECRET, user="alice") == 0, "another key is another owner"
    assert num_reused(server, "app", SECRET, user="alfred") == 0, "so is another user of a key's"
    assert num_reused(server, "bob", SECRET) > 100
    assert num_reused(server, "alice", SECRET) > 100


def test_a_public_prompt_is_computed_once_for_all(
    base: Path, published: Path, tmp_path: Path
) -> None:
    public = "You answer for the city library. Opening hours are nine to five. " * 3
    own = shutil.copytree(base, tmp_path / "base")  # an engine without anybody's beginnings
    with running(own, published, tmp_path, public_prompt=public) as server:
        turns = [
            {"role": "system", "content": public},
            {"role": "user", "content": SECRET},
        ]
        assert num_reused(server, "bob", "", messages=turns) == 0
        reused = num_reused(server, "base", "", messages=turns)
        prefix = len(server.state.public_prefix)
        assert 32 <= reused <= prefix
