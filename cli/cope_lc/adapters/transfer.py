"""``cope-lc adapters export`` and ``import``: a version as a peft folder, a user as a file, all users as a folder of files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.options import Json, Model, Store, User

if TYPE_CHECKING:
    from adapter_store import AdapterStore

EXPORT_EXAMPLE = "Example: cope-lc adapters export alice ./alice-adapter"
EXPORT_ALL_EXAMPLE = "Example: cope-lc adapters export-all ./users"
IMPORT_EXAMPLE = "Example: cope-lc adapters import alice.tar"
IMPORT_ALL_EXAMPLE = "Example: cope-lc adapters import-all ./users --store s3://bucket/adapters"


def export(
    user: User,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="New or empty folder; or a new file ending in .tar: all versions.",
        ),
    ],
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="VERSION", help="Of a folder. Default: the active one."),
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Write a version as a peft folder, or a user as a file.

    peft and vLLM read the folder as it is; the file, a tar, holds all versions with their facts.
    """
    from cope_lc.text import clean, name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    if target.name.endswith((".tar.gz", ".tgz", ".zip")):
        raise typer.BadParameter(
            "archives are plain: give a name that ends in .tar, or a folder", param_hint="TARGET"
        )
    if target.suffix == ".tar":
        if version is not None:
            raise typer.BadParameter(
                "a .tar file holds all versions: leave it out, or name a folder",
                param_hint="--version",
            )
        file = opened.export_user(user, target)
        if as_json:
            print_json(
                {
                    "user_id": user,
                    "file": str(file),
                    "versions": [v.version for v in opened.versions(user)],
                }
            )
        else:
            print(f"{name_of(user)} written to {clean(str(file))}; it is not encrypted")
        return
    found = opened.resolve(user, version)
    folder = opened.export_peft(user, target, found.version)
    if as_json:
        print_json({"user_id": user, "version": found.version, "folder": str(folder)})
    else:
        print(f"{found.version} written to {clean(str(folder))}")


def export_all(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A file a user is written there.")
    ],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Write every user as a file of a folder.

    A user whose file is there already is passed over, changed or not, so that an interrupted export goes on: for a
    backup name a new folder. Exit code 1 where some users cannot be written; all others are.
    """
    from cope_lc.adapters.stored import open_existing
    from cope_lc.progress import counted
    from cope_lc.screen import say_passed_over
    from cope_lc.text import clean, print_json

    opened = open_existing(store)
    there = len(list(folder.glob("*.tar")))
    problems: list[str] = []
    with counted("users exported") as count:
        number = opened.export_users(
            folder, on_user=count, on_problem=lambda error: problems.append(str(error))
        )
    if as_json:
        print_json(
            {"folder": str(folder), "users": number, "already_there": there, "problems": problems}
        )
    else:
        say_passed_over(problems)
        print(
            f"{number} user{'s' if number != 1 else ''} written to {clean(str(folder))}; they are not encrypted"
        )
        if there:
            print(f"{there} {'were' if there != 1 else 'was'} there already and left as they are")
    if problems:
        raise typer.Exit(1)


def import_one(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A .tar file of a user, or a peft folder.")
    ],
    user: Annotated[
        str | None, typer.Option("--user", metavar="ID", help="Of a peft folder: whose it becomes.")
    ] = None,
    model: Model = "starter",
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Bring in a user's file, or a peft folder.

    A folder that was trained elsewhere, on --model, becomes the active version of --user. Versions of a file get new
    ids. A user who was erased here does not come back through a file.
    """
    from cope_lc.text import name_of, print_json
    from langchain_cope.stores import open_store

    opened = open_store(store)
    if not source.is_dir():
        if user is not None:
            raise typer.BadParameter(
                "an archive names its user itself: leave it out", param_hint="--user"
            )
        user = opened.import_user(source).user_id
    else:
        user = _import_folder(opened, source, user, model)
    versions, active = [version.version for version in opened.versions(user)], opened.active(user)
    if as_json:
        print_json({"user_id": user, "active": active, "versions": versions})
    else:
        count = f"{len(versions)} version{'s' if len(versions) != 1 else ''}"
        print(f"{name_of(user)} has {count}; active is {active or 'none'}")


def import_all(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As export-all wrote it.")],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Bring in every user of such a folder.

    So a store moves elsewhere, or becomes an encrypted one. Versions get new ids, and the history begins anew. Safe to
    repeat. A user who was erased here is refused; all others are brought in, and the exit code is 1.
    """
    from cope_lc.adapters.stored import place_of
    from cope_lc.progress import counted
    from cope_lc.screen import say_passed_over
    from cope_lc.text import clean, print_json
    from langchain_cope.stores import open_store

    if not folder.is_dir():
        raise typer.BadParameter(
            f"{folder} is no folder: name one that export-all wrote", param_hint="FOLDER"
        )
    if not any(folder.glob("*.tar")):
        raise typer.BadParameter(
            f"{folder} holds no .tar file: name one that export-all wrote", param_hint="FOLDER"
        )
    opened = open_store(store)
    problems: list[str] = []
    with counted("users imported") as count:
        number = opened.import_users(
            folder, on_user=count, on_problem=lambda error: problems.append(str(error))
        )
    if as_json:
        print_json({"store": opened.url, "users": number, "problems": problems})
    else:
        say_passed_over(problems)
        kind = "encrypted" if opened.is_encrypted() else "not encrypted"
        print(
            f"{number} user{'s' if number != 1 else ''} imported into {clean(place_of(opened))}, which is {kind}"
        )
    if problems:
        raise typer.Exit(1)


def _import_folder(store: "AdapterStore", folder: Path, user: str | None, model: str) -> str:
    if user is None:
        raise typer.BadParameter(
            "a peft folder does not say whose it is: give its user", param_hint="--user"
        )
    from cope_lc.quiet_libraries import prints_to_stderr
    from langchain_cope.engine import load_base

    store.prepare(user)
    with prints_to_stderr():
        print(f"reading the base {model}, which the adapter is bound to")
        base = load_base(model, device="cpu").fingerprint()
    return store.import_peft(user, folder, base=base).user_id
