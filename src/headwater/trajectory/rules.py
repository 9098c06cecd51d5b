"""Optimizers as functions of arrays, and their adjoints, written by hand: SGD, Adam and AdamW; clipping.

A step takes parameters w, what the optimizer remembers, and the batch's gradient g to the next parameters. Its adjoint
takes cotangents of what comes out to cotangents of what went in. With p, u, s the cotangents of the parameters and of
what is remembered, H the curvature of the batch's loss, lr the rate and wd the weight decay:

    SGD    v' = mu v + g + wd w            w' = w - lr v'          r = s - lr p;   p <- p + wd r + H r;   s <- mu r
    Adam   m' = b1 m + (1 - b1) g          v' = b2 v + (1 - b2) g^2
           w' = w - lr mh D                D = 1 / (sqrt(vh) + eps), mh and vh with their bias corrected

r is the cotangent of g: <r, dg/dweight> is what a row's weight has to do with the query. p <- ... + H r is left to who
knows the model. All of it works on arrays of any framework; cotangents have an axis more, [q, *shape].
Source: Maclaurin, Duvenaud and Adams 2015, arXiv 1502.03492, for descent with momentum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from headwater.arrays import Array, namespace, precise
from headwater.errors import InvalidInput, InvalidSetting

Arrays = dict[str, Any]
"""Arrays of one framework, by the name of the parameter."""


class Rates(NamedTuple):
    """What a step may do otherwise than the last: of one group of parameters."""

    lr: float
    weight_decay: float = 0.0
    first: float = 0.0
    """SGD's momentum, Adam's first beta."""
    second: float = 0.0
    """Adam's second beta."""


@dataclass(frozen=True)
class State:
    """A model in training, between two steps."""

    parameters: Arrays
    memory: dict[str, Arrays]
    """What the optimizer remembers, by its name: "momentum", or "mean" and "square"."""


@dataclass(frozen=True)
class Cotangents:
    """Of a state, for several queries at once: [q, *shape] each."""

    parameters: Arrays
    memory: dict[str, Arrays]


