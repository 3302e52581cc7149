"""The model that the decoding benchmarks decode with, and the other ways to get such tokens.

    Generate   transformers' `generate`, one user at a time: of the base with the user's adapter by
               PEFT, of the base with the adapter merged into the weights, or of the base alone;
               none of them contrasts
    Mixed      many users together by PEFT: adapter_names=[user, …, "__base__", …], the contrast in
               torch
    TwoModels  the way of the paper's scripts: two copies of the weights, the user's LoRA merged
               into one, two forwards a token and the contrast, one user at a time

Every way has a KV cache, computes the logits of the last position only, runs in inference mode in
bfloat16 with torch's threads, decodes greedily and never stops early. Rates are tokens/s of
decoding, from the first token to the last, without the prompt. Each class is served by a
`worker.Worker`. Nothing of langchain_cope is imported here.
"""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.generation import BaseStreamer
from transformers.utils import logging as transformers_logging
from worker import SEED, VOCABULARY, Setting, peak_memory

ALPHA, TAU = 0.1, 0.1

# Transformers' warnings about names that peft still uses.
warnings.filterwarnings("ignore", category=FutureWarning)
transformers_logging.disable_progress_bar()


def prepare(setting: Setting) -> None:
    """Write a random Llama of SmolLM-135M's shape and a random adapter a user."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(setting.base)
    _word_tokenizer().save_pretrained(setting.base)
    write_adapters(model, setting)


def write_adapters(model: Any, setting: Setting) -> None:
    """Write a random adapter of `model` a user."""
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    personal = get_peft_model(model, lora)
    for folder in setting.adapters:
        with torch.no_grad():
            for name, parameter in personal.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.02)
        personal.save_pretrained(folder)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose every token is a word: each is one piece of text, none the end."""
    tokenizer = Tokenizer(
        models.WordLevel({f"word{i}": i for i in range(VOCABULARY)}, unk_token="word0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=2048, chat_template="{{ messages }}"
    )


class Generate:
    """`generate` for one user after another.

    `kind` is "adapter" (PEFT, not merged), "merged" or "base".
    """

    def __init__(self, setting: Setting, kind: str, num_users: int = 1) -> None:
        self._setting, self._kind = setting, kind
        base = _load(setting)
        base.generation_config.eos_token_id = None
        self._model = base if kind == "base" else _with_adapters(base, setting.adapters[:num_users])
        if kind == "merged":
            self._model = self._model.merge_and_unload()

    @torch.inference_mode()
    def rate(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return tokens/s over the answers of `num_users` users, each with their own adapter."""
        seconds = 0.0
        for user in range(num_users):
            if self._kind == "adapter":
                self._model.set_adapter(f"user{user}")
            clock = _Clock()
            ids = torch.tensor(
                [self._setting.prompt(user, prompt_tokens)], device=self._setting.device
            )
            answer = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                streamer=clock,
            )
            assert answer.shape[1] == prompt_tokens + num_tokens
            seconds += clock.last - clock.first
        return num_users * (num_tokens - 1) / seconds

    def peak_memory(self) -> int:
        """Return the peak of this process, in bytes."""
        return peak_memory(self._setting.device)


class Mixed:
    """Users together in PEFT's mixed batch, two rows each."""

    def __init__(self, setting: Setting, num_users: int) -> None:
        self._setting = setting
        self._model = _with_adapters(_load(setting), setting.adapters[:num_users])

    @torch.inference_mode()
    def rate(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return tokens/s of all users together."""
        cache = DynamicCache(config=self._model.get_base_model().config)
        names = [f"user{user}" for user in range(num_users)] + ["__base__"] * num_users

        def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = self._model(
                input_ids=torch.cat([ids, ids]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                adapter_names=names,
            ).logits[:, -1]
            return logits[:num_users], logits[num_users:]

        prompts = [self._setting.prompt(user, prompt_tokens) for user in range(num_users)]
        seconds = _decode(forward, prompts, num_tokens, self._setting.device)
        return num_users * (num_tokens - 1) / seconds


class TwoModels:
    """Two whole models, one of them with the first user's adapter merged into it."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._models = (
            _with_adapters(_load(setting), setting.adapters[:1]).merge_and_unload(),
            _load(setting),
        )

    @torch.inference_mode()
    def rate(self, num_users: int, prompt_tokens: int, num_tokens: int) -> float:
        """Return tokens/s over the answers of `num_users` users, one after another.

        The first one's weights serve for all.
        """
        seconds = 0.0
        for user in range(num_users):
            forward = self._two_forwards(
                [DynamicCache(config=model.config) for model in self._models]
            )
            prompt = self._setting.prompt(user, prompt_tokens)
            seconds += _decode(forward, [prompt], num_tokens, self._setting.device)
        return num_users * (num_tokens - 1) / seconds

    def _two_forwards(
        self, caches: list[DynamicCache]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
            user, base = (
                model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
                for model, cache in zip(self._models, caches, strict=True)
            )
            return user, base

        return forward


class Torch:
    """What torch says of itself, and how fast it reads memory and multiplies."""

    def __init__(self, device: str) -> None:
        self._device = device

    def about(self) -> dict[str, Any]:
        """Return version, threads and, on a GPU, its name."""
        gpu = {} if self._device == "cpu" else {"gpu": torch.cuda.get_device_name()}
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": self._device,
            **gpu,
        }

    def read_rate(self, num_bytes: int) -> float:
        """Return the bytes/s at which memory can be read.

        The rate is the best over so many bytes and over more than a cache holds.
        """
        large = 1 << 30 if self._device == "cpu" else 8 << 30
        return max(size / self._pass_seconds(size) for size in (min(num_bytes, large), large))

    def multiply_rate(self, dtype: str) -> float:
        """Return the FLOP/s of products of large square matrices in `dtype`, at best."""
        sizes = (1024, 2048) if self._device == "cpu" else (4096, 8192)
        return max(2 * size**3 / self._product_seconds(size, dtype) for size in sizes)

    def _product_seconds(self, size: int, dtype: str, passes: int = 5) -> float:
        matrix = torch.ones(size, size, device=self._device, dtype=getattr(torch, dtype))
        return _best_seconds(lambda: matrix @ matrix, passes)

    def _pass_seconds(self, num_bytes: int, passes: int = 10, width: int = 4096) -> float:
        matrix = torch.ones(num_bytes // (4 * width), width, device=self._device)
        vector = torch.ones(width, device=self._device)
        return _best_seconds(lambda: matrix @ vector, passes)  # reads each weight once


def _best_seconds(product: Callable[[], Tensor], passes: int) -> float:
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        product().view(-1)[-1].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class _Clock(BaseStreamer):
    """When `generate` had its first token and its last.

    The tokens it is handed lie on the CPU: the device has been waited for.
    """

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


def _load(setting: Setting) -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(setting.base, dtype=torch.bfloat16)
        .to(setting.device)
        .eval()
    )


def _with_adapters(model: Any, folders: list[Path]) -> Any:
    """Return `model` with an adapter a user, in its own dtype.

    PEFT's default of float32 would cost two casts a layer.
    """
    personal = PeftModel.from_pretrained(
        model, folders[0], adapter_name="user0", autocast_adapter_dtype=False
    )
    for user, folder in enumerate(folders[1:], start=1):
        personal.load_adapter(folder, adapter_name=f"user{user}", autocast_adapter_dtype=False)
    return personal.eval()


def _decode(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    prompts: list[list[int]],
    num_tokens: int,
    device: str,
) -> float:
    """Return the seconds from the first token to the last, greedy and contrastive.

    `forward` gives (user, base) logits `(users, V)`.
    """
    ids = torch.tensor(prompts, device=device)
    start = 0.0
    for step in range(num_tokens):
        ids = _contrast(*forward(ids)).argmax(-1, keepdim=True)
        ids.tolist()  # every way hands its tokens out at each step
        if step == 0:
            start = time.perf_counter()
    return time.perf_counter() - start


def _contrast(user_logits: Tensor, base_logits: Tensor) -> Tensor:
    """Return the rule's scores as scripts have them: no more than an argmax needs."""
    user = torch.log_softmax(user_logits.float(), dim=-1)
    base = torch.log_softmax(base_logits.float(), dim=-1)
    outside = user < user.amax(dim=-1, keepdim=True) + math.log(TAU)
    return (user - ALPHA * base).masked_fill_(outside, -math.inf)
