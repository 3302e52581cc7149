"""What makes TRL's trainers fast on the small batches of one user. All patches are in this file.

Data, losses, optimizer and schedule stay TRL's, the adapter and its format stay peft's. What is
replaced is how the model computes the log-probabilities that both trainers ask for:

- an adapted linear layer is one autograd function, without peft's copies in float32;
- its dropout multiplies by a window of random numbers drawn once, as drawing them cost a sixth of
  a step;
- attention gets no mask, as batches are padded at their end, where a causal model never looks, and
  on a CPU it is computed in float32 where the texts are short: torch's gradients of it in bfloat16
  take five times as long there;
- log-probabilities are made of the positions that bear a loss, not of the whole prompt, and on a
  CPU their gradient is made on the way, without a second product with the head;
- what the texts of a batch begin with alike (the instruction; in DPO the prompt of a pair) is read
  once.

`tests/training/test_fast.py` says when a new version of peft or TRL makes one of these void.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import _use_triton

NOISE_SIZE = 1 << 22  # numbers that dropout draws for a whole training; a few MB
SHORT_TEXT = 256  # tokens; from about 400 on bfloat16 is the faster one
# Settings of models whose attention sees less than all that comes before: from some length on, so
# that no short probe could tell.
NARROWER = ("sliding_window", "attention_chunk_size", "keep_window_size")
PROBE_TOLERANCE = 0.02  # of the states' size: rounding in bfloat16 makes a third, a wrong mask more
ATTENTION = "sdpa_of_rows"  # the name that transformers knows our attention by
WORTH_SHARING = 0.9  # of the tokens, at most
HEAD_TOKENS = 256  # whose logits, in float32, are held at once: 50 MB with 49 000 words


def speed_up(model: PeftModel) -> None:
    """Make `model`, which carries one LoRA adapter on a tree of its own, train faster."""
    tree = model.get_base_model()
    if tree.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        tree.set_attn_implementation(ATTENTION)
        _share_beginnings(tree.base_model)
    if not isinstance(tree.base_model.forward, _SharedBeginnings):
        tree.base_model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    noise: dict[float, Tensor] = {}
    for module in model.modules():
        # A quantized layer may be a subclass of either.
        if type(module) is LoraLinear and type(module.base_layer) is torch.nn.Linear:
            _FastLayer(module, noise)


def _share_beginnings(backbone: torch.nn.Module) -> None:
    """Let `backbone` read what the rows of a batch begin with alike once.

    A model whose states are others that way (one without attention, say) is left as it is.
    """
    parts: Any = backbone.config  # a model that sees images has one of its text part, too
    if any(getattr(parts.get_text_config(), name, None) for name in NARROWER):
        return
    plain, shared = backbone.forward, _SharedBeginnings(backbone.forward)
    device = next(backbone.parameters()).device
    rows = [[0, 1, 2, 3, 1], [0, 1, 2, 2], [0, 1, 2, 3, 0]]
    probe = torch.tensor([row + [0] * (5 - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows], device=device)
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        try:
            expected = plain(probe, attention_mask=mask, use_cache=False).last_hidden_state
            states = shared(probe, attention_mask=mask, use_cache=False).last_hidden_state
        except Exception:  # its attention is not told of the rows, or has other shapes
            return
        finally:
            backbone.train(was_training)
    difference = ((states - expected) * mask.unsqueeze(-1)).float().norm()
    if difference <= PROBE_TOLERANCE * expected.float().norm():
        backbone.forward = shared


@contextmanager
def logits_of_completions_alone(head: Tensor) -> Iterator[None]:
    """Let TRL make log-probabilities only where a label is, as it does by itself on GPUs alone.

    Those under `head`, the weight of the output head, are made by `_FrozenHead`. TRL's switch and
    function are names of a module, so this holds for the whole process meanwhile; what other
    trainers compute stays the same. The first of two trainings that ends brings TRL's own back.
    """
    trl.trainer.utils._use_triton = lambda device: True
    trl.trainer.utils._ChunkedLogProbFunction = _LogProbs(head)
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = _use_triton
        trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: "_Layout | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return transformers' `sdpa` attention.

    On a CPU it is computed in float32 for up to `SHORT_TEXT` tokens. With a `layout`, the tokens
    are those of several rows that begin alike, and each row looks at its own alone.
    """
    dtype = query.dtype
    length = key.shape[2] if layout is None else layout.columns.shape[1]
    is_short = dtype == torch.bfloat16 and query.device.type == "cpu" and length <= SHORT_TEXT
    if is_short:
        query, key, value = query.float(), key.float(), value.float()
    if layout is not None:
        query, key, value = layout.rows_of(query), layout.rows_of(key), layout.rows_of(value)
        attention_mask = None
    # It would round again, but brings together what norms of queries and keys have made float32.
    with torch.autocast(query.device.type, enabled=False) if is_short else nullcontext():
        answer, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if layout is not None:
        answer = layout.packed(answer)
    return answer.to(dtype), None


