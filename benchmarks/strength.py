"""Which strength of the contrast and of the adapter users need, and whether choosing it pays.

    python benchmarks/strength.py users.jsonl --jobs FOLDER [--task-adapter FOLDER] [--limit 6]
        [--seconds 3000] [--out figures.json]

The file has one user a line (`{"user_id", "history": [{"prompt", "completion"}], "queries"}`). Each
user's adapter is trained on the history by SFT, unless the job folder, as `cope-lc evaluate
--job-dir` leaves it, holds one; then the queries are answered at every setting of `GRID`, greedily.
What is done lies in the job folder, with all texts, and is not done again: so a run can be stopped,
by `--seconds` too, and go on. `--out` gets figures alone, no text.

- *common*: over all users and queries, each setting's ROUGE-L and style voice (0 strangers' words,
  1 the user's own), their mean being the aim, and the likelihood that `likelihood.py` guards.
  The best one by the one-standard-error rule is what `personalization/strengths.json` may hold.
- *chosen*: by `personalization/strength.py`, from one half of a user's queries, and measured on the
  other half, both ways round, against the best common setting of all the *other* users.

The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from datasets.utils import logging as datasets_logging
from transformers.utils import logging as transformers_logging

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import Contrast, Engine, Request, Sampling, load_base
from langchain_cope.evaluation.users import Comparison, UserJob
from langchain_cope.evaluation.ways import ways_named
from langchain_cope.history import read_users
from langchain_cope.training.encode import parts_of_reply
from langchain_cope.training.progress import Monitor

ANSWERS = "strength.json"
GRID = [
    *((alpha, 0.1, 1.0) for alpha in (0.0, 0.1, 0.3, 0.5, 0.8)),
    *((alpha, 0.1, 1.5) for alpha in (0.0, 0.3)),
    *((alpha, 0.1, 0.7) for alpha in (0.3, 0.5)),
    *((0.3, tau, 1.0) for tau in (0.03, 0.3)),
]
"""(α, τ, adapter scale)."""


def answer(engine: Engine, job: UserJob) -> None:
    """Answer the job's queries at every setting that has no answers yet."""
    file = job.folder / ANSWERS
    known: dict[str, list[str]] = read_json(file) if file.exists() else {}
    missing = [setting for setting in GRID if json.dumps(setting) not in known]
    if not missing:
        return
    adapter = engine.load_adapter(job.folder / "sft")
    sampling = Sampling(max_tokens=job.recipe.max_new_tokens or 1)
    prompts = [engine.base.prompt_ids(example.item.messages) for example in job.examples]
    requests = (
        Request(
            prompt,
            adapter=adapter,
            adapter_scale=scale,
            contrast=Contrast(alpha, tau),
            sampling=sampling,
            parts=parts_of_reply(engine.base, prompt),
            offline=True,
        )
        for alpha, tau, scale in missing
        for prompt in prompts
    )
    with closing(engine.generate_each(requests)) as answers:
        for setting in missing:
            known[json.dumps(setting)] = [next(answers).text for _ in prompts]
    write_json(file, known)


def make(options: Any) -> list[UserJob]:
    """Train and answer as far as the time allows; return the jobs that are done."""
    started = time.monotonic()
    users = read_users(options.users)
    engine = Engine.of(load_base(options.model))
    task_engine = None
    if options.task_adapter:
        task_engine = Engine.of(load_base(options.model, task_adapter=options.task_adapter))
    comparison = Comparison(
        engine, users, options.jobs, ways_named(["sft"]), task_engine=task_engine
    )
    done = []
    for job in comparison.jobs[: options.limit]:
        if options.seconds and time.monotonic() - started > options.seconds:
            break
        comparison.train(job, Monitor())
        answer(task_engine or engine, job)
        seconds = time.monotonic() - started
        print(f"{job.history.user_id}: done after {seconds:.0f} s", file=sys.stderr, flush=True)
        done.append(job)
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("users", type=Path)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--task-adapter", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    make(options)


if __name__ == "__main__":
    main()