@dataclass(frozen=True)
class Rule(ABC):
    """An optimizer's step, parameter by parameter."""

    @property
    @abstractmethod
    def remembers(self) -> tuple[str, ...]:
        """Names of what it remembers of each parameter."""

    @abstractmethod
    def moved(
        self, w: Array, memory: Mapping[str, Array], g: Array, rates: Rates, count: int
    ) -> tuple[Array, dict[str, Array]]:
        """A parameter and its memory after a step. count: the step's number, from 1."""

    @abstractmethod
    def pulled(
        self,
        memory: Mapping[str, Array],
        w: Array,
        g: Array,
        p: Array,
        u: Mapping[str, Array],
        rates: Rates,
        count: int,
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(r, the part of the new p that does not come through g, the new u)."""

    def step(self, state: State, grads: Mapping[str, Array], rates: Mapping[str, Rates], count: int) -> State:
        """The state after it."""
        parameters: Arrays = {}
        memory: dict[str, Arrays] = {kind: {} for kind in self.remembers}
        for name, w in state.parameters.items():
            mine = {kind: state.memory[kind][name] for kind in self.remembers}
            parameters[name], new = self.moved(w, mine, grads[name], rates[name], count)
            for kind, value in new.items():
                memory[kind][name] = value
        return State(parameters, memory)

    def pull(
        self,
        state: State,
        grads: Mapping[str, Array],
        after: Cotangents,
        rates: Mapping[str, Rates],
        count: int,
    ) -> tuple[Arrays, Cotangents]:
        """The cotangents of the gradient, and of the state before the step but for what comes through the gradient."""
        through: Arrays = {}
        parameters: Arrays = {}
        memory: dict[str, Arrays] = {kind: {} for kind in self.remembers}
        for name, p in after.parameters.items():
            mine = {kind: state.memory[kind][name] for kind in self.remembers}
            u = {kind: after.memory[kind][name] for kind in self.remembers}
            through[name], parameters[name], new = self.pulled(
                mine, state.parameters[name], grads[name], p, u, rates[name], count
            )
            for kind, value in new.items():
                memory[kind][name] = value
        return through, Cotangents(parameters, memory)

    def describe(self) -> dict[str, Any]:
        """As JSON has it, for `rule_of`."""
        return {"kind": type(self).__name__, **asdict(self)}

    @property
    def is_adaptive(self) -> bool:
        """Whether the step is scaled parameter by parameter."""
        return False


@dataclass(frozen=True)
class SgdRule(Rule):
    """v' = mu v + g + wd w; w' = w - lr v', or with Nesterov's momentum w - lr (g + wd w + mu v')."""

    nesterov: bool = False

    @property
    def remembers(self) -> tuple[str, ...]:
        return ("momentum",)

    def moved(
        self, w: Array, memory: Mapping[str, Array], g: Array, rates: Rates, count: int
    ) -> tuple[Array, dict[str, Array]]:
        slope = g + rates.weight_decay * w if rates.weight_decay else g
        v = rates.first * memory["momentum"] + slope
        direction = slope + rates.first * v if self.nesterov else v
        return w - rates.lr * direction, {"momentum": v}

    def pulled(
        self,
        memory: Mapping[str, Array],
        w: Array,
        g: Array,
        p: Array,
        u: Mapping[str, Array],
        rates: Rates,
        count: int,
    ) -> tuple[Array, Array, dict[str, Array]]:
        if self.nesterov:
            s = u["momentum"] - rates.lr * rates.first * p
            r = s - rates.lr * p
        else:
            s = r = u["momentum"] - rates.lr * p
        return r, p + rates.weight_decay * r if rates.weight_decay else p, {"momentum": rates.first * s}


@dataclass(frozen=True)
class AdamRule(Rule):
    """Adam, and with decoupled weight decay AdamW, as torch has them: eps is added to the corrected root."""

    eps: float = 1e-8
    decoupled: bool = False

    @property
    def remembers(self) -> tuple[str, ...]:
        return "mean", "square"

    @property
    def is_adaptive(self) -> bool:
        return True

    def moved(
        self, w: Array, memory: Mapping[str, Array], g: Array, rates: Rates, count: int
    ) -> tuple[Array, dict[str, Array]]:
        b1, b2, kept = rates.first, rates.second, self._kept(rates)
        slope = self._slope(w, g, rates)
        mean = b1 * memory["mean"] + (1 - b1) * slope
        square = b2 * memory["square"] + (1 - b2) * slope * slope
        corrected = mean / (1 - b1**count)
        root = (square / (1 - b2**count)) ** 0.5
        return kept * w - rates.lr * corrected / (root + self.eps), {"mean": mean, "square": square}

    def _kept(self, rates: Rates) -> float:
        return 1 - rates.lr * rates.weight_decay if self.decoupled else 1.0

    def _slope(self, w: Array, g: Array, rates: Rates) -> Array:
        return g if self.decoupled or not rates.weight_decay else g + rates.weight_decay * w

    def pulled(
        self,
        memory: Mapping[str, Array],
        w: Array,
        g: Array,
        p: Array,
        u: Mapping[str, Array],
        rates: Rates,
        count: int,
    ) -> tuple[Array, Array, dict[str, Array]]:
        b1, b2 = rates.first, rates.second
        slope = self._slope(w, g, rates)
        d, s = self._slopes(memory, slope, rates, count)
        mean = u["mean"] - (rates.lr / (1 - b1**count)) * (d * p)
        square = u["square"] + (rates.lr / (1 - b2**count)) * (s * p)
        r = (1 - b1) * mean + 2 * (1 - b2) * slope * square
        direct = self._kept(rates) * p
        if rates.weight_decay and not self.decoupled:
            direct = direct + rates.weight_decay * r
        return r, direct, {"mean": b1 * mean, "square": b2 * square}

    def _slopes(self, memory: Mapping[str, Array], g: Array, rates: Rates, count: int) -> tuple[Array, Array]:
        """D = 1 / (sqrt(vh) + eps), and S = mh / (2 sqrt(vh) (sqrt(vh) + eps)^2), zero where vh is."""
        # In float64: a square of 1e-20 is below what float32 tells from zero, and S divides by its root.
        m, v, g64 = (precise(value) for value in (memory["mean"], memory["square"], g))
        xp = namespace(g64)
        mean = (rates.first * m + (1 - rates.first) * g64) / (1 - rates.first**count)
        square = (rates.second * v + (1 - rates.second) * g64 * g64) / (1 - rates.second**count)
        root = square**0.5
        d = 1 / (root + self.eps)
        safe = xp.where(root > 0, root, xp.ones_like(root))
        s = xp.where(root > 0, mean / (2 * safe) * d * d, xp.zeros_like(root))
        return _like(d, g), _like(s, g)


RULES: dict[str, type[Rule]] = {rule.__name__: rule for rule in (SgdRule, AdamRule)}


def rule_of(described: Mapping[str, Any]) -> Rule:
    """What `describe` gave. Errors: InvalidInput for a kind that is not known here."""
    fields = dict(described)
    kind = fields.pop("kind", None)
    if kind not in RULES:
        raise InvalidInput(f"The record's optimizer is {kind!r}; this version knows {', '.join(RULES)}.")
    return RULES[kind](**fields)


def _like(value: Array, other: Array) -> Array:
    return namespace(value).astype(value, other.dtype)


# Clipping -------------------------------------------------------------------------------------------------------------

CLIP_EPS = 1e-6
"""What torch's clip_grad_norm_ adds to the norm."""


@dataclass(frozen=True)
class Clip:
    """The gradient of all parameters together, scaled to a norm of at most `most`: g min(1, most / (|g| + 1e-6))."""

    most: float

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise InvalidSetting(f"clip is {self.most!r}; expected a norm above zero, or None.")

    def clipped(self, grads: Arrays) -> Arrays:
        share = self._share(norm(grads))
        return grads if share == 1.0 else {name: g * share for name, g in grads.items()}

    def pull(self, grads: Arrays, through: Arrays) -> Arrays:
        """Cotangents of the gradient before it, from those of the clipped one: the Jacobian is symmetric."""
        size = norm(grads)
        share = self._share(size)
        if share == 1.0:
            return through
        along: Any = sum(_dots(through[name], g) for name, g in grads.items())
        # d share = -most / (|g| + eps)^2 d|g|, and d|g| = <g, dg> / |g|.
        down = along * (self.most / (size + CLIP_EPS) ** 2 / size)
        return {
            name: share * through[name] - down.reshape((-1,) + (1,) * g.ndim) * g[None] for name, g in grads.items()
        }

    def _share(self, size: float) -> float:
        return min(1.0, self.most / (size + CLIP_EPS))


def norm(grads: Mapping[str, Array]) -> float:
    """Of all of them together."""
    return float(sum(float(namespace(g).sum(precise(g) * precise(g))) for g in grads.values())) ** 0.5


def _dots(rows: Array, g: Array) -> Array:
    """[q, *shape] with [*shape]: [q]."""
    xp = namespace(g)
    return xp.sum((rows * g[None]).reshape((rows.shape[0], -1)), axis=1)
