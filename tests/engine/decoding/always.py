"""Speculation that always drafts: whether it pays is timed, and a test may not depend on that."""

from langchain_cope.engine.decoding.speculation import MAX_DRAFT, Speculation


class AlwaysDrafts(Speculation):
    """Drafts as many tokens as there are."""

    def length(self, hit_rates: object, available: object, num_rows: int) -> int:
        return MAX_DRAFT
