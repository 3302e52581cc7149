"""One base model in memory, shared by chat and training, known by its fingerprint.

`loading.py` makes a `Base`, one for each model, however often it is asked for. The weights are held
by one pristine module tree; engine and training each work on a `skeleton` of it, a tree of their
own around the same parameter tensors.
"""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from langchain_cope.engine.base.chat_template import ChatTemplate
from langchain_cope.engine.base.fingerprint import fingerprint_of
from langchain_cope.engine.base.forms import Message
from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.engine.base.prompt_profile import Everyday
from langchain_cope.engine.base.reply_format import THINK, ReplyFormat, reply_format_of
from langchain_cope.engine.base.turn_end import TurnEnd, turn_end_of
from langchain_cope.engine.forward.packed_weights import BlockSource, can_pack
from langchain_cope.engine.grammar.vocabulary import Vocabulary, make_vocabulary

_END_OF_PROMPT = 16  # tokens in which the mark of a thought would stand


@dataclass(eq=False)
class Base:
    """A base model in memory, made by `load_base`."""

    name: str
    """The name it was loaded by: `smollm2`, `starter`, a Hugging Face id or a path."""
    source: str
    """Where the files are: an absolute folder, or the Hugging Face id."""
    revision: str | None
    """Revision of a Hugging Face id; None: the newest."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer, which has a chat template."""
    model: PreTrainedModel
    """The pristine tree: never wrapped, never trained, never cast."""
    context: int
    """Number of tokens that prompt and answer may have together."""
    task_adapter: Path | None = None
    """Folder of the adapter that was merged into the weights."""
    quantization: str | None = None
    """Settings of the quantization as text; None: the weights are not quantized."""
    gguf: GgufFile | None = None
    """The file that the weights were unpacked from; None: of no such file."""
    unloaded: bool = False
    """True once the last who used it has closed: `load_base` then loads it anew."""
    _fingerprint_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _fingerprint: dict[str, str] | None = field(default=None, repr=False)
    _vocabulary_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _vocabulary: Vocabulary | None = field(default=None, repr=False)
    _token_texts: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights, where inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation."""
        return self.model.dtype

    @property
    def weights_digest(self) -> str | None:
        """Hex sha256 of the GGUF file that the weights were unpacked from, if there is one."""
        return self.gguf.digest if self.gguf else None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer.

        Those of `generation_config`, else of `config`, the tokenizer's own and those that close the
        assistant's turn in the chat template.
        """
        settings = self.model.generation_config
        ids: Any = settings.eos_token_id if settings else None
        if ids is None:
            ids = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        listed = ids if isinstance(ids, list) else [ids]
        own = [*listed, self.tokenizer.eos_token_id]
        return self.turn_end.ids | {token for token in own if token is not None}

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What ends the assistant's turn in the chat template."""
        return turn_end_of(self.tokenizer)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are not text."""
        entries = self.tokenizer.added_tokens_decoder.items()
        added = [token for token, entry in entries if entry.special]
        return frozenset([*added, *self.tokenizer.all_special_ids])

    @cached_property
    def reply_format(self) -> ReplyFormat:
        """How thoughts and calls are told apart from the answer."""
        return reply_format_of(self.tokenizer)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """What makes prompts of messages."""
        return ChatTemplate(
            self.tokenizer,
            native_tools=self.reply_format.native_tools,
            thinks=bool(self.reply_format.thought_names),
        )

    @cached_property
    def everyday(self) -> Everyday:
        """What prompts are that nobody's history is needed for."""
        return Everyday(self.model, self.tokenizer)

    @cached_property
    def markers(self) -> frozenset[int]:
        """Special tokens that mark a call or a thought; unlike the others they are shown."""
        markers = set()
        for token in self.special_ids - self.eos_ids:
            text = str(self.tokenizer.convert_ids_to_tokens(token))
            if self.reply_format.uses(text):
                markers.add(token)
        return frozenset(markers)

    def stop_ids(self, stops: Sequence[str]) -> frozenset[int]:
        """Return the tokens that are not shown and that `stops` name: no text ever holds them."""
        named = {stop.strip() for stop in stops}
        return frozenset(token for text, token in self._hidden_tokens.items() if text in named)

    @cached_property
    def _hidden_tokens(self) -> dict[str, int]:
        """The tokens that are not shown, by their text."""
        convert = self.tokenizer.convert_ids_to_tokens
        return {str(convert(token)): token for token in self.hidden_ids}

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Tokens that are not shown: the special ones without the `markers`."""
        return self.special_ids - self.markers

    @property
    def vocabulary_size(self) -> int:
        """Number of entries of a row of logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens as grammars see them; made at first use, which takes up to a second.

        Raises InputError where llguidance is not installed, and ModelError for a slow tokenizer.
        """
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(
                    self.tokenizer,
                    model=self.name,
                    size=self.vocabulary_size,
                    eos_ids=self.eos_ids,
                    markers=self.markers,
                )
            return self._vocabulary

    def token_text(self, token: int) -> str:
        """Return the text that `token` adds after other text; empty where it is not shown."""
        if token not in self._token_texts:
            before, text = self._other_text
            shown = [] if token in self.hidden_ids else [token]
            with_token = str(self.tokenizer.decode([*before, *shown]))
            self._token_texts[token] = with_token[len(text) :]
        return self._token_texts[token]

    @cached_property
    def _other_text(self) -> tuple[list[int], str]:
        """Some text as tokens, since decoders treat the first token of a text differently."""
        ids = list(self.tokenizer.encode("a", add_special_tokens=False))
        return ids, str(self.tokenizer.decode(ids))

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> dict[str, str]:
        """Return what an adapter is bound to, part by part (`fingerprint.py`).

        The parts are computed at first use.
        """
        with self._fingerprint_lock:
            if self._fingerprint is None:
                self._fingerprint = fingerprint_of(self)
            return dict(self._fingerprint)

    def skeleton(self) -> PreTrainedModel:
        """Return a new module tree around the same parameter tensors.

        None of the tensors requires a gradient. What is added to the tree (LoRA layers, hooks)
        stays in it. Never cast or move it: that would convert the shared tensors.
        """
        shared: dict[int, Any] = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    def block_source(self) -> BlockSource | None:
        """Return what gives products with 4-bit blocks, where a GGUF file has them.

        None where no product could be computed with them: on a GPU, or in float32.
        """
        if self.gguf is None or not can_pack(next(self.model.parameters())):
            return None
        from langchain_cope.engine.base.gguf.packed import PackedFile

        return PackedFile(self.gguf, self.model, keep=self.task_adapter is None)

    def prompt_ids(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the token ids of a conversation that the assistant is to continue.

        Every message's text is in it once, as text: no control token comes from what it says.

        Args:
            messages: the chat so far.
            tools: given to the chat template.

        Raises:
            InputError: the chat template refuses the conversation, or leaves out a message.
        """
        return self.chat_template.ids(messages, add_generation_prompt=True, tools=tools)

    def thought_opened_by(self, prompt: Sequence[int]) -> str:
        """Return the mark of a thought where `prompt` ends with it, and the reply begins in one."""
        end = str(self.tokenizer.decode(list(prompt[-_END_OF_PROMPT:]))).rstrip()
        return THINK if end.endswith(THINK) else ""

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """Return the token ids of a whole conversation, the end of the last turn included.

        Raises InputError as `prompt_ids` does.
        """
        return self.chat_template.ids(messages, add_generation_prompt=False)
