"""Small helpers for sentences that people read."""


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 item", "2 items"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing, its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
