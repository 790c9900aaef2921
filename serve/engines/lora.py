"""Many LoRA adapters on one base model, mixed in one batch.

The matrices of the adapters that are active in a batch lie side by side: one product with all their `a`,
a mask that zeroes the columns of adapters a row does not use, one product with all their `b`. That costs
two small products a layer however the rows are mixed. Masking sets values, it does not multiply, so one
adapter's overflow cannot reach another adapter's rows.

Shape letters: B rows, Q tokens of a row, R the ranks of all active adapters together.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from serve.engines.adapter_files import AdapterFiles, LoraPair
from serve.engines.adapter_source import AdapterError

MAX_PLANS = 8  # combinations of adapters whose matrices are kept side by side
_uids = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory. Rows hold a reference, so unloading never pulls it from under them."""

    name: str
    sha256: str
    rank: int
    path: str
    pairs: dict[str, LoraPair] = field(repr=False)
    uid: int = field(default_factory=lambda: next(_uids))
    """Differs for every load, also of the same name."""


@dataclass(frozen=True)
class _Joined:
    """One layer's matrices side by side: a is [R, in], b is [out, R]; `layout` says whose each column is."""

    a: Tensor
    b: Tensor
    layout: int


@dataclass(frozen=True)
class _Plan:
    """Everything about one set of active adapters."""

    order: dict[int, int]
    """Adapter uid -> its number in `owners`."""
    layers: dict[str, _Joined]
    owners: list[Tensor]
    """For each layout, the number of the adapter that owns each column, int [R]."""


class LoraLinear(nn.Module):
    """A linear layer of the base model, plus whatever the bank has selected for the batch."""

    def __init__(self, base: nn.Linear, name: str, bank: "AdapterBank") -> None:
        super().__init__()
        self.base = base
        self._name, self._bank = name, bank

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; models look at its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with each row's adapter added."""
        y: Tensor = self.base(x)
        joined = self._bank.layers.get(self._name)
        if joined is None:
            return y
        low = nn.functional.linear(x, joined.a)
        others = self._bank.others.get(joined.layout)
        if others is not None:
            low = low.masked_fill(others, 0.0)
        return y.add_(nn.functional.linear(low, joined.b))


class AdapterBank:
    """The adapters of one model. `select` is called by the step loop before each forward pass.

    Loading and unloading may happen on any thread: they only touch `loaded`.
    """

    def __init__(self, model: nn.Module, max_adapters: int) -> None:
        self.loaded: dict[str, LoadedAdapter] = {}
        self.max_adapters = max_adapters
        self.layers: dict[str, _Joined] = {}
        self.others: dict[int, Tensor] = {}  # layout -> bool [B, 1, R], true where a column is not the row's
        self._model = model
        self._wrapped: set[str] = set()
        self._plans: OrderedDict[tuple[int, ...], _Plan] = OrderedDict()
        self._linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def prepare(self, name: str, files: AdapterFiles) -> LoadedAdapter:
        """Fit an adapter to this model without making it available yet.

        Raises:
            AdapterError: a layer it changes does not exist here or has another shape.
        """
        pairs = {}
        for module, pair in files.pairs.items():
            linear = self._linear.get(module)
            if linear is None:
                raise AdapterError(f"it changes {module}, which the base model does not have as a linear layer")
            expected, found = (linear.out_features, linear.in_features), (pair.b.shape[0], pair.a.shape[1])
            if expected != found:
                raise AdapterError(f"it was made for another base model: {module} is {expected} here, {found} there")
            weight = linear.weight
            pairs[module] = LoraPair(pair.a.to(weight), pair.b.to(weight))
        return LoadedAdapter(name, files.sha256, files.rank, files.location, pairs)

    def add(self, adapter: LoadedAdapter) -> None:
        """Make an adapter available under its name.

        Raises:
            AdapterError: the bank is full, or the name is taken by other weights.
        """
        held = self.loaded.get(adapter.name)
        if held is not None and held.sha256 != adapter.sha256:
            raise AdapterError(f"the name {adapter.name!r} is taken by an adapter with other weights")
        if held is None and len(self.loaded) >= self.max_adapters:
            raise AdapterError(f"{self.max_adapters} adapters are loaded already; raise `engine.max_adapters`")
        if held is None:
            self.loaded[adapter.name] = adapter

    def remove(self, name: str) -> bool:
        """Take an adapter away from new requests; false when there was none of that name."""
        return self.loaded.pop(name, None) is not None

    def select(self, adapters: Sequence[LoadedAdapter | None]) -> None:
        """Set the adapter of each row of the next forward pass."""
        active = {a.uid: a for a in adapters if a is not None}
        if not active:
            self.layers, self.others = {}, {}
            return
        plan = self._plan(active)
        self.layers, self.others = plan.layers, {}
        if len(active) == 1 and None not in adapters:
            return
        numbers = [plan.order[a.uid] if a is not None else -1 for a in adapters]
        number_B11 = torch.tensor(numbers, device=plan.owners[0].device)[:, None, None]
        self.others = {i: owner_R != number_B11 for i, owner_R in enumerate(plan.owners)}

    def _plan(self, active: dict[int, LoadedAdapter]) -> _Plan:
        key = tuple(sorted(active))
        plan = self._plans.get(key)
        if plan is None:
            adapters = [active[uid] for uid in key]
            for module in {m for a in adapters for m in a.pairs}:
                self._wrap(module)
            self._forget_unloaded(key)
            plan = self._plans[key] = _join(adapters)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def _forget_unloaded(self, keep: tuple[int, ...]) -> None:
        loaded = {a.uid for a in list(self.loaded.values())} | set(keep)
        for key in [k for k in self._plans if not loaded.issuperset(k)]:
            del self._plans[key]

    def _wrap(self, module: str) -> None:
        """Put a `LoraLinear` around a layer the first time an adapter changes it."""
        if module in self._wrapped:
            return
        parent, _, child = module.rpartition(".")
        setattr(self._model.get_submodule(parent), child, LoraLinear(self._linear[module], module, self))
        self._wrapped.add(module)


def _join(adapters: list[LoadedAdapter]) -> _Plan:
    layouts: dict[tuple[tuple[int, int], ...], int] = {}
    layers: dict[str, _Joined] = {}
    owners: list[Tensor] = []
    for module in sorted({m for a in adapters for m in a.pairs}):
        parts = [(number, a.pairs[module]) for number, a in enumerate(adapters) if module in a.pairs]
        shape = tuple((number, pair.a.shape[0]) for number, pair in parts)
        if shape not in layouts:
            layouts[shape] = len(owners)
            columns = [torch.full((rank,), number) for number, rank in shape]
            owners.append(torch.cat(columns).to(parts[0][1].a.device))
        a = torch.cat([pair.a for _, pair in parts])
        b = torch.cat([pair.b for _, pair in parts], dim=1).contiguous()
        layers[module] = _Joined(a, b, layouts[shape])
    return _Plan({a.uid: number for number, a in enumerate(adapters)}, layers, owners)
