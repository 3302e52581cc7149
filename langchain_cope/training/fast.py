"""What makes TRL's trainers fast on the small batches of one user. All patches are in this file.

Data, losses, optimizer and schedule stay TRL's, the adapter and its format stay peft's. What is
replaced is how the model computes the log-probabilities that both trainers ask for:

- an adapted linear layer is one autograd function, without peft's copies in float32;
- its dropout multiplies by a window of random numbers drawn once, as drawing them cost a sixth of
  a step;
- attention gets no mask, as batches are padded at their end, where a causal model never looks, and
  on a CPU it is computed in float32 where the texts are short: torch's gradients of it in bfloat16
  take five times as long there;
- logits are made of the positions that bear a loss, not of the whole prompt;
- DPO reads what the two answers of a pair have in common, their prompt, once and not twice.

`tests/training/test_fast.py` says when a new version of peft or TRL makes one of these void.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels.chunked_logprob import _use_triton

NOISE_SIZE = 1 << 22  # numbers that dropout draws for a whole training; a few MB
SHORT_TEXT = 256  # tokens; from about 400 on bfloat16 is the faster one
# Settings of models whose attention sees less than all that comes before: from some length on, so
# that no short probe could tell.
NARROWER = ("sliding_window", "attention_chunk_size", "keep_window_size")
PROBE_TOLERANCE = 0.02  # of the states' size: rounding in bfloat16 makes a third, a wrong mask more
SHORT_FLOAT32 = "sdpa_short_float32"  # the name that transformers knows our attention by


def speed_up(model: PeftModel) -> None:
    """Make `model`, which carries one LoRA adapter on a tree of its own, train faster.

    For DPO, `share_prompts` comes first.
    """
    tree = model.get_base_model()
    _use_fast_attention(tree)
    backbone = tree.base_model
    if not isinstance(backbone.forward, _SharedPrompts):  # that one makes masks of its own
        backbone.register_forward_pre_hook(_without_mask, with_kwargs=True)
    noise: dict[float, Tensor] = {}
    for module in model.modules():
        # A quantized layer may be a subclass of either.
        if type(module) is LoraLinear and type(module.base_layer) is torch.nn.Linear:
            _FastLayer(module, noise)


def share_prompts(model: PeftModel) -> None:
    """Let a backbone that gets pairs, chosen rows before rejected ones, read each prompt once.

    It then reads one row a pair, `prompt chosen rejected`, whose mask hides the chosen answer from
    the rejected one, and gives the states back as the rows that were asked for. A model whose
    states are others that way (one without attention, say) is left as it is.
    """
    backbone = model.get_base_model().base_model
    if not any(getattr(backbone.config, name, None) for name in NARROWER):
        plain, shared = backbone.forward, _SharedPrompts(backbone.forward)
        probe = torch.tensor([[0, 1, 2, 3, 1], [0, 1, 1, 2, 0]], device=backbone.device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], device=backbone.device)
        with torch.no_grad():
            try:
                expected = plain(probe, attention_mask=mask, use_cache=False).last_hidden_state
                states = shared(probe, attention_mask=mask, use_cache=False).last_hidden_state
            except Exception:  # no masks or positions of that shape
                return
        difference = ((states - expected) * mask.unsqueeze(-1)).float().norm()
        if difference <= PROBE_TOLERANCE * expected.float().norm():
            backbone.forward = shared


@contextmanager
def logits_of_completions_alone() -> Iterator[None]:
    """Let TRL make logits only where a label is, as it does by itself on GPUs alone.

    TRL's switch is one name of a module, so it holds for the whole process meanwhile; what other
    trainers compute stays the same. The first of two trainings that ends brings TRL's own back.
    """
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = _use_triton


def _use_fast_attention(tree: PreTrainedModel) -> None:
    is_slow = tree.device.type == "cpu" and tree.dtype == torch.bfloat16
    if is_slow and tree.config._attn_implementation == "sdpa":
        AttentionInterface.register(SHORT_FLOAT32, _attention)
        AttentionMaskInterface.register(SHORT_FLOAT32, sdpa_mask)
        tree.set_attn_implementation(SHORT_FLOAT32)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return transformers' `sdpa` attention, in float32 for up to `SHORT_TEXT` tokens."""
    if key.shape[2] > SHORT_TEXT:
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    with torch.autocast(query.device.type, enabled=False):
        answer, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), *args, **kwargs
        )
    return answer.to(query.dtype), None


