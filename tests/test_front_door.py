"""The first import: what is there, and what it costs."""

import subprocess
import sys
from importlib import import_module

import pytest

import langchain_cope


def modules_after(statement: str) -> set[str]:
    printed = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(printed.stdout.split())


def test_everything_listed_is_there_and_named_in_dir() -> None:
    assert {"ChatCoPe", "PersonalizeUser", "Recipe"} <= set(langchain_cope.__all__)
    for name in langchain_cope.__all__:
        assert getattr(langchain_cope, name).__name__ == name
        assert name in dir(langchain_cope)


@pytest.mark.parametrize("package", ["", ".engine", ".history"])
def test_a_front_door_lists_just_what_it_offers(package: str) -> None:
    door = import_module(f"langchain_cope{package}")
    assert set(door.__all__) == set(door._MODULES)
    for name in door.__all__:
        assert getattr(door, name) is not None
        assert name in dir(door)


def test_a_wrong_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="it offers ChatCoPe"):
        langchain_cope.ChatCope  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "peft", "trl", "chromadb", "langchain_core", "pydantic"}
    assert not heavy & modules_after("import langchain_cope")


def test_chat_and_training_classes_come_without_torch() -> None:
    heavy = {"torch", "transformers", "peft", "trl", "chromadb"}
    imports = "from langchain_cope import ChatCoPe, PersonalizeUser, Recipe"
    assert not heavy & modules_after(f"{imports}; ChatCoPe(); PersonalizeUser()")


def test_the_store_imports_nothing_of_the_rest() -> None:
    others = {"torch", "transformers", "langchain_core", "langchain_cope", "numpy", "safetensors"}
    assert not others & modules_after("import adapter_store")


def test_a_child_forked_while_another_thread_imports_collects_garbage() -> None:
    program = """
import gc, os, threading
from langchain_cope._collector import collector_paused
inside, end = threading.Event(), threading.Event()
def importing():
    with collector_paused():
        inside.set()
        end.wait()
thread = threading.Thread(target=importing)
thread.start()
inside.wait()
assert not gc.isenabled()
child = os.fork()
if not child:
    os._exit(not gc.isenabled())
status = os.waitpid(child, 0)[1]
end.set()
thread.join()
assert gc.isenabled()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
