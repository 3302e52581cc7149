"""What goes into a personalization, and what comes out of it."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class PersonalizeRequest(BaseModel):
    """The user to personalize, and what to learn from."""

    model_config = ConfigDict(extra="forbid")

    user_id: str | None = None
    """None: the `user_id` in the config's `configurable`; where both name one, they must agree."""
    history: list[Any] | None = None
    """Items, or rows of the forms in `langchain_cope.history.formats`, oldest first.

    None: fetched from `PersonalizeUser.history`.
    """
    instruction: str | None = None
    """Stands in where an item has no prompt (plain text, a conversation's first turn).

    It is kept in the version's metadata.
    """


class Sample(BaseModel):
    """One held-out item: what was asked, what the user wrote, and what each way of answering wrote.

    Each of `langchain_cope.evaluation.ways.WAYS` has a field of its name; one that is not declared
    here is an extra field.
    """

    model_config = ConfigDict(extra="allow")

    prompt: list[dict[str, str]]
    reference: str
    """What the user wrote."""
    base: str
    """What the base wrote, without an adapter."""
    sft: str
    """What the adapter wrote after SFT."""
    dpo: str
    """What the adapter wrote after DPO, without the contrast."""
    cope: str
    """What the adapter wrote after DPO with the contrast: the personalized answer."""


class Verdict(BaseModel):
    """What the gate found, in numbers and in words."""

    published: bool
    """Whether this is good enough to be published, or was published all the same."""
    sentence: str
    """The evidence in one sentence of plain numbers."""
    probability: float
    """That the adapter makes new texts of the user likelier than the reference does, 0 to 1."""
    num_texts: int
    """Held-out texts that it was judged by; those of one conversation count as one."""
    num_better: int
    """Those that are likelier with the adapter."""
    mean_gain: float
    """Nats a token by which they are likelier on average, each text counting the same."""
    reference: str
    """What it was compared with: of all references the one that is hardest to beat."""
    adapter: str
    """The stage that trained it, `sft` or `dpo`: the better one of the two."""
    reason: str
    """The sentence, with what decided beside it."""
    p_value: float = 1.0
    """The chance of gains like these where the adapter helps nobody; 1 where nothing can be told.

    What was believed beforehand is not in it, so that a fleet can add up chances over its users.
    """
    mean_in_sds: float = 0.0
    """Of the gains that `p_value` is of: their mean in units of their standard deviation."""
    skewness: float = 0.0
    """Of these gains: below 0 where a few texts lose much."""
    advice: str | None = None
    """What would help, where it was refused."""


class Recommendation(BaseModel):
    """How strongly an adapter is to act where an app says nothing; a version's metadata keeps it.

    `langchain_cope.strength.Strength` says what the numbers mean.
    """

    alpha: float
    tau: float
    adapter_scale: float
    why: str
    """For people."""
    num_texts: int
    """Held-out texts that it was chosen by, which judge nothing; 0: it is the usual one."""


class PersonalizeResult(BaseModel):
    """What became of a personalization."""

    user_id: str
    published: bool
    version: str | None
    """The version published; None where the gate refused."""
    reason: str
    """Why it was published or refused, with the numbers."""
    verdict: Verdict | None = None
    """The same as numbers; None where an interrupted run had published it before."""
    recommended: Recommendation | None = None
    """How strongly the adapter is to act; `ChatCoPe` follows it where nothing else is said."""
    metrics: dict[str, dict[str, float]]
    """By the name of each way, base, sft, dpo and cope, its figures on the held-out items.

    They are `rouge1` and `rougeL` (f-measures, 0 to 1) and, except for cope, `nll` (nats per
    completion token).
    """
    timings: dict[str, float]
    """Seconds of each stage, by its name."""
    num_trained: int
    num_held_out: int
    notes: list[str] = []
    """In words for people: what was cut, dropped, skipped or taken for granted."""
    samples: list[Sample] = []
    """The held-out items with every way's answer; none where `PersonalizeUser.samples` is False."""
    recipe: dict[str, Any] = {}
    """The recipe as used, as plain data."""

    def __str__(self) -> str:
        """Return what a model that used this as a tool is told."""
        if self.published:
            return f"published version {self.version} for {self.user_id!r}: {self.reason}"
        return f"nothing was published for {self.user_id!r}: {self.reason}"


# The public address of these classes, by which checkpoints and pickles name them.
for _class in (PersonalizeRequest, Sample, Verdict, Recommendation, PersonalizeResult):
    _class.__module__ = "langchain_cope.personalize"
