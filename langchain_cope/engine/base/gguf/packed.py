"""Products with a GGUF file's 4-bit blocks, kept ready-made beside the unpacked weights.

An engine's first start makes them and writes them down; later ones map the file, whose pages all
processes share. Each is kept with a checksum of the weights that it stands for: a matrix of other
values gets none, and where there is one at that first start, nothing is kept. One of its own tells
what a disk has changed.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from langchain_cope.engine.base.cpu_dtype import cpu_features
from langchain_cope.engine.base.gguf.cache import GgufFile
from langchain_cope.engine.base.gguf.tensors import safetensors_header
from langchain_cope.engine.base.user_cache import kept_fact
from langchain_cope.engine.forward.matmul_order import Linear
from langchain_cope.engine.forward.packed_weights import (
    ROWS,
    PackedWeight,
    is_worth_packing,
    rows_that_pay,
)
from langchain_cope.errors import ModelError

_FORMAT = 3  # of what is kept: a new one has the products made anew
_PRODUCTS = "products"  # the metadata: of each product its planes (0: there is none) and checksum
_MOST_BYTES = 1.25  # of a weight: two planes of half a byte, and their scales and zeros
_DAMAGED = (SafetensorError, KeyError, TypeError, ValueError)  # what reading such a file raises
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Group:
    """Parameters side by side, with which there is one product."""

    names: list[str]
    weights: Sequence[Tensor]

    @property
    def key(self) -> str:
        return "+".join(self.names)

    def checksum(self) -> str:
        """Return a checksum of the weights."""
        return _checksum([weight.detach().view(torch.int64) for weight in self.weights])


class PackedFile:
    """See `BlockSource`: that of a model which was unpacked from a GGUF file."""

    def __init__(self, file: GgufFile, model: PreTrainedModel, *, keep: bool) -> None:
        """Take the file and its model; without `keep` products are made anew, and not kept."""
        self._file = file
        self._model = model
        self._keep = keep

    def packed(self, groups: Sequence[Sequence[Tensor]]) -> list[PackedWeight | None]:
        """See `BlockSource`."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        named = [
            _Group([names.get(id(weight), "") for weight in weights], weights)
            for weights in groups
            if is_worth_packing(weights)
        ]
        products = self._products(named)
        found = {tuple(map(id, group.weights)): products.get(group.key) for group in named}
        return [found.get(tuple(map(id, weights))) for weights in groups]

    def most_rows(
        self, packed: Sequence[PackedWeight], weights: Sequence[Tensor], linear: Linear
    ) -> int:
        """Return up to how many rows packed products are the faster ones.

        Measured once a machine and kept, so that every process on it gives the same answers.
        """
        facts = (cpu_features(), torch.__version__, torch.get_num_threads())
        kind = f"{facts} {len(weights) > 1} {packed[0].planes} {tuple(weights[0].shape)}"
        known = {str(rows): rows for rows in (0, *ROWS)}

        def find() -> str:
            return str(rows_that_pay(packed, weights, linear))

        return known[kept_fact("packed", kind, known.__contains__, find)]

    def _products(self, groups: Sequence[_Group]) -> Mapping[str, PackedWeight]:
        """Return the products of those groups that have one: kept ones, or made now."""
        if not self._keep:
            return self._made_if_there(groups)
        num_weights = sum(weight.numel() for group in groups for weight in group.weights)
        try:
            # The order of the codes is the kernel's, which is another one on other processors.
            path = self._file.packed(
                cpu_features(),
                f"{torch.__version__} {_FORMAT}",
                num_weights * _MOST_BYTES,
                lambda path: _write(path, self._made_of_file(groups), groups),
            )
            try:
                return _read(path, groups)
            except _DAMAGED:
                path.unlink()  # the next start makes it anew
                raise
        except (ModelError, OSError, *_DAMAGED):  # no room on the disk, say
            _log.debug("packed products of %s are not kept", self._file.path, exc_info=True)
        return self._made_if_there(groups)

    def _made_if_there(self, groups: Sequence[_Group]) -> dict[str, PackedWeight]:
        try:
            return self._made(groups)[0]
        except ModelError:
            _log.debug("%s has gone", self._file.path, exc_info=True)
            return {}

    def _made_of_file(self, groups: Sequence[_Group]) -> dict[str, PackedWeight]:
        """Return the products that all bases of the file can use.

        Raises ModelError where weights of this one have other values.
        """
        made, changed = self._made(groups)
        if changed:
            raise ModelError(f"these are not the values of {self._file.path}: {changed}")
        return made

    def _made(self, groups: Sequence[_Group]) -> tuple[dict[str, PackedWeight], list[str]]:
        """Return the products, and the names of weights of other values than in the file."""
        from langchain_cope.engine.base.gguf.blocks import FileBlocks  # slow to import

        source = FileBlocks(self._file, self._model)
        made = {group.key: source.packed(group.names, group.weights) for group in groups}
        products = {key: product for key, product in made.items() if product is not None}
        return products, source.changed


def _write(path: Path, made: Mapping[str, PackedWeight], groups: Sequence[_Group]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, tuple[int, str, str]] = {}
    for group in groups:
        facts[group.key] = (0, "", "")
        if product := made.get(group.key):
            tensors[f"{group.key}.codes"] = product.codes
            tensors[f"{group.key}.scales"] = product.scales
            facts[group.key] = (product.planes, group.checksum(), _checksum_of(product))
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with path.open("xb") as file:
        file.write(safetensors_header(shapes, {_PRODUCTS: json.dumps(facts)}))
        for tensor in tensors.values():
            tensor.view(torch.uint8).numpy().tofile(file)


def _read(path: Path, groups: Sequence[_Group]) -> dict[str, PackedWeight]:
    """Return the kept products with the weights of `groups`, mapped.

    Raises one of `_DAMAGED` where the file cannot be read, knows nothing of a group, or does not
    hold what was written.
    """
    products = {}
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[_PRODUCTS])
        for group in groups:
            planes, checksum, of_product = facts[group.key]
            if planes and checksum == group.checksum():
                codes, scales = (
                    file.get_tensor(f"{group.key}.{part}") for part in ("codes", "scales")
                )
                product = PackedWeight(codes, scales, planes)
                if _checksum_of(product) != of_product:
                    raise ValueError(f"the product of {group.key} is not what was written")
                products[group.key] = product
    return products


def _checksum_of(product: PackedWeight) -> str:
    return _checksum([each.view(-1).view(torch.int64) for each in (product.codes, product.scales)])


def _checksum(tensors: Sequence[Tensor]) -> str:
    """Return a digest of the sums of each row, eight bytes a number: as fast as memory is."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.sum(-1).numpy().tobytes())
    return digest.hexdigest()