def _without_mask(
    backbone: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Leave the attention mask out where all padding is at the end."""
    mask = kwargs.get("attention_mask")
    if mask is not None and _is_padded_at_end(mask):
        kwargs = {**kwargs, "attention_mask": None}
    return args, kwargs


def _is_padded_at_end(mask: Tensor) -> bool:
    """Return whether `mask` is of shape `(B, L)`, each row ones, then zeros."""
    return mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


class _SharedBeginnings:
    """A backbone's forward over rows that begin alike: each shared token is computed once."""

    def __init__(self, forward: Any) -> None:
        """Read with `forward`, the backbone's own."""
        self._forward = forward

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Take `(B, L)` ids; states come back as `(B, L, width)`."""
        layout = None
        if attention_mask is not None and _is_padded_at_end(attention_mask):
            layout, attention_mask = _Layout.of(input_ids, attention_mask), None
        # What a router says of each token (a loss balances a mixture's experts by it) is asked of
        # the rows as they are.
        has_router = kwargs.get("output_router_logits")
        if layout is None or has_router or not layout.is_worth_it():
            return self._forward(input_ids, attention_mask=attention_mask, **kwargs)
        out = self._forward(
            layout.ids[None],
            # Of the shape that models pass on as it is; our attention goes by the layout.
            attention_mask=input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=layout.positions[None],
            layout=layout,
            **kwargs,
        )
        out.last_hidden_state = _gather(out.last_hidden_state[0], layout.columns)
        return out


@dataclass(frozen=True)
class _Layout:
    """Rows of tokens with their shared beginnings laid down once, all in one row of T tokens."""

    ids: Tensor
    """`(T,)` token ids."""
    positions: Tensor
    """`(T,)`: how many tokens stand before each in its row."""
    columns: Tensor
    """`(B, L)`: where in the T tokens each token of each row is; 0 for padding."""
    owners: Tensor
    """`(T,)`: for each of the T tokens one of the `B · L` places where it stands."""
    num_tokens: int
    """Of all rows, padding not counted."""

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor) -> "_Layout":
        """Return the layout of `(B, L)` ids, padded at the end as the mask says."""
        known: dict[tuple[int, int], int] = {}  # (column before, id) → column
        ids: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        width = input_ids.shape[1]
        columns = [[0] * width for _ in input_ids]
        lengths = attention_mask.sum(dim=1).tolist()
        for index, (row, length) in enumerate(zip(input_ids.tolist(), lengths, strict=True)):
            column = -1
            for position, token in enumerate(row[:length]):
                column = known.setdefault((column, token), len(ids))
                columns[index][position] = column
                if column == len(ids):
                    ids.append(token)
                    positions.append(position)
                    owners.append(index * width + position)
        device = input_ids.device
        return cls(
            ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            columns=torch.tensor(columns, device=device),
            owners=torch.tensor(owners, device=device),
            num_tokens=sum(lengths),
        )

    def is_worth_it(self) -> bool:
        """Return whether enough tokens are shared to pay for laying the rows out anew."""
        return len(self.ids) <= WORTH_SHARING * self.num_tokens

    def rows_of(self, states: Tensor) -> Tensor:
        """Return the `(1, heads, T, size)` states of the tokens as `(B, heads, L, size)`."""
        _, heads, length, size = states.shape
        tokens = states[0].transpose(0, 1).reshape(length, heads * size)
        rows = _gather(tokens, self.columns)
        return rows.view(*self.columns.shape, heads, size).transpose(1, 2)

    def packed(self, rows: Tensor) -> Tensor:
        """Return `(B, L, heads, size)` of the rows as `(1, T, heads, size)` of the tokens."""
        _, _, heads, size = rows.shape
        return _gather(rows.reshape(-1, heads * size), self.owners).view(1, -1, heads, size)


def _gather(tokens: Tensor, columns: Tensor) -> Tensor:
    """Return `tokens[columns]`: an embedding, whose gradient is the faster one on a CPU."""
    return torch.nn.functional.embedding(columns, tokens)


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


class _LogProbs:
    """TRL's log-probabilities of labels, faster under one frozen head on a CPU."""

    def __init__(self, head: Tensor) -> None:
        """Be faster where `head` is the weight."""
        self._head = head

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
        """Take and return what TRL's `ChunkedLogProbFunction` does."""
        targets, temperature, _, softcap, scale, _ = args
        is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        is_ours = weight is self._head and is_frozen
        if is_ours and hidden.device.type == "cpu" and softcap is None:
            return _FrozenHead.apply(hidden, weight, bias, targets, scale / temperature)  # type: ignore[no-untyped-call]
        return ChunkedLogProbFunction.apply(hidden, weight, bias, *args)


class _FrozenHead(torch.autograd.Function):
    """`log softmax(scale · (h Wᵀ + bias))` at the targets; its gradient for h alone.

    That is `scale · (W[target] − Σ p W)`, and made while p is at hand.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Shapes: h `(n, width)`, W `(V, width)`, targets `(n,)`.

        Returns per token, in TRL's order: log-probability, entropy, log of the sum of squared
        probabilities, mean logit, and whether the target is the likeliest token.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = dtype or hidden.dtype
        head = weight.to(dtype)
        head_bias = None if bias is None else bias.to(dtype)
        parts: list[tuple[Tensor, ...]] = []
        slopes = []
        for start in range(0, max(1, len(targets)), HEAD_TOKENS):
            some = hidden[start : start + HEAD_TOKENS].to(dtype)
            wanted = targets[start : start + HEAD_TOKENS]
            logits = torch.nn.functional.linear(some, head, head_bias).float().mul_(scale)
            log_probs = logits.log_softmax(-1)
            probs = log_probs.exp()
            parts.append(
                (
                    log_probs.gather(-1, wanted[:, None]).squeeze(-1),
                    -torch.linalg.vecdot(probs, log_probs),
                    torch.linalg.vecdot(probs, probs).log(),
                    logits.mean(-1),
                    logits.argmax(-1) == wanted,
                )
            )
            if ctx.needs_input_grad[0]:
                # Before it is rounded: of a token that is nearly certain little is left of 1 - p.
                probs[range(len(wanted)), wanted] -= 1
                slopes.append((probs.to(dtype) @ head).mul_(-scale))
        per_token = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(*per_token[1:])
        return per_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient for h, and None for the rest."""
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(ctx.dtype), None, None, None, None
