"""What adapters and contrast do to prompts unlike the users' histories, and to the users' own.

    python benchmarks/no_harm.py results.json --users users.jsonl --job-dir FOLDER [--model smollm2]
        [--task-adapter FOLDER] [--texts texts.jsonl.gz] [--limit 4] [--prompts 300]
    python benchmarks/no_harm.py results.json --report headlines.json subjects.json …
    python benchmarks/no_harm.py results.json --users … --job-dir … --steps 20 [--at-once 16]

`--users` has one user a line, as `cope-lc evaluate` reads them, and `--job-dir` is the folder of
such an evaluation: its adapters are taken, those missing are trained. `--texts` are general texts,
the field `body` of each line.

The pool is `everyday.jsonl`: prompts written for this, each with a check that needs no judge
(`right` below): facts, arithmetic, lists and steps of so many parts, lines of code, letters,
lengths and formats asked for, small talk. None of them is among the prompts that the profile of a
history is made with. Those count that the base answers right: the base that the adapters stand on.

| way | what answers |
|---|---|
| `base` | the base |
| `sft`, `dpo` | the user's adapter |
| `fixed 0.1`, `0.3`, `0.5` | the last of `--stages`, contrasted with the base by the paper's rule |
| `adaptive` | the same at 0.5 by the adaptive rule, the adapter always at full scale |
| `built` | `contrast="adaptive"` as a chat has it: the adapter's scale goes by the question, too |

An answer ended early if it ended by itself with less than half of the tokens of the base's. On the
users' own queries ROUGE-L and the voice (style) are reported; `full` is the share of queries at
which `built` left the adapter at its full scale. `nll` is of general texts, nats a token.

What was answered is kept in the users' folders, which hold what users wrote, and is not done again.
The last line is one JSON object; figures with intervals are over users.
"""

import argparse
import functools
import gzip
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import (
    ADAPTER_ALONE,
    Adapter,
    Contrast,
    Engine,
    PromptProfile,
    Request,
    Sampling,
    load_base,
    questions_of,
)
from langchain_cope.evaluation.over_users import mean_over_users, ratio
from langchain_cope.evaluation.rouge import mean_rouge
from langchain_cope.evaluation.user_job import UserJob
from langchain_cope.evaluation.users import Comparison
from langchain_cope.evaluation.voice import Silent, View, voice_scale
from langchain_cope.evaluation.ways import ways_named
from langchain_cope.history import read_users
from langchain_cope.history.items import Item
from langchain_cope.training.progress import Monitor

POOL = Path(__file__).parent / "everyday.jsonl"
KEPT, BASE_KEPT = "no_harm.json", "everyday.json"
MAX_TOKENS = 96  # of an answer to a prompt of the pool
EARLY = 0.5  # of the base's tokens
STRONG = 0.5  # α at which the most is gained on own prompts, and the most harm done on others
ALONE = ("sft", "dpo")
CONTRASTS = {
    **dict.fromkeys(ALONE, ADAPTER_ALONE),
    "fixed 0.1": Contrast(0.1),
    "fixed 0.3": Contrast(0.3),
    "fixed 0.5": Contrast(STRONG),
    "adaptive": Contrast(STRONG, rule="adaptive"),
    "built": Contrast(STRONG, rule="adaptive"),
}
NUM_TEXTS, TEXT_WORDS = 60, 60  # general texts, and words that each has at least
TEXT_TOKENS, TEXT_START = 160, 16  # of a text that count; what it begins with is given
ITEM = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+\S")

Answer = dict[str, Any]
"""`text`, `tokens`, and whether it `ended` by itself."""


def ways_of(stages: Sequence[str]) -> list[str]:
    """Return the ways of users who have the adapters of these stages."""
    return ["base", *(way for way in CONTRASTS if way not in ALONE or way in stages)]


