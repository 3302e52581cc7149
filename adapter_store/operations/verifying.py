"""Verification: every entry and file of a user read and checked; what is wrong is reported."""

from dataclasses import dataclass, field

from adapter_store.errors import UNREADABLE, IntegrityError, InvalidAdapterError, KeyMismatchError
from adapter_store.facts import UserHead
from adapter_store.open_store import OpenStore


@dataclass(frozen=True)
class UserReport:
    """What was checked of one user, what is wrong, and `orphans`: folders that no entry names.

    `user_id` is "" of an erased user and where the head cannot be read. Orphans are not damage:
    they are publishes that are running, or garbage for `gc`.
    """

    user_key: str
    user_id: str
    num_entries: int
    num_versions: int
    num_bytes: int
    problems: tuple[str, ...]
    orphans: tuple[str, ...]


@dataclass
class Verified:
    """What was checked of a store.

    `damaged` are the reports of users with problems, `orphans` counts unlisted versions.
    """

    users: int = 0
    entries: int = 0
    versions: int = 0
    bytes: int = 0
    orphans: int = 0
    damaged: list[UserReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that is listed is what was published."""
        return not self.damaged

    def add(self, report: UserReport) -> None:
        """Count one more user."""
        self.users += 1
        self.entries += report.num_entries
        self.versions += report.num_versions
        self.bytes += report.num_bytes
        self.orphans += len(report.orphans)
        if report.problems:
            self.damaged.append(report)


def verify_user(store: OpenStore, user_key: str) -> UserReport:
    """Check one user. Damage is reported, not raised; BackendError comes through."""
    problems: list[str] = []
    head = None
    try:
        head = store.log.head(user_key)
    except UNREADABLE as error:
        problems.append(str(error))
    is_unreadable = bool(problems)
    seqs = store.log.seqs(user_key)
    versions = head.kept if head else ()
    if head is not None:
        problems += _entry_problems(store, head, seqs)
        problems += _file_problems(store, head)
    orphans = set(store.version_folders(user_key)) - {version.version for version in versions}
    return UserReport(
        user_key=user_key,
        user_id=head.user_id if head else "",
        num_entries=len(seqs),
        num_versions=len(versions),
        num_bytes=sum(file.size for version in versions for file in version.files.values()),
        problems=tuple(problems),
        orphans=() if is_unreadable else tuple(sorted(orphans)),  # what is listed is unknown then
    )


def _entry_problems(store: OpenStore, head: UserHead, seqs: list[int]) -> list[str]:
    problems = []
    for seq in seqs:
        if seq < head.erased_seq:
            problems.append(
                f"entry {seq} of user key {head.user_key} is left of an erasure: "
                "erase again, or run gc"
            )
            continue
        try:
            store.log.entry(head.user_key, seq)
        except FileNotFoundError:
            continue  # trimmed or erased meanwhile
        except UNREADABLE as error:
            problems.append(str(error))
    live = [seq for seq in seqs if head.erased_seq <= seq <= head.seq]
    if live and live != list(range(live[0], live[0] + len(live))):
        problems.append(
            f"entries are missing in the log of user key {head.user_key}: "
            "restore them from a backup"
        )
    return problems


def _file_problems(store: OpenStore, head: UserHead) -> list[str]:
    problems = []
    for version in head.kept:
        try:
            store.blobs.check(version)
        except FileNotFoundError:
            current = store.log.head(head.user_key)
            if current is not None and current.keeps(version.version):
                problems.append(
                    f"a file, or the key, of version {version.version} is missing: "
                    "restore it from a backup"
                )
        except (IntegrityError, KeyMismatchError, InvalidAdapterError) as error:
            problems.append(str(error))
    return problems