def _without_mask(
    backbone: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave the attention mask out where all padding is at the end."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        kwargs = {**kwargs, "attention_mask": None}
    return args, kwargs


class _SharedPrompts:
    """A backbone's forward over pairs of rows that begin alike."""

    def __init__(self, forward: Any) -> None:
        """Read with `forward`, the backbone's own."""
        self._forward = forward

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Take `(2 P, L)` ids of P chosen rows and their P rejected ones, padded at the end.

        Returns what the backbone does; its `last_hidden_state` is `(2 P, L, width)`.
        """
        # No pairs: somebody asks the model for something else. What a router says of each token
        # (a loss balances a mixture's experts by it) is asked of the rows as they are.
        if len(input_ids) % 2 or kwargs.get("output_router_logits"):
            return self._forward(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows = [row[: int(keep.sum())] for row, keep in zip(input_ids, attention_mask, strict=True)]
        pairs = list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))
        layouts = [_PairLayout.of(chosen, rejected) for chosen, rejected in pairs]
        longest = max(layout.length for layout in layouts)
        packed = input_ids.new_zeros(len(pairs), longest)
        positions = torch.zeros_like(packed)
        visible = torch.zeros(len(pairs), 1, longest, longest, dtype=torch.bool)
        back = input_ids.new_zeros(2, len(pairs), input_ids.shape[1])
        for index, layout in enumerate(layouts):
            chosen, rejected = pairs[index]
            packed[index, : layout.length] = torch.cat([chosen, rejected[layout.shared :]])
            positions[index] = layout.positions(longest)
            visible[index, 0] = layout.visible(longest)
            back[0, index, : len(chosen)] = torch.arange(len(chosen))
            back[1, index, : len(rejected)] = layout.rejected_columns()
        out = self._forward(
            packed,
            attention_mask=visible.to(input_ids.device),
            position_ids=positions,
            **kwargs,
        )
        states = out.last_hidden_state
        rows_of = torch.arange(len(pairs), device=states.device)[:, None]
        out.last_hidden_state = torch.cat([states[rows_of, back[0]], states[rows_of, back[1]]])
        return out


@dataclass(frozen=True)
class _PairLayout:
    """Where the tokens of one pair stand in its row: shared ones, chosen ones, rejected ones."""

    shared: int
    chosen: int
    length: int

    @classmethod
    def of(cls, chosen: Tensor, rejected: Tensor) -> "_PairLayout":
        """Return the layout of two rows of ids, without padding."""
        shortest = min(len(chosen), len(rejected))
        differs = (chosen[:shortest] != rejected[:shortest]).nonzero()
        shared = int(differs[0]) if len(differs) else shortest
        return cls(shared, len(chosen), len(chosen) + len(rejected) - shared)

    def positions(self, width: int) -> Tensor:
        """Return `(width,)` positions: the rejected answer begins where the chosen one does."""
        columns = torch.arange(width)
        return torch.where(columns < self.chosen, columns, columns - self.chosen + self.shared)

    def visible(self, width: int) -> Tensor:
        """Return `(width, width)`: whether the token of a row sees that of a column."""
        columns = torch.arange(width)
        of_chosen = (columns >= self.shared) & (columns < self.chosen)
        of_rejected = columns >= self.chosen
        before = columns[:, None] >= columns
        return before & ~(of_rejected[:, None] & of_chosen)

    def rejected_columns(self) -> Tensor:
        """Return the columns of the rejected row's tokens, the shared ones included."""
        rest = torch.arange(self.chosen, self.length)
        return torch.cat([torch.arange(self.shared), rest])


class _FastLayer:
    """The forward of one adapted linear layer, in place of peft's."""

    def __init__(self, layer: LoraLinear, noise: dict[float, Tensor]) -> None:
        """Take over the forward of `layer`; `noise` is shared by all layers of a model."""
        self._layer, self._noise = layer, noise
        self._peft_forward: Callable[..., Tensor] = layer.forward
        weight = layer.base_layer.weight
        for dropout in layer.lora_dropout.values():
            p = getattr(dropout, "p", 0.0)
            # Drawn before training: a forward that gradient checkpointing repeats has to find the
            # random state as it was, or its window would be another one.
            if p and p not in noise:
                noise[p] = _noise(NOISE_SIZE, p, weight.device, weight.dtype)
        layer.forward = self

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer
        if layer.disable_adapters or layer.merged or args or kwargs:
            return self._peft_forward(x, *args, **kwargs)
        (name,) = layer.active_adapters
        base = layer.base_layer
        adapted: Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
            x.to(base.weight.dtype),
            base.weight,
            base.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            self._dropout(x, layer.lora_dropout[name]),
        )
        return adapted

    def _dropout(self, x: Tensor, dropout: torch.nn.Module) -> Tensor | None:
        """Return what the adapter's input is multiplied by, of the shape of `x`; None for 1."""
        p = getattr(dropout, "p", 0.0)
        if p == 0 or not dropout.training:
            return None
        dtype, size = self._layer.base_layer.weight.dtype, x.numel()
        if size > NOISE_SIZE // 2:
            return _noise(size, p, x.device, dtype).view(x.shape)
        start = int(torch.randint(NOISE_SIZE - size + 1, ()))
        return self._noise[p][start : start + size].view(x.shape)


def _noise(size: int, p: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `(size,)` numbers: 0 with probability `p`, else 1 / (1 − p)."""
    kept = torch.empty(size, dtype=torch.float32, device=device).bernoulli_(1 - p)
    return (kept / (1 - p)).to(dtype)


class _AdaptedLinear(torch.autograd.Function):
    """`y = x Wᵀ + bias + scaling · (noise ∘ x) Aᵀ Bᵀ`; gradients for x, A and B.

    x, W and the products have W's dtype; A, B and their gradients are float32, as peft keeps them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        noise: Tensor | None,
    ) -> Tensor:
        """Shapes: x and noise `(…, in)`, W `(out, in)`, A `(r, in)`, B `(out, r)`, y `(…, out)`."""
        a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        flat_noise = None if noise is None else noise.reshape(x.shape)
        low_rank = (x if flat_noise is None else x * flat_noise) @ a.t()
        y = torch.nn.functional.linear(x, weight, bias)
        y.addmm_(low_rank, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low_rank, flat_noise)
        ctx.scaling, ctx.shape = scaling, shape
        return y.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments, None for those that get none."""
        x, weight, a, b, low_rank, noise = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low_rank = (grad @ b).mul_(ctx.scaling)
        grad_b = (grad.t() @ low_rank).float().mul_(ctx.scaling)
        grad_a = (grad_low_rank.t() @ (x if noise is None else x * noise)).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if noise is None:
                grad_x.addmm_(grad_low_rank, a)
            else:
                grad_x.addcmul_(grad_low_rank @ a, noise)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None
