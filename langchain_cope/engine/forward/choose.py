"""The choice of a forward: the fastest one that gives what the model itself gives.

Before any request is served, a candidate gets two prompts in ragged pieces, and its logits are held
against those of the model's plain, uncached forward.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from langchain_cope.engine.adapter import low_rank_dtype
from langchain_cope.engine.forward.inputs import Forward, Inputs
from langchain_cope.engine.forward.kv_cache import KeyValues, LayerShape
from langchain_cope.engine.forward.llama import LlamaForward
from langchain_cope.engine.forward.lora_rows import LoraRows
from langchain_cope.engine.forward.matmul_order import MatmulOrder
from langchain_cope.engine.forward.packed_weights import BlockSource
from langchain_cope.engine.forward.plain import PlainForward
from langchain_cope.errors import ModelError

_ANY = 1 << 30  # rows
_log = logging.getLogger(__name__)

Shapes = Sequence[LayerShape | None]


def choose_forward(
    model: PreTrainedModel,
    shapes: Shapes,
    order: MatmulOrder,
    block_source: BlockSource | None = None,
) -> Forward:
    """Return the fastest forward that gives what `model` itself gives.

    Args:
        model: the model, in inference mode.
        shapes: what its layers keep of a position.
        order: of its products.
        block_source: gives the blocks of its parameters, where a file has some.

    Raises:
        ModelError: none does, with the model's class.
    """
    prompts = _check_prompts(model)
    logits = [model(input_ids=prompt.unsqueeze(0), use_cache=False).logits for prompt in prompts]
    expected = torch.stack([each[0, -1].float() for each in logits])
    name = type(model).__name__
    try:
        if llama := LlamaForward.of(model, order):
            difference = _difference(llama, model, shapes, prompts, expected)
            if difference <= _tolerance(model.dtype) / 2:
                if block_source is not None:
                    _pack(llama, block_source, model, shapes, prompts, expected)
                return llama
            _log.debug("%s is not served by LlamaForward: it differs by %.3g", name, difference)
    except Exception:  # it has the parts, but in other sizes, say
        _log.debug("%s is not served by LlamaForward", name, exc_info=True)
    plain = PlainForward(model, order)
    try:
        difference = _difference(plain, model, shapes, prompts, expected)
    except Exception as error:
        raise ModelError(
            f"{name} cannot be served: rows of different lengths fail in its attention ({error})"
        ) from error
    if difference > _tolerance(model.dtype):
        raise ModelError(
            f"{name} cannot be served: with rows of different lengths its attention gives other "
            f"answers (logits differ by {difference:.2g} of their size)"
        )
    return plain


def _pack(
    llama: LlamaForward,
    source: BlockSource,
    model: PreTrainedModel,
    shapes: Shapes,
    prompts: Sequence[Tensor],
    expected: Tensor,
) -> None:
    """Let `llama` compute few rows with packed blocks, if it then gives the same."""
    none = (0,) * len(llama.packed_rows)
    try:
        llama.pack(source)
        rows = llama.packed_rows
        llama.packed_rows = tuple(_ANY if most else 0 for most in rows)  # the prompts have more
        difference = _difference(llama, model, shapes, prompts, expected)
    except Exception:  # no memory for them, say
        llama.packed_rows = none
        _log.debug("no packed products", exc_info=True)
        return
    fits = difference <= _tolerance(model.dtype) / 2
    llama.packed_rows = rows if fits else none
    _log.debug("packed products up to %s rows differ by %.3g", llama.packed_rows, difference)


def _check_prompts(model: PreTrainedModel) -> list[Tensor]:
    """Return two prompts of 12 and 7 random tokens, the same ones for every model."""
    last_token = model.config.get_text_config().vocab_size - 1
    prompts = []
    for length in (12, 7):
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(0, 100, (length,), generator=generator)
        prompts.append(prompt.clamp_max(last_token).to(model.device))
    return prompts


def _tolerance(dtype: torch.dtype) -> float:
    """Return the share of their spread that logits may differ by; a wrong mask makes a third."""
    return 1e-3 if dtype == torch.float32 else 0.2


def _difference(
    forward: Forward,
    model: PreTrainedModel,
    shapes: Shapes,
    prompts: Sequence[Tensor],
    expected: Tensor,
) -> float:
    """Return how far logits of `forward` are from the `expected` ones, relative to their spread.

    It gets both prompts in two pieces, of 5 and 2 tokens and of the rest.
    """
    device, dtype = model.device, low_rank_dtype(model.dtype, model.device)
    kv = KeyValues(shapes, model.dtype, device)
    kv.reserve(2, 16)
    lora = LoraRows(forward.sites, torch.empty(0, dtype=dtype, device=device))
    cuts = (5, 2)
    first = torch.zeros(2, 5, dtype=torch.long, device=device)
    rest = torch.zeros(2, 7, dtype=torch.long, device=device)
    for row, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True)):
        first[row, :cut] = prompt[:cut]
        rest[row, : len(prompt) - cut] = prompt[cut:]
    steps = torch.arange(7, device=device).expand(2, 7)
    offsets = torch.tensor(cuts, device=device).unsqueeze(1)
    forward(Inputs(first, steps[:, :5], kv, 5, lora, [0, 1], [4, 1]))
    logits = forward(Inputs(rest, steps + offsets, kv, 12, lora, [0, 1], [6, 4])).float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((logits - expected).norm() / spread.clamp_min(1e-6))
