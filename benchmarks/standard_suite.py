"""LangChain's own integration tests for chat models, on ChatCoPe and on ChatHuggingFace.

Three columns: ChatCoPe on a real base (`smollm2` unless `--model` names another), ChatHuggingFace
on the files of the same base, and ChatCoPe on a tiny random Llama, where tests that need a model
which understands what it reads fail. Both classes get the same settings as far as they have them.
Each test runs under a time limit, because some never end. Features (tools, structured output, JSON
mode) are claimed for both; images, audio and PDFs for neither, and their tests skip.
ChatHuggingFace comes with `pip install langchain-huggingface`. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = """
import os
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

FOLDER = os.environ["COPE_SUITE_MODEL"]
TOKENS, TEMPERATURE, DTYPE = 128, 0.7, "bfloat16"


class Suite(ChatModelIntegrationTests):
    @property
    def supports_json_mode(self):
        return True

    @property
    def has_tool_choice(self):
        return True

    @property
    def supports_anthropic_inputs(self):
        return True


class TestChatCoPe(Suite):
    @property
    def chat_model_class(self):
        from langchain_cope import ChatCoPe
        return ChatCoPe

    @property
    def chat_model_params(self):
        settings = {"max_tokens": TOKENS, "temperature": TEMPERATURE, "seed": 0}
        return {"model": FOLDER, "dtype": DTYPE, "store": "memory://suite", **settings}


class TestChatHuggingFace(Suite):
    @property
    def chat_model_class(self):
        from langchain_huggingface import ChatHuggingFace
        return ChatHuggingFace

    @property
    def chat_model_params(self):
        from langchain_huggingface import HuggingFacePipeline
        pipeline = HuggingFacePipeline.from_model_id(
            model_id=FOLDER,
            task="text-generation",
            model_kwargs={"dtype": DTYPE},
            pipeline_kwargs={
                "max_new_tokens": TOKENS, "do_sample": True, "temperature": TEMPERATURE
            },
        )
        return {"llm": pipeline}
"""

TINY_MODEL = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from tiny import make_model

make_model(Path(sys.argv[2]), context=8192)
"""
REAL_MODEL = """
import sys

from langchain_cope.engine import load_base

base = load_base(sys.argv[1], device="cpu", dtype="bfloat16")
base.model.save_pretrained(sys.argv[2])
base.tokenizer.save_pretrained(sys.argv[2])
"""
NAMES = ("ChatCoPe", "ChatHuggingFace", "ChatCoPe, tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name, path or Hugging Face id")
    parser.add_argument("--seconds", type=int, default=120, help="for one test, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = _made(folder / "real", REAL_MODEL, options.model)
        tiny = _made(folder / "tiny", TINY_MODEL, str(ROOT / "tests"))
        suite = folder / "test_suite.py"
        suite.write_text(SUITE, encoding="utf-8")
        results = {
            name: _run(suite, name.split(",")[0], tiny if "tiny" in name else real, options.seconds)
            for name in NAMES
        }
    counts = {name: dict(Counter(outcomes.values())) for name, outcomes in results.items()}
    _print_tables(results, counts)
    ours, theirs = (counts[name].get("passed", 0) for name in ("ChatCoPe", "ChatHuggingFace"))
    report = {
        "benchmark": "standard_suite",
        "model": options.model,
        "counts": counts,
        "ratios": {"passed_vs_chat_hugging_face": round(ours / max(theirs, 1), 2)},
    }
    print(json.dumps(report))


def _print_tables(results: dict[str, dict[str, str]], counts: dict[str, dict[str, int]]) -> None:
    print(f"\n{'test':<52}" + "".join(f"{name:>18}" for name in NAMES))
    tests = {test for outcomes in results.values() for test in outcomes}
    for test in sorted(tests):
        cells = [f"{results[name].get(test, 'not run'):>18}" for name in NAMES]
        print(f"{test:<52}" + "".join(cells))
    kinds = ("passed", "failed", "skipped")
    print(f"\n{'':<18}" + "".join(f"{kind:>8}" for kind in kinds))
    for name in NAMES:
        print(f"{name:<18}" + "".join(f"{counts[name].get(kind, 0):>8}" for kind in kinds))


def _made(folder: Path, program: str, argument: str) -> str:
    """Have a program write a model to `folder`, and return its path."""
    command = [sys.executable, "-c", program, argument, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True)
    return str(folder)


def _run(suite: Path, name: str, model: str, seconds: int) -> dict[str, str]:
    """Return whether each test passed, failed or was skipped."""
    report = suite.with_name(f"{name}.xml")
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "-k", f"Test{name}"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", "-o", f"timeout={seconds}"]
    command += ["-o", "asyncio_mode=auto", f"--junitxml={report}"]
    environment = {
        **os.environ,
        "COPE_SUITE_MODEL": model,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        command, env=environment, cwd=suite.parent, stdout=subprocess.DEVNULL, check=False
    )
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes[case.get("name", "")] = _outcome({child.tag for child in case})
    return outcomes


def _outcome(tags: set[str]) -> str:
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


if __name__ == "__main__":
    main()
