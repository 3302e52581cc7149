"""Candidates: adapters that wait in the store until somebody decides whose versions they become.

A candidate is listed in its user's head, so that its files stay and an erasure takes them; but it
is no version: nobody resolves, fetches, activates or exports it. A user has one at most.
"""

from dataclasses import replace

from adapter_store.facts import UserHead
from adapter_store.operations.publishing import activated, without_oldest


def accepted(head: UserHead, version: str, live_versions: int, reason: str) -> UserHead:
    """Return `head` with its candidate of that id as its newest and active version."""
    candidate = next(one for one in head.candidates if one.version == version)
    changed = replace(
        head,
        operation="accept",
        operation_version=version,
        reason=reason,
        versions=(*head.versions, candidate),
        candidates=(),
    )
    return without_oldest(activated(changed, version), live_versions, (version,))


def withdrawn(head: UserHead, version: str, reason: str = "") -> UserHead | None:
    """Return `head` without its candidate of that id, None where it has no such."""
    if not any(one.version == version for one in head.candidates):
        return None
    return replace(
        head,
        operation="withdraw",
        operation_version=version,
        reason=reason,
        candidates=(),
    )
