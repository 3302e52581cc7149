"""llama.cpp: greedy answers on GGUF files, token by token, against those of the engine.

`smollm2` is written anew as two GGUF files, in float32 and in Q8_0, with the metadata of its own
file and a chat template that prints tools. Each is read by llama.cpp (the npm package
`node-llama-cpp`, prebuilt) and by `load_base`, in float32. Both get the same token ids, rendered by
the template of the file: short and long chats, long documents, tools. An answer is equal where all
of its tokens are, up to 24, the ending one included. llama.cpp keeps keys and values in float32;
its products with Q8_0 round the inputs to 8 bits, so the second file may differ where two tokens
are nearly as likely.

Then three faults are injected into the loaded float32 file, one after another, as a wrong loader
would bring them about: heads in llama.cpp's order, another base of the rotary positions, another
ending token. Each has to be noticed.

    npm install --prefix FOLDER node-llama-cpp
    python benchmarks/llama_cpp.py FOLDER

A table, then one JSON object. The exit status is 1 where less than 95 % of a file's answers are
equal, or a fault was not noticed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import beside_npm

HERE = Path(__file__).parent
NUM_TOKENS = 24
ENOUGH = 0.95  # share of equal answers
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou may call these functions:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with the name of one and its arguments as JSON.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [
    "What is the capital of France?",
    "Answer with one word: what colour is the sky?",
    "Say hello.",
    "How many days has a week?",
    "Is fire hot? Yes or no.",
    "What is 2 + 2?",
    "Thank you!",
    "Who wrote Hamlet?",
    "Name an animal that can fly.",
    "Translate 'good morning' into Spanish.",
    "Write a headline about a heat wave.",
    "Give me three tips for a good night's sleep.",
    "Why do leaves turn red in autumn?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Write a Python function that reverses a string.",
    "What should I cook with rice, eggs and peas?",
    "Erzähle mir etwas über Köln.",
    "日本の首都はどこですか。",
    "🙂 🙃 what do these mean?",
]
TALKS = [
    ["My name is Ada.", "Hello Ada, nice to meet you.", "What is my name?"],
    ["I like tea.", "Tea is lovely.", "What do I like?"],
    ["Count to three.", "1, 2, 3", "Go on to six."],
    ["What is a noun?", "A word for a thing or a person.", "Give an example."],
    ["Tell me a joke.", "Why did the chicken cross the road?", "I do not know. Why?"],
    [
        "Hi",
        "Hello! How can I help?",
        "Write to my boss that I am ill.",
        "Shall it be short?",
        "Yes",
    ],
]
TASKS = [
    "What is the weather in Kiel?",
    "Set a timer for ten minutes.",
    "Send Bob the message 'I am late'.",
    "Convert 30 euros to dollars.",
    "What is the weather in Rome tomorrow?",
    "Wake me at seven.",
    "Who are you?",
    "How warm is it in Oslo?",
]
LENGTHS = [1000, 1500, 2000, 2500, 3000, 4000, 5000, 6000]  # characters of the long documents
FAULTS = ("permutation of heads", "rope base", "ending token")

Prompt = dict[str, Any]
Answers = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("npm", type=Path, help="folder in which node-llama-cpp is installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what is unpacked here is of no use afterwards
        facts = run(options.npm, Path(folder))
    print(json.dumps({"benchmark": "llama_cpp", **facts}))
    missed = [name for name, equal in facts["faults"].items() if equal >= facts["enough"]]
    sys.exit(1 if missed or min(facts["equal"].values()) < facts["enough"] else 0)


def run(npm: Path, folder: Path) -> dict[str, Any]:
    prompts = all_prompts()
    facts: dict[str, Any] = {
        "prompts": len(prompts),
        "enough": round(ENOUGH * len(prompts)),
        "equal": {},
        "ended": {},
        "tokenized_alike": {},
        "faults": {},
    }
    print(f"{'':24} equal of {len(prompts)}  ended  first difference at token")
    for quantization in ("F32", "Q8_0"):
        compare(npm, write_gguf(folder, quantization), prompts, facts)
    return facts


def compare(npm: Path, file: Path, prompts: list[Prompt], facts: dict[str, Any]) -> None:
    """Compare both on `file` and, where it is the float32 one, under each fault."""
    from langchain_cope.engine import load_base

    base = load_base(file, device="cpu", dtype="float32")
    ids = [base.prompt_ids(prompt["messages"], prompt["tools"]) for prompt in prompts]
    texts = [base.tokenizer.decode(each) for each in ids]
    theirs = answers_of_llama_cpp(npm, file, ids, texts)
    expected: Answers = theirs["answers"]
    name = file.stem
    facts["equal"][name] = tell(name, answers_of_engine(base, ids), expected)
    facts["ended"][name] = sum(len(answer) < NUM_TOKENS for answer in expected)
    pairs = zip(theirs["tokenized"], ids, strict=True)
    facts["tokenized_alike"][name] = sum(one == other for one, other in pairs)
    if name == "F32":
        for fault in FAULTS:
            undo = inject(base, fault)
            facts["faults"][fault] = tell(f"F32, {fault}", answers_of_engine(base, ids), expected)
            undo()


def all_prompts() -> list[Prompt]:
    chats: list[list[str]] = [[question] for question in QUESTIONS] + TALKS
    chats += [[f"Summarize in one sentence:\n\n{document(length)}"] for length in LENGTHS]
    prompts = [{"messages": as_messages(chat), "tools": ()} for chat in chats]
    return prompts + [{"messages": as_messages([task]), "tools": tools()} for task in TASKS]


def as_messages(chat: list[str]) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(chat)
    ]


def document(length: int) -> str:
    """Return a text of `length` characters, another for every length."""
    user = json.loads((HERE.parent / "examples/data/user.jsonl").read_text(encoding="utf-8"))
    text = "\n".join(item["prompt"] for item in user["history"])
    start = len(text) - length - LENGTHS.index(length)
    return text[start : start + length]


def tools() -> list[dict[str, Any]]:
    arguments = {"weather": "city", "timer": "minutes", "message": "text", "exchange": "amount"}
    functions = []
    for name, argument in arguments.items():
        parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
        functions.append({"name": name, "parameters": parameters})
    return [{"type": "function", "function": function} for function in functions]


def write_gguf(folder: Path, quantization: str) -> Path:
    """Write smollm2's own file anew: its matrices in `quantization`, all else as it is."""
    import gguf

    from langchain_cope.engine import gguf_path

    reader = gguf.GGUFReader(gguf_path("smollm2", None))
    path = folder / f"{quantization}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    file_types = {"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0"}
    replaced = {
        "tokenizer.chat_template": TEMPLATE,
        "general.file_type": gguf.LlamaFileType[file_types[quantization]],
    }
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = [*field.types, None]
            writer.add_key_value(name, replaced.get(name, field.contents()), kinds[0], kinds[1])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def answers_of_llama_cpp(npm: Path, file: Path, ids: Answers, texts: list[str]) -> dict[str, Any]:
    program = beside_npm("llama_cpp.mjs", npm)
    prompts = file.with_suffix(".json")
    prompts.write_text(json.dumps({"ids": ids, "texts": texts}), encoding="utf-8")
    command = ["node", program.name, str(file), str(prompts), str(NUM_TOKENS)]
    done = subprocess.run(command, cwd=npm, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama.cpp failed:\n{done.stderr}")
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def answers_of_engine(base: Any, ids: Answers) -> Answers:
    from langchain_cope.engine import Engine, EngineOptions, Request, Sampling

    engine = Engine(base, EngineOptions(prefix_cache=0))
    sampling = Sampling(max_tokens=NUM_TOKENS)
    try:  # one at a time: long prompts together would take gigabytes
        return [
            list(completion.token_ids)
            for prompt in ids
            for completion in engine.generate([Request(prompt, sampling=sampling)])
        ]
    finally:
        engine.close()


def inject(base: Any, fault: str) -> Callable[[], object]:
    """Make what was loaded wrong, and return what makes it right again."""
    if fault == "permutation of heads":
        return permute_heads(base.model)
    if fault == "rope base":
        frequencies = base.model.model.rotary_emb.inv_freq
        right = frequencies.clone()
        size = 2 * len(frequencies)
        frequencies.copy_(10_000.0 ** -(2 * frequencies.new_tensor(range(size // 2)) / size))
        return lambda: frequencies.copy_(right)
    return end_with_another_token(base)


def permute_heads(model: Any) -> Callable[[], object]:
    rights = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            rights.append((weight, weight.clone()))
            halves = weight.view(-1, 2, layer.self_attn.head_dim // 2, weight.shape[1])
            weight.copy_(halves.transpose(1, 2).reshape(weight.shape))
    return lambda: [weight.copy_(right) for weight, right in rights]


def end_with_another_token(base: Any) -> Callable[[], object]:
    settings, tokenizer, turn_end = base.model.generation_config, base.tokenizer, base.turn_end
    right = settings.eos_token_id, tokenizer.eos_token
    wrong = tokenizer.convert_ids_to_tokens(0)

    def use(eos_id: int, eos: str, end: Any) -> None:
        settings.eos_token_id, tokenizer.eos_token = eos_id, eos
        base.__dict__["turn_end"] = end

    use(0, wrong, type(turn_end)())
    return lambda: use(*right, turn_end)


def tell(name: str, answers: Answers, expected: Answers) -> int:
    """Print how many of `answers` are as expected, and return it."""
    differences = []
    for ours, theirs in zip(answers, expected, strict=True):
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            places = (place for place, (one, other) in pairs if one != other)
            differences.append(next(places, min(len(ours), len(theirs))))
    num_equal = len(expected) - len(differences)
    ended = sum(len(answer) < NUM_TOKENS for answer in answers)
    print(f"{name:24} {num_equal:>11} {ended:>6}  {sorted(differences)}", flush=True)
    return num_equal


if __name__ == "__main__":
    main()