def ways_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the ways that every user has."""
    return [way for way in ("base", *CONTRASTS) if all(way in row["ways"] for row in rows)]


def right(check: Mapping[str, Any], text: str) -> bool:
    """Return whether `text` passes: `any`, `all`: words; `match`: patterns; the rest counts."""
    low, num_words = text.lower(), len(text.split())
    num_items = len(ITEM.findall(text)) or (text.count(",") + 1 if text.strip() else 0)
    num_sentences = len(re.findall(r"[.!?](?=\s|$)", text.strip()))
    words, sentences = (
        check.get("words", [0, num_words]),
        check.get("sentences", [0, num_sentences]),
    )
    names = [rf"(?<!\w){re.escape(word.lower())}(?!\w)" for word in check.get("any", ())]
    return (
        (not names or any(re.search(name, low) for name in names))
        and all(part.lower() in low for part in check.get("all", ()))
        and all(re.search(pattern, low) for pattern in check.get("match", ()))
        and words[0] <= num_words <= words[1]
        and num_items >= check.get("items", 0)
        and sentences[0] <= num_sentences <= sentences[1]
    )


def asked(items: Sequence[Item]) -> list[str]:
    """Return the last question of each item, by which personalizing makes a profile."""
    return [questions_of(item.messages)[-1] for item in items]


@functools.cache
def profile_of(engine: Engine, job: UserJob) -> PromptProfile | None:
    """Return the profile of the user's prompts, as personalizing keeps it with a version."""
    return PromptProfile.of(engine.base.everyday, asked(job.history.items))


def request(
    engine: Engine, job: UserJob, way: str, turns: list[Any], sampling: Sampling, adapters: Any
) -> Request:
    prompt = engine.base.prompt_ids(turns)
    if way == "base":
        return Request(prompt, sampling=sampling, offline=True)
    scale = 1.0
    if way == "built" and (profile := profile_of(engine, job)) is not None:
        scale = profile.relevance(engine.base.everyday, questions_of(turns))
    return Request(
        prompt,
        adapter=adapters.get(way, list(adapters.values())[-1]),
        adapter_scale=scale,
        contrast=CONTRASTS[way],
        sampling=sampling,
        offline=True,
    )


