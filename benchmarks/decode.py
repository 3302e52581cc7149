"""Decoding speed: CoPe in our engine against the other ways to get the same tokens.

One base in three forms: a random Llama of the shape of SmolLM-135M (30 layers, width 576) in bfloat16 and in float32, and the
bundled starter in float32. Per form, in the same run and in alternation (every round runs each way once):

    cope          our engine: one base, per user two rows in one forward; timed at the engine's front door, detokenising included
    generate      transformers' `generate` of the base alone: no adapter, no contrast
    two models    the way of the paper's scripts: two copies of the weights, the user's LoRA merged into one, two forwards a token
    batch8        8 users together in our engine, 16 rows a step
    peft mixed    the same 16 rows by PEFT: adapter_names=[user, …, "__base__", …], the contrast in torch

Every way has a KV cache, computes the logits of the last position only, runs in inference mode with the same dtype and threads,
decodes greedily and never stops early. Only decode steps are timed: from the first token to the last, without the prompt.
A figure is the median over the rounds, a ratio the median of the rounds' ratios. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer
from transformers.utils import logging as transformers_logging

from langchain_cope.engine.contrast import contrast
from langchain_cope.engine.engine import Engine, Piece, Request, Sampling
from langchain_cope.engine.model import STARTER, load_base

ALPHA, TAU = 0.1, 0.1
NUM_USERS = 8
PROMPT_TOKENS = 64
SEED = 0

Way = Callable[[], float]
"""Runs once and returns tokens/s."""


def main() -> None:
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about names that peft still uses
    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    state = _state(options)
    print(json.dumps(state), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        random_llama = _random_llama(Path(folder) / "llama134m")
        forms = [("bf16", random_llama, torch.bfloat16, options.tokens)]
        if options.device == "cpu":  # on a GPU the other two say little: bfloat16 is what runs there
            forms += [
                ("float32", random_llama, torch.float32, options.tokens // 2),
                ("starter", STARTER, torch.float32, options.tokens),
            ]
        ratios: dict[str, float] = {}
        speeds: dict[str, float] = {}
        for name, source, dtype, num_tokens in forms:
            _measure(_Ways(name, source, dtype, num_tokens, options.device), options.rounds, ratios, speeds)
    state["load_after"] = os.getloadavg()
    print(json.dumps({**state, "tokens_per_second": speeds, "ratios": ratios}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which every way runs once")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    return parser.parse_args()


def _state(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "decode",
        "device": torch.cuda.get_device_name() if options.device != "cpu" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": "random Llama, 30 layers, width 576, vocabulary 49152, tied; LoRA r 8 on q_proj and v_proj",
        "prompt_tokens": PROMPT_TOKENS,
        "answer_tokens": options.tokens,
        "rounds": options.rounds,
        "load_before": os.getloadavg(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _measure(ways: "_Ways", rounds: int, ratios: dict[str, float], speeds: dict[str, float]) -> None:
    """Run every way of one form ``rounds`` times in alternation; add its figures and print its table."""
    found: dict[str, list[float]] = {name: [] for name in ways.all()}
    for way in ways.all().values():  # warm up: allocator, thread pool, kernels
        way()
    for _ in range(rounds):
        for name, way in ways.all().items():
            found[name].append(way())
    ways.close()
    pairs = {
        "cope_vs_generate": ("cope", "generate"),
        "cope_vs_two_models": ("cope", "two models"),
        "batch8_vs_peft_mixed": ("batch8", "peft mixed"),
    }
    print(f"\n{ways.name:<12}{'tokens/s':>10}{'of generate':>13}")
    for name, values in found.items():
        speed = speeds[f"{name.replace(' ', '_')}_{ways.name}"] = round(statistics.median(values), 2)
        print(f"{name:<12}{speed:>10.1f}{speed / statistics.median(found['generate']):>13.2f}")
    for name, (ours, theirs) in pairs.items():
        each = [a / b for a, b in zip(found[ours], found[theirs], strict=True)]
        ratios[f"{name}_{ways.name}"] = round(statistics.median(each), 3)
        print(f"{name}_{ways.name}: {statistics.median(each):.2f}  (rounds {min(each):.2f} to {max(each):.2f})")


class _Ways:
    """The five ways over one base."""

    def __init__(self, name: str, source: Path, dtype: torch.dtype, num_tokens: int, device: str) -> None:
        self.name, self.num_tokens, self.device = name, num_tokens, device
        self.engine = Engine.of(load_base(source, device=device, dtype=dtype))
        self._base = self.engine.base.skeleton()
        # Every token is a word, so each comes as one piece of text and none ends the answer.
        self.engine.base.tokenizer = _word_tokenizer(self.engine.base.vocabulary_size)
        for settings in (self.engine.base.model.generation_config, self._base.generation_config):
            settings.eos_token_id = None  # nobody stops early
        self._folder = tempfile.TemporaryDirectory()
        folders = _random_adapters(Path(self._folder.name), source)
        self._adapters = [self.engine.load_adapter(folder) for folder in folders]

        def copy() -> Any:
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()

        self._two_models = (PeftModel.from_pretrained(copy(), folders[0]).merge_and_unload(), copy())
        self._mixed = PeftModel.from_pretrained(copy(), folders[0], adapter_name="user0").eval()
        for user, folder in enumerate(folders[1:], start=1):
            self._mixed.load_adapter(folder, adapter_name=f"user{user}")
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = self.engine.base.vocabulary_size
        self._prompts = torch.randint(10, vocabulary, (NUM_USERS, PROMPT_TOKENS), generator=generator)

    def all(self) -> dict[str, Way]:
        """Name to way."""
        return {
            "cope": lambda: self._cope(1),
            "generate": self._generate,
            "two models": self._both_models,
            "batch8": lambda: self._cope(NUM_USERS),
            "peft mixed": self._peft_mixed,
        }

    def close(self) -> None:
        self.engine.close()
        self._folder.cleanup()

    def _cope(self, num_users: int) -> float:
        sampling = Sampling(max_tokens=self.num_tokens)
        requests = [
            Request(self._prompts[user].tolist(), self._adapters[user], ALPHA, TAU, sampling)
            for user in range(num_users)
        ]
        return self._rate(self.engine.stream_all(requests))

    def _rate(self, streams: Sequence[Any]) -> float:
        for stream in streams:
            assert isinstance(next(stream), Piece)
        start = time.perf_counter()
        for stream in streams:
            assert len(stream.completion().token_ids) == self.num_tokens
        return len(streams) * (self.num_tokens - 1) / (time.perf_counter() - start)

    @torch.inference_mode()
    def _generate(self) -> float:
        clock = _Clock()
        ids = self._prompts[:1].to(self.device)
        mask = torch.ones_like(ids)
        answer = self._base.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=self.num_tokens, streamer=clock
        )
        assert answer.shape[1] == PROMPT_TOKENS + self.num_tokens
        return (self.num_tokens - 1) / (clock.last - clock.first)

    @torch.inference_mode()
    def _both_models(self) -> float:
        caches = [DynamicCache(config=model.config) for model in self._two_models]

        def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
            user, base = (
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                for model, cache in zip(self._two_models, caches, strict=True)
            )
            return user, base

        return self._loop(forward, self._prompts[:1])

    @torch.inference_mode()
    def _peft_mixed(self) -> float:
        cache = DynamicCache(config=self._mixed.get_base_model().config)
        names = [f"user{user}" for user in range(NUM_USERS)] + ["__base__"] * NUM_USERS

        def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.cat([ids, ids])
            logits = self._mixed(
                input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=names
            ).logits[:, -1]
            return logits[:NUM_USERS], logits[NUM_USERS:]

        return self._loop(forward, self._prompts)

    def _loop(self, forward: Callable[[Tensor], tuple[Tensor, Tensor]], prompts: Tensor) -> float:
        """Greedy contrastive decoding around a forward that gives (user, base) logits ``(users, V)``."""
        ids = prompts.to(self.device)
        start = 0.0
        for step in range(self.num_tokens):
            ids = contrast(*forward(ids), ALPHA, TAU).argmax(-1, keepdim=True)
            ids.tolist()  # every way hands its tokens out at each step
            if step == 0:
                start = time.perf_counter()
        return len(prompts) * (self.num_tokens - 1) / (time.perf_counter() - start)


class _Clock(BaseStreamer):
    """When `generate` had its first token and its last. The tokens it is handed lie on the CPU: the device has been waited for."""

    first = last = 0.0

    def __init__(self) -> None:
        self._calls = 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        self.last = time.perf_counter()
        if self._calls == 2:  # the first call hands over the prompt
            self.first = self.last

    def end(self) -> None:
        pass


def _random_llama(folder: Path) -> Path:
    """A random Llama of SmolLM-135M's shape, in ``folder``."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _word_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"word{i}": i for i in range(size)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, chat_template="{{ messages }}")


def _random_adapters(folder: Path, base: Path) -> list[Path]:
    """A peft folder a user with random A and B, rank 8 on q_proj and v_proj."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    personal = get_peft_model(model, settings)
    folders = [folder / f"user{user}" for user in range(NUM_USERS)]
    for user_folder in folders:
        with torch.no_grad():
            for name, parameter in personal.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.02)
        personal.save_pretrained(user_folder)
    return folders


if __name__ == "__main__":
    main()
