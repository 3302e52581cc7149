"""Products of a forward with its weights: few rows with packed blocks, more with the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from langchain_cope.engine.forward.fused_weights import fused
from langchain_cope.engine.forward.lora_rows import Site
from langchain_cope.engine.forward.matmul_order import MatmulOrder
from langchain_cope.engine.forward.packed_weights import (
    BlockSource,
    PackedWeight,
    can_pack,
)
from langchain_cope.engine.forward.reordered_weights import MOST_ROWS, ReorderedWeight, reordered


@dataclass
class Product:
    """One product with a weight, and the site where adapters change it."""

    weight: Tensor
    bias: Tensor | None
    site: Site
    parameters: list[Tensor] = field(repr=False)
    """What `weight` is made of."""
    packed: PackedWeight | None = None
    """The same product for few rows."""
    packed_rows: int = 0
    """The most rows that `packed` computes."""
    reordered: ReorderedWeight | None = None
    """The same product, to the bit, for up to `MOST_ROWS` rows."""

    @classmethod
    def of(cls, path: str, module: nn.Module, names: tuple[str, ...]) -> "Product | None":
        """Return the product of the linear layers `names` of `module`, if they lie side by side."""
        layers = [getattr(module, name) for name in names]
        weight = fused([layer.weight for layer in layers])
        bias = fused([layer.bias for layer in layers])
        if weight is None or (bias is None and any(layer.bias is not None for layer in layers)):
            return None
        paths = tuple(f"{path}.{name}" for name in names)
        site = Site(paths, tuple(layer.out_features for layer in layers))
        return cls(weight, bias, site, [layer.weight for layer in layers])

    def __call__(self, states: Tensor, order: MatmulOrder) -> Tensor:
        """Return the product: from `(…, in)` to `(…, out)`."""
        num_rows = states.numel() // states.shape[-1]
        if self.packed is not None and num_rows <= self.packed_rows:
            return self.packed(states, self.bias)
        if self.reordered is not None and num_rows <= MOST_ROWS:
            return self.reordered(states, self.bias)
        return order(states, self.weight, self.bias)


def pack(products: Sequence[Product], source: BlockSource) -> None:
    """Give the products packed ones, where there are some."""
    able = [product for product in products if can_pack(product.weight)]
    packed = source.packed([product.parameters for product in able])
    for product, few_rows in zip(able, packed, strict=True):
        product.packed = few_rows


def reorder(products: Sequence[Product]) -> None:
    """Compute up to `MOST_ROWS` rows with reordered weights, where that pays."""
    if own_orders := reordered([product.weight for product in products]):
        for product, own in zip(products, own_orders, strict=True):
            product.reordered = own


def measure_packed_rows(
    products: Sequence[Product], source: BlockSource, order: MatmulOrder
) -> None:
    """Use packed products for as many rows as these are measured to be faster."""
    shapes = [product.weight.shape for product in products if product.packed is not None]
    if shapes:
        usual = max(set(shapes), key=lambda shape: (shapes.count(shape), shape.numel()))
        timed = [each for each in products if each.packed and each.weight.shape == usual]
        set_packed_rows(
            products,
            source.most_rows(
                [product.packed for product in timed if product.packed],
                [product.weight for product in timed],
                order,
            ),
        )


def set_packed_rows(products: Sequence[Product], most: int) -> None:
    """Compute up to that many rows with packed products; 0 gives them up for good."""
    for product in products:
        product.packed_rows = most
        if not most:
            product.packed = None
