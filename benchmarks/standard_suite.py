"""LangChain's own integration tests for chat models, on ChatHuggingFace and on ChatCoPe: the same tests, the same weights.

The weights are those of a tiny random Llama unless ``--model`` names another base, so tests that need a model which understands
what it reads fail on both. Each test runs under a time limit, because some never end. Features (tools, structured output, JSON
mode) are claimed for both; images, audio and PDFs for neither, and their tests skip. ChatHuggingFace comes with
``pip install langchain-huggingface``. The last line is one JSON object.
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
        return {"model": FOLDER, "store": "memory://suite", "max_tokens": 512, "seed": 0}


class TestChatHuggingFace(Suite):
    @property
    def chat_model_class(self):
        from langchain_huggingface import ChatHuggingFace
        return ChatHuggingFace

    @property
    def chat_model_params(self):
        from langchain_huggingface import HuggingFacePipeline
        pipeline = HuggingFacePipeline.from_model_id(
            model_id=FOLDER, task="text-generation", pipeline_kwargs={"max_new_tokens": 512, "do_sample": False}
        )
        return {"llm": pipeline}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="a path or a Hugging Face id; by default a tiny random Llama made here"
    )
    parser.add_argument("--seconds", type=int, default=120, help="for one test, at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _tiny(Path(folder) / "base")
        suite = Path(folder) / "test_suite.py"
        suite.write_text(SUITE, encoding="utf-8")
        found = {
            name: _run(suite, name, model, options.seconds)
            for name in ("ChatHuggingFace", "ChatCoPe")
        }
    tests = sorted({test for results in found.values() for test in results})
    print(f"\n{'test':<52}" + "".join(f"{name:>18}" for name in found))
    for test in tests:
        print(
            f"{test:<52}"
            + "".join(f"{results.get(test, 'not run'):>18}" for results in found.values())
        )
    counts = {name: dict(Counter(results.values())) for name, results in found.items()}
    print(f"\n{'':<18}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for name, count in counts.items():
        print(
            f"{name:<18}"
            + "".join(f"{count.get(kind, 0):>8}" for kind in ("passed", "failed", "skipped"))
        )
    passed = [counts[name].get("passed", 0) for name in ("ChatCoPe", "ChatHuggingFace")]
    ratios = {"passed_vs_chat_hugging_face": round(passed[0] / max(passed[1], 1), 2)}
    print(
        json.dumps(
            {
                "benchmark": "standard_suite",
                "model": options.model or "tiny random Llama",
                "counts": counts,
                "ratios": ratios,
            }
        )
    )


def _tiny(folder: Path) -> str:
    script = "import sys; sys.path.insert(0, sys.argv[1]); from tiny import make_model; from pathlib import Path; make_model(Path(sys.argv[2]), context=8192)"  # noqa: E501
    subprocess.run([sys.executable, "-c", script, str(ROOT / "tests"), str(folder)], check=True)
    return str(folder)


def _run(suite: Path, name: str, model: str, seconds: int) -> dict[str, str]:
    """passed, failed or skipped of every test."""
    report = suite.with_name(f"{name}.xml")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(suite),
        "-q",
        "-k",
        f"Test{name}",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    command += ["-o", f"timeout={seconds}", "-o", "asyncio_mode=auto", f"--junitxml={report}"]
    environment = {
        **os.environ,
        "COPE_SUITE_MODEL": model,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        command, env=environment, cwd=suite.parent, stdout=subprocess.DEVNULL, check=False
    )
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        results[case.get("name", "")] = (
            "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        )
    return results


if __name__ == "__main__":
    main()
