"""Log-probabilities of given completions, as many in one forward as it may hold."""

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
    """Yield indices of sequences of like length, the longest first, one group a forward."""
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    group: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: lengths[i], reverse=True):
        together = [sequences[i] for i in (*group, index)]
        if group and (len(together) > max_rows or not _fit(together, vocabulary_size)):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def log_probs(
    forward: Forward, rows: Rows, sequences: Sequences, adapter: Adapter | None
) -> list[Tensor]:
    """Return the log-probability of each completion token, in nats, from one forward.

    Args:
        forward: the model.
        rows: empty; the sequences become its rows.
        sequences: one group of `groups`.
        adapter: None: the base alone.

    Returns:
        Per sequence float32 `(len(completion),)` on the CPU.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    rows.kv.reserve(len(sequences), longest)
    ids: list[list[int]] = []
    logits_at: list[tuple[int, int]] = []
    targets: list[int] = []
    for index, (prompt, completion) in enumerate(sequences):
        tokens = [*prompt, *completion]
        rows.add(Row(tokens, adapter))
        ids.append(tokens[:-1])
        logits_at += [(index, column) for column in range(len(prompt) - 1, len(tokens) - 1)]
        targets += completion
    logits = rows.forward(forward, ids, logits_at)
    chosen = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    scores = torch.log_softmax(logits.float(), dim=-1).gather(-1, chosen).squeeze(-1).cpu()
    return list(torch.split(scores, [len(completion) for _, completion in sequences]))


def _fit(sequences: Sequences, vocabulary_size: int) -> bool:
    """Tell whether `sequences`, the longest first, fit into one forward."""
    prompt, completion = sequences[0]
    longest = len(prompt) + len(completion)
    # Columns whose logits some row needs.
    num_columns = longest - min(len(prompt) for prompt, _ in sequences)
    num_logits = len(sequences) * num_columns * vocabulary_size
    return len(sequences) * longest <= MAX_TOKENS and num_logits <= MAX_LOGITS
