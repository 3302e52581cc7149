"""Log-probabilities of given completions, as many in one forward as it may hold.

A prompt that several of them have is read once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.forward.inputs import Forward
from langchain_cope.engine.rows import Row, Rows

MAX_TOKENS = 16_384  # of one forward, padding included
MAX_LOGITS = 1 << 26  # float32 entries of one forward: 256 MB

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt, completion) pairs of token ids, none of them empty."""


def groups(sequences: Sequences, vocabulary_size: int, max_rows: int) -> Iterator[list[int]]:
    """Yield indices of sequences that are scored together.

    Those that share their prompt follow each other, the longest first; then come all others.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(tuple(prompt), []).append(index)
    shared = [of_prompt for of_prompt in by_prompt.values() if len(of_prompt) > 1]
    single = [of_prompt for of_prompt in by_prompt.values() if len(of_prompt) == 1]
    for units in (shared, single):
        units.sort(key=lambda unit: max(_length(sequences[index]) for index in unit), reverse=True)
        group: list[int] = []
        for index in (index for unit in units for index in unit):
            together = [sequences[i] for i in (*group, index)]
            if group and (len(together) > max_rows or not _fit(together, vocabulary_size)):
                yield group
                group = []
            group.append(index)
        if group:
            yield group


def log_probs(
    forward: Forward,
    rows: Rows,
    prompt_rows: Rows,
    sequences: Sequences,
    adapter: Adapter | None,
) -> list[Tensor]:
    """Return the log-probability of each completion token, in nats.

    Prompts that several sequences share are read once, by a forward before that of all sequences.

    Args:
        forward: the model.
        rows: empty; the sequences become its rows.
        prompt_rows: empty; the shared prompts become its rows.
        sequences: one group of `groups`.
        adapter: None: the base alone.

    Returns:
        Per sequence float32 `(len(completion),)` on the CPU.
    """
    prompts = _read_shared_prompts(forward, prompt_rows, sequences, adapter)
    rows.kv.reserve(len(sequences), max(map(_length, sequences)))
    ids: list[list[int]] = []
    logits_at: list[tuple[int, int]] = []
    targets: list[int] = []
    for index, (prompt, completion) in enumerate(sequences):
        row = Row([*prompt, *completion], adapter)
        if shared := prompts.get(tuple(prompt)):
            row.length = shared.length
            rows.add(row, prompt_rows, shared)
        else:
            rows.add(row)
        ids.append(row.tokens[row.length : -1])
        first = len(prompt) - 1 - row.length
        logits_at += [(index, column) for column in range(first, first + len(completion))]
        targets += completion
    logits = rows.forward(forward, ids, logits_at)
    chosen = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    scores = torch.log_softmax(logits.float(), dim=-1).gather(-1, chosen).squeeze(-1).cpu()
    return list(torch.split(scores, [len(completion) for _, completion in sequences]))


def _read_shared_prompts(
    forward: Forward, rows: Rows, sequences: Sequences, adapter: Adapter | None
) -> dict[tuple[int, ...], Row]:
    """Read the prompts that several sequences have, but for their last tokens; return the rows."""
    counts = Counter(tuple(prompt) for prompt, _ in sequences)
    shared = [prompt for prompt, number in counts.items() if number > 1 and len(prompt) > 1]
    if not shared:
        return {}
    rows.kv.reserve(len(shared), max(map(len, shared)))
    prompts = {prompt: Row(list(prompt[:-1]), adapter) for prompt in shared}
    for row in prompts.values():
        rows.add(row)
    rows.forward(forward, [row.tokens for row in prompts.values()], [(0, 0)])
    for row in prompts.values():
        row.length = len(row.tokens)
    return prompts


def _length(sequence: tuple[Sequence[int], Sequence[int]]) -> int:
    prompt, completion = sequence
    return len(prompt) + len(completion)


def _fit(sequences: Sequences, vocabulary_size: int) -> bool:
    """Tell whether `sequences` fit into one forward."""
    longest = max(map(_length, sequences))
    # Columns whose logits some row needs.
    num_columns = longest - min(len(prompt) for prompt, _ in sequences)
    num_logits = len(sequences) * num_columns * vocabulary_size
    return len(sequences) * longest <= MAX_TOKENS and num_logits <= MAX_LOGITS
