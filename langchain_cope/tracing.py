"""What traces show of a user."""

import hashlib
from typing import Literal

TraceUserId = Literal["plain", "hashed", "omitted"]
"""``plain``: the id as it is; ``hashed``: the same short code for the same id; ``omitted``: nothing."""


def traced_user(user_id: str | None, how: TraceUserId) -> str | None:
    """``user_id`` as traces show it; None where there is none, or nothing is to be shown."""
    if user_id is None or how == "omitted":
        return None
    if how == "plain":
        return user_id
    return f"sha256:{hashlib.sha256(user_id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
