"""Log-probabilities of given completions, as many in one forward as it may hold.

What all prompts begin with is read once, and so is, in a group, what those of the group begin with
and a prompt that several completions have.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from langchain_cope.engine.adapter import Adapter
from langchain_cope.engine.decoding.contrast import contrast_likelihood
from langchain_cope.engine.forward.inputs import Forward
from langchain_cope.engine.options import Contrast
from langchain_cope.engine.rows import Row, Rows

MAX_TOKENS = 4096  # of one forward, padding included: whoever chats waits for its end
LEAST_SHARED = 8  # tokens of a beginning that is worth a forward of its own
MAX_LOGITS = 1 << 26  # float32 entries of one forward: 256 MB
CONTRASTED = 128  # distributions that are contrasted at a time: temporaries stay small

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


def common_beginning(sequences: Sequences) -> list[int]:
    """Return what different prompts all begin with; nothing where it is below `LEAST_SHARED`.

    Two tokens of each prompt are left at least: the last one, and one that `_shared_prompts` reads.
    """
    prompts = [prompt[:-2] for prompt in {tuple(prompt) for prompt, _ in sequences}]
    if len(prompts) < 2:
        return []
    differs = (len(set(tokens)) > 1 for tokens in zip(*prompts, strict=False))
    length = next((index for index, differ in enumerate(differs) if differ), min(map(len, prompts)))
    return list(prompts[0][:length]) if length >= LEAST_SHARED else []


def log_probs(sequences: Sequences, read: "Beginnings") -> list[Tensor]:
    """Return the log-probability of each completion token, in nats.

    Args:
        sequences: one group of `groups`.
        read: by the model that scores.

    Returns:
        Per sequence float32 `(len(completion),)` on the CPU.
    """
    logits, chosen = _logits(sequences, read)
    scores = torch.log_softmax(logits.float(), dim=-1).gather(-1, chosen).squeeze(-1).cpu()
    return list(torch.split(scores, [len(completion) for _, completion in sequences]))


def contrasted_log_probs(
    sequences: Sequences,
    read_by_user: "Beginnings",
    read_by_base: "Beginnings",
    contrasts: Sequence[Contrast],
) -> list[Tensor]:
    """Return the log-probability of each completion token under each contrast, in nats.

    Args are those of `log_probs`; `contrast_likelihood` says what becomes of the plausible head.

    Returns:
        Per sequence float32 `(len(contrasts), len(completion))` on the CPU.
    """
    user, chosen = _logits(sequences, read_by_user)
    base, _ = _logits(sequences, read_by_base)
    scores = []
    parts = (torch.split(tensor, CONTRASTED) for tensor in (user, base, chosen))
    for user_part, base_part, tokens in zip(*parts, strict=True):
        log_user = torch.log_softmax(user_part.float(), dim=-1)
        log_base = torch.log_softmax(base_part.float(), dim=-1)
        rows = [
            contrast_likelihood(log_user, log_base, contrast.alpha, contrast.tau).gather(-1, tokens)
            for contrast in contrasts
        ]
        scores.append(torch.cat(rows, dim=-1).T.cpu())
    lengths = [len(completion) for _, completion in sequences]
    return list(torch.split(torch.cat(scores, dim=1), lengths, dim=1))


def _logits(sequences: Sequences, read: "Beginnings") -> tuple[Tensor, Tensor]:
    """Return the logits of all completion tokens, `(N, V)`, and the tokens, `(N, 1)`."""
    beginning = common_beginning(sequences)
    if len(beginning) >= read.length + LEAST_SHARED:
        read = read.continued([beginning])
    if prompts := _shared_prompts(sequences):
        read = read.continued(prompts)
    logits_at: list[tuple[int, int]] = []
    targets: list[int] = []
    texts = [[*prompt, *completion] for prompt, completion in sequences]
    rows, ids = read.rows_for(texts, [len(prompt) - 1 for prompt, _ in sequences])
    for index, (prompt, completion) in enumerate(sequences):
        first = len(prompt) - 1 - (len(texts[index]) - len(ids[index]))
        logits_at += [(index, column) for column in range(first, first + len(completion))]
        targets += completion
    logits = rows.forward(read.forward, [new[:-1] for new in ids], logits_at)
    return logits, torch.tensor(targets, device=logits.device).unsqueeze(-1)


class Beginnings:
    """What a model has read, each beginning a row; texts go on from the longest one they have.

    It reads on the engine's thread, and nothing of it changes once it is made.
    """

    def __init__(
        self, forward: Forward, new_rows: Callable[[], Rows], adapter: Adapter | None
    ) -> None:
        """Start with nothing read.

        Args:
            forward: the model.
            new_rows: makes rows with a cache of their own.
            adapter: None: the base alone.
        """
        self.forward = forward
        self._new_rows, self._adapter = new_rows, adapter
        self._rows: Rows | None = None

    def rows_for(
        self, texts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> tuple[Rows, list[list[int]]]:
        """Return new rows of the texts, and what of each is still to be read.

        A text goes on from a beginning of at most as many tokens as its limit.
        """
        rows = self._new_rows()
        rows.kv.reserve(len(texts), max(map(len, texts)))
        known = {} if self._rows is None else {tuple(r.tokens): r for r in self._rows.all()}
        lengths = sorted({len(beginning) for beginning in known}, reverse=True)
        ids = []
        for text, limit in zip(texts, limits, strict=True):
            row = Row(list(text), self._adapter)
            begun = (known.get(tuple(text[:length])) for length in lengths if length <= limit)
            if source := next((row for row in begun if row), None):
                row.length = source.length
                rows.add(row, self._rows, source)
            else:
                rows.add(row)
            ids.append(row.tokens[row.length :])
        return rows, ids

    @property
    def length(self) -> int:
        """Tokens of the longest beginning."""
        return 0 if self._rows is None else max(row.length for row in self._rows.all())

    def continued(self, beginnings: Sequence[Sequence[int]]) -> "Beginnings":
        """Read `beginnings`, which all go on from the same one, and return these alone."""
        after = Beginnings(self.forward, self._new_rows, self._adapter)
        # One token at least is left to be read.
        limits = [len(beginning) - 1 for beginning in beginnings]
        after._rows, ids = self.rows_for(beginnings, limits)
        after._rows.forward(self.forward, ids, [(0, 0)])
        for row in after._rows.all():
            row.length = len(row.tokens)
        return after


def _shared_prompts(sequences: Sequences) -> list[Sequence[int]]:
    """Return the prompts that several sequences have, but for their last tokens."""
    counts = Counter(tuple(prompt) for prompt, _ in sequences)
    return [prompt[:-1] for prompt, number in counts.items() if number > 1 and len(prompt) > 1]


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