def answers_to(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    return [
        {"text": each.text, "tokens": len(each.token_ids), "ended": each.finish_reason == "stop"}
        for each in engine.generate_each(requests)
    ]


def answered(
    engine: Engine,
    job: UserJob,
    pool: Sequence[Any],
    stages: Sequence[str],
    of_base: Mapping[str, Answer],
    kept: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Answer what `kept` lacks: way by way, the pool's prompts and the user's own queries.

    Where the base is wrong already there is nothing to harm, and at scale 0 it answers itself.
    """
    adapters = {name: engine.load_adapter(job.folder / name) for name in stages}
    own = [example.item.messages for example in job.examples]
    asked = [
        each["prompt"] for each in pool if right(each["check"], of_base[each["prompt"]]["text"])
    ]
    short = Sampling(max_tokens=MAX_TOKENS)
    long = Sampling(max_tokens=job.recipe.max_new_tokens or MAX_TOKENS)
    kept.setdefault("base", {"own": []})["pool"] = dict(of_base)
    for way in ways_of(stages):
        of_way = kept.setdefault(way, {"pool": {}, "own": []})
        prompts = [prompt for prompt in asked if prompt not in of_way["pool"]]
        requests = [
            request(engine, job, way, [{"role": "user", "content": prompt}], short, adapters)
            for prompt in prompts
        ]
        if not of_way["own"]:
            requests += [request(engine, job, way, turns, long, adapters) for turns in own]
        ready = [of_base[prompt] for prompt in prompts] + kept["base"]["own"]
        new = [each.personal or way == "base" for each in requests]
        found = iter(answers_to(engine, [r for r, n in zip(requests, new, strict=True) if n]))
        answers = [next(found) if is_new else ready[n] for n, is_new in enumerate(new)]
        of_way["pool"] |= dict(zip(prompts, answers[: len(prompts)], strict=True))
        of_way["own"] = of_way["own"] or answers[len(prompts) :]
        save()


def base_answers(engine: Engine, pool: Sequence[Any], file: Path) -> dict[str, Answer]:
    """Return the base's answers to the pool, the same for every user; kept in `file`."""
    facts = read_json(file) if file.exists() else {}
    base = engine.base.fingerprint()
    known: dict[str, Answer] = facts["answers"] if facts.get("base") == base else {}
    missing = [each["prompt"] for each in pool if each["prompt"] not in known]
    sampling = Sampling(max_tokens=MAX_TOKENS)
    requests = [
        Request(
            engine.base.prompt_ids([{"role": "user", "content": prompt}]),
            sampling=sampling,
            offline=True,
        )
        for prompt in missing
    ]
    known |= dict(zip(missing, answers_to(engine, requests), strict=True))
    write_json(file, {"base": base, "answers": known})
    return {each["prompt"]: known[each["prompt"]] for each in pool}


def general_nll(
    engine: Engine, texts: Sequence[str], job: UserJob, stages: Sequence[str]
) -> dict[str, float]:
    """Return the nats a token of general texts, after their first tokens, by way."""
    ids = [engine.base.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pairs = [(each[:TEXT_START], each[TEXT_START:TEXT_TOKENS]) for each in ids]

    def nll(adapter: Adapter | None) -> float:
        scores = engine.score(pairs, adapter)
        return -sum(float(each.sum()) for each in scores) / sum(map(len, scores))

    found = {"base": nll(None)}
    for name in stages:
        found[name] = nll(engine.load_adapter(job.folder / name))
    profile = profile_of(engine, job)
    if profile is not None:
        relevant = [profile.relevance(engine.base.everyday, [text]) for text in texts]
        found["relevance"] = statistics.fmean(relevant)
    return found


def general_texts(file: Path | None) -> list[str]:
    if file is None:
        return []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        bodies = (str(json.loads(line)["body"]) for line in lines)
        return [body for body in bodies if len(body.split()) > TEXT_WORDS][:NUM_TEXTS]


def figures(
    engine: Engine, everyone: Sequence[UserJob], pool: Sequence[Any], kept: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the figures of the first users, of whom answers are kept; the voice needs all."""
    histories = {str(j.history.user_id): [i.completion for i in j.history.items] for j in everyone}
    own = {str(job.history.user_id): [e.item.completion for e in job.examples] for job in everyone}
    scale = voice_scale(histories, own, View.STYLE)
    rows = []
    for job, answers in zip(everyone, kept, strict=False):
        base = answers["base"]["pool"]
        asked = [each for each in pool if right(each["check"], base[each["prompt"]]["text"])]
        user, ways = str(job.history.user_id), {}
        for way, given in answers.items():
            if way not in ("base", *CONTRASTS):  # what else is kept
                continue
            of_pool = [(each, given["pool"][each["prompt"]]) for each in asked]
            texts = [answer["text"] for answer in given["own"]]
            ways[way] = {
                "kept": statistics.fmean(right(e["check"], a["text"]) for e, a in of_pool),
                "early": statistics.fmean(
                    a["ended"] and a["tokens"] < EARLY * base[e["prompt"]]["tokens"]
                    for e, a in of_pool
                ),
                "rougeL": mean_rouge(own[user], texts)["rougeL"],
            }
            if not isinstance(scale, Silent):
                score = scale.score({user: texts})
                if not isinstance(score, Silent):
                    ways[way]["style"] = score.of_user[user]
        profile = profile_of(engine, job)
        everyday, queries = engine.base.everyday, [e.item.messages for e in job.examples]
        relevant = [
            profile.relevance(everyday, questions_of(q)) if profile else 1.0 for q in queries
        ]
        unlike = [profile.relevance(everyday, [e["prompt"]]) if profile else 1.0 for e in asked]
        rows.append(
            {
                "user": user,
                "num_right": len(asked),
                "ways": ways,
                "nll": answers.get("nll", {}),
                "full": statistics.fmean(each == 1 for each in relevant),
                "relevance_own": statistics.fmean(relevant),
                "relevance_pool": statistics.fmean(unlike),
            }
        )
    return rows


def summary(files: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the means over the users of all files together, and ratios, with intervals."""
    every = [row for rows in files.values() for row in rows]
    found: dict[str, Any] = {"users": len(every), "ways": ways_in(every)}
    for way in found["ways"]:
        for name in ("kept", "early", "rougeL", "style"):
            values = [
                {row["user"]: row["ways"][way][name] for row in rows if name in row["ways"][way]}
                for rows in files.values()
            ]
            if all(values):
                found.setdefault(way, {})[name] = asdict(mean_over_users(values))
    for name in set(ALONE) & set(found["ways"]):
        above, below = (
            [{r["user"]: r["nll"][each] for r in rows if r["nll"]} for rows in files.values()]
            for each in (name, "base")
        )
        if all(above) and (change := ratio(above, below)) is not None:
            found[name]["nll_ratio"] = asdict(change)
    for name in ("full", "relevance_own", "relevance_pool"):
        values = [{row["user"]: row[name] for row in rows} for rows in files.values()]
        found[name] = asdict(mean_over_users(values))
    return found


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| way | still right | ended early | ROUGE-L | style | NLL, general |",
        "|---" * 6 + "|",
    ]
    for way in found["ways"]:
        cells = [
            written(found[way].get(name))
            for name in ("kept", "early", "rougeL", "style", "nll_ratio")
        ]
        lines.append(f"| `{way}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    ends = estimate["interval"]
    return f"{estimate['value']:.3f}" + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


def step_pairs(
    engine: Engine, job: UserJob, stage: str, num_pairs: int, at_once: int
) -> Iterator[tuple[float, float]]:
    """Yield seconds of `at_once` answers by the fixed rule and by the adaptive one, in turns."""
    type(engine.base).eos_ids = frozenset()  # type: ignore[method-assign, assignment]  # no answer stops early
    adapter = engine.load_adapter(job.folder / stage)
    examples = islice(cycle(job.examples), at_once)
    prompts = [engine.base.prompt_ids(each.item.messages) for each in examples]
    rules, sampling = (Contrast(STRONG), Contrast(STRONG, rule="adaptive")), Sampling(max_tokens=64)
    for pair in range(num_pairs + 1):
        seconds = []
        for rule in rules if pair % 2 else rules[::-1]:
            started = time.perf_counter()
            engine.generate([Request(prompt, adapter, rule, sampling) for prompt in prompts])
            seconds.append(time.perf_counter() - started)
        if pair:  # the first one warms up
            fixed, adaptive = seconds if pair % 2 else seconds[::-1]
            yield fixed, adaptive


def main() -> None:
    options = _options()
    if options.report:
        found = summary({file.stem: read_json(file)["rows"] for file in options.report})
    else:
        task = options.task_adapter
        engine = Engine.of(load_base(options.model, task_adapter=task))
        users = read_users(options.users)
        ways = ways_named(["base", *options.stages])
        comparison = Comparison(engine, users, options.job_dir, ways)
        jobs = comparison.jobs[: options.limit]
        if options.steps:
            stage, at_once = options.stages[-1], options.at_once
            pairs = list(step_pairs(engine, jobs[0], stage, options.steps, at_once))
            ratios = {str(n): adaptive / fixed for n, (fixed, adaptive) in enumerate(pairs)}
            found = {"step": asdict(mean_over_users([ratios]))}
            print(json.dumps(found))
            return
        pool = [json.loads(line) for line in POOL.read_text(encoding="utf-8").splitlines()]
        pool, texts = pool[:: max(1, len(pool) // options.prompts)], general_texts(options.texts)
        of_base = base_answers(engine, pool, options.job_dir / BASE_KEPT)
        kept = []
        for job in jobs:
            comparison.train(job, Monitor())
            kept.append(work(engine, job, pool, texts, options.stages, of_base))
        rows = figures(engine, comparison.jobs, pool, kept)
        found = summary({"": rows})
        write_json(options.results, {"rows": rows, "summary": found})
    print(table(found))
    print(json.dumps(found))


def work(
    engine: Engine,
    job: UserJob,
    pool: Sequence[Any],
    texts: Sequence[str],
    stages: Sequence[str],
    of_base: Mapping[str, Answer],
) -> dict[str, Any]:
    """Return what is kept of one user, all of it there."""
    file = job.folder / KEPT
    kept: dict[str, Any] = read_json(file) if file.exists() else {}
    if kept.get("digest") != job.asked:
        kept = {"digest": job.asked}
    answered(engine, job, pool, stages, of_base, kept, lambda: write_json(file, kept))
    if texts and not kept.get("nll"):
        kept["nll"] = general_nll(engine, texts, job, stages)
        write_json(file, kept)
    print(f"{job.history.user_id}: done", flush=True)
    return kept


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--users", type=Path)
    parser.add_argument("--job-dir", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task-adapter", type=Path)
    parser.add_argument("--texts", type=Path, help="general texts, .jsonl.gz with the field body")
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), default=ALONE, help="sft, or sft,dpo"
    )
    parser.add_argument("--limit", type=int, default=4, help="users, the first of the file")
    parser.add_argument("--prompts", type=int, default=10_000, help="of the pool, about, spread")
    parser.add_argument("--report", type=Path, nargs="+", help="results of several files, together")
    parser.add_argument("--steps", type=int, default=0, help="pairs of timed answers, nothing else")
    parser.add_argument("--at-once", type=int, default=1, help="timed answers, decoded together")
    options = parser.parse_args()
    if not options.report and (options.users is None or options.job_dir is None):
        parser.error("--users and --job-dir are needed, or --report with results")
    return options


if __name__ == "__main__":
    main()
