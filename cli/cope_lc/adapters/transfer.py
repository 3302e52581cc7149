"""Adapters on their way out and in: a peft folder, a user's tar file, a folder of such files.

The commands `export`, `export-all`, `import` and `import-all` of `cope-lc adapters`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cope_lc.adapters.counting import counted
from cope_lc.adapters.stored import existing_store_at, location_of, store_at
from cope_lc.options import DEFAULT_MODEL, Json, Model, Store, UserId
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.screen import say_skipped
from cope_lc.text import clean, name_of, plural

if TYPE_CHECKING:
    from adapter_store import AdapterStore


def export(
    user: UserId,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="For one version a new or empty folder; for all a new file ending in .tar.",
        ),
    ],
    version: Annotated[
        str | None,
        typer.Option(
            "--version", metavar="VERSION", help="For a folder. Default: the active version."
        ),
    ] = None,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Write a version as a peft folder, or a user as a file.

    peft and vLLM read the folder as it is. The file, a tar, holds all versions with their facts.
    """
    store = store_at(store_url)
    if target.name.endswith((".tar.gz", ".tgz", ".zip")):
        raise typer.BadParameter(
            "archives are not compressed: give a name that ends in .tar, or a folder",
            param_hint="TARGET",
        )
    if target.suffix != ".tar":
        _export_folder(store, user, target, version, Output(as_json))
    elif version is None:
        _export_file(store, user, target, Output(as_json))
    else:
        raise typer.BadParameter(
            "a .tar file holds all versions: leave it out, or name a folder",
            param_hint="--version",
        )


def _export_folder(
    store: "AdapterStore", user: str, target: Path, version: str | None, output: Output
) -> None:
    version_id = store.resolve(user, version).version
    folder = store.export_peft(user, target, version_id)
    facts = {"user_id": user, "version": version_id, "folder": str(folder)}
    output.show(facts, f"{version_id} written to {clean(str(folder))}")


def _export_file(store: "AdapterStore", user: str, target: Path, output: Output) -> None:
    file = store.export_user(user, target)
    versions = [version.version for version in store.versions(user)]
    facts = {"user_id": user, "file": str(file), "versions": versions}
    output.show(facts, f"{name_of(user)} written to {clean(str(file))}; it is not encrypted")


def export_all(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Receives one file for each user.")
    ],
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Write every user as a file of a folder.

    An interrupted export is continued: users with a file in the folder are skipped, changed or not,
    so give each backup a new folder. Exit code 1 if some users cannot be written; all others are.
    """
    store = existing_store_at(store_url)
    num_present = len(list(folder.glob("*.tar")))
    problems: list[str] = []
    with counted("users exported") as count:
        num_written = store.export_users(
            folder, on_user=count, on_problem=lambda error: problems.append(str(error))
        )
    facts = {
        "folder": str(folder),
        "users": num_written,
        "already_there": num_present,
        "problems": problems,
    }

    def show_export() -> None:
        say_skipped(problems)
        users = plural(num_written, "user")
        print(f"{users} written to {clean(str(folder))}; they are not encrypted")
        if num_present:
            verb = "was" if num_present == 1 else "were"
            print(f"{num_present} {verb} there already and left as they are")

    Output(as_json).show(facts, show_export)
    if problems:
        raise typer.Exit(1)


def import_one(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A .tar file of a user, or a peft folder.")
    ],
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="ID", help="For a peft folder: the user it is for."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Bring in a user's file, or a peft folder.

    A peft folder, trained elsewhere on --model, becomes the active version of --user. The versions
    of a file get new ids. A file cannot bring back a user who was erased here.
    """
    store = store_at(store_url)
    if source.is_dir():
        user_id = _import_folder(store, source, user, model)
    elif user is None:
        user_id = store.import_user(source).user_id
    else:
        raise typer.BadParameter(
            "an archive names its user itself: leave it out", param_hint="--user"
        )
    versions, active = [v.version for v in store.versions(user_id)], store.active(user_id)
    facts = {"user_id": user_id, "active": active, "versions": versions}
    count = plural(len(versions), "version")
    Output(as_json).show(facts, f"{name_of(user_id)} has {count}; active is {active or 'none'}")


def _import_folder(store: "AdapterStore", folder: Path, user: str | None, model: str) -> str:
    """Publish a peft folder for a user, bound to the base at hand; return the user's id."""
    if user is None:
        raise typer.BadParameter(
            "a peft folder does not name its user: add --user ID", param_hint="--user"
        )
    # They import torch, for which a refusal need not wait.
    from langchain_cope.engine import Engine, load_base
    from langchain_cope.errors import InputError, ModelError

    store.prepare(user)
    with prints_to_stderr():
        print(f"reading the base {model}, which the adapter is bound to")
        base = load_base(model, device="cpu")
        try:
            Engine.of(base).load_adapter(folder)
        except ModelError as error:
            raise InputError(f"{error}; nothing was imported") from error
    return store.import_peft(user, folder, base=base.fingerprint()).user_id


def import_all(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As export-all wrote it.")],
    store_url: Store = None,
    as_json: Json = False,
) -> None:
    """Bring in every user of such a folder.

    This moves a store elsewhere, or into an encrypted one. Versions get new ids, and the history
    begins anew. Safe to repeat. Users who were erased here are refused; all others are brought in,
    and the exit code is 1.
    """
    if not folder.is_dir():
        raise typer.BadParameter(
            f"{folder} is not a folder: name one that export-all wrote", param_hint="FOLDER"
        )
    if not any(folder.glob("*.tar")):
        raise typer.BadParameter(
            f"{folder} holds no .tar file: name one that export-all wrote", param_hint="FOLDER"
        )
    store = store_at(store_url)
    problems: list[str] = []
    with counted("users imported") as count:
        num_imported = store.import_users(
            folder, on_user=count, on_problem=lambda error: problems.append(str(error))
        )
    facts = {"store": store.url, "users": num_imported, "problems": problems}

    def show_import() -> None:
        say_skipped(problems)
        kind = "encrypted" if store.is_encrypted() else "not encrypted"
        users = plural(num_imported, "user")
        print(f"{users} imported into {clean(location_of(store))}, which is {kind}")

    Output(as_json).show(facts, show_import)
    if problems:
        raise typer.Exit(1)
