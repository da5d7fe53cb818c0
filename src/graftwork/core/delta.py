"""A delta: an adapter's piece at one site of the backbone. It overrides exactly the functions it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..products.lowrank import low_rank, whole_update
from .errors import GraftError
from .initial import adopt
from .passes import Runtime
from .weight import NO_WEIGHT, Weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from .attention import Attention
    from .plan import Host


class Delta(nn.Module):
    """Base of all deltas: the trained parameters of one site, and what they do to the pass.

    Override one or more of
        forward(x, y) -> y'                     edit the site's output y [..., d] (channels last), given x (see `source`)
        enter(x) -> x'                          edit the input of the site's norm (the residual stream of a pre-norm block), or,
                                                where a sequence is embedded, of the LM head's linear map
        amend(x, base) -> x'                    edit the site's input, knowing what the site gives for it, base(x)
        attend(q, k, v, mask, attention)        replace the attention of the site's attention module
        around(base, *args, **kwargs)           the general form: may change inputs, skip the module, or call it twice

    source: which tensor x is: the "input" of the module that is edited, the sub-layer's "entry", or the input of its "norm". For
        `around`, `core.plan.reading` gives it.
    reading: what of x and y it looks at: "x", "y" or "x + y".
    itself: it looks at its parameters themselves (their version), so that no other tensors may stand in for them.
    A delta with an attribute `gate`, None at first, multiplies what it adds by gate(what it reads, runtime) where there is one.
    """

    source: str = "input"
    reading: str = "x"
    itself: bool = False
    runtime: Runtime  # what the sites of the model share, given by `join`
    key: str  # the site's key, given by `place`
    pruned: int = 0  # entries of its parameters that are held at zero, and not counted

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module's own, with its two commonest cases first: a plain value, and a parameter under a new name. That it asks what
        # else a value may be is a quarter of the time in which the hundreds of deltas of an adapter are built
        own = self.__dict__
        known = (
            "_modules" not in own or name in own["_parameters"] or name in own["_buffers"] or name in own["_modules"]
        )
        if known or isinstance(value, nn.Module):
            super().__setattr__(name, value)
        elif not isinstance(value, Tensor):
            object.__setattr__(self, name, value)
        elif type(value) is nn.Parameter and name not in own and not hasattr(type(self), name):
            own["_parameters"][name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The site's output y [..., d], edited."""
        raise NotImplementedError

    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        """What the edit of the output y is a function of."""
        return {"x": lambda: x, "y": lambda: y, "x + y": lambda: x + y}[self.reading]()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        """out [batch, heads, queries, d_head] in the place of attention(q, k, v, mask).

        q [batch, heads, queries, d_head]; k, v [batch, kv_heads, keys, d_head], grouped heads not yet repeated.
        """
        raise NotImplementedError

    def enter(self, x: Tensor) -> Tensor:
        """The input of the norm or of the LM head's map, edited."""
        raise NotImplementedError

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The site's input, edited; base(x) is the site's output for it."""
        raise NotImplementedError

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module returns, in the place of base(*args, **kwargs)."""
        raise NotImplementedError

    def inner(self) -> Iterable[Delta]:
        """The deltas inside this one, which sit where it sits."""
        return ()

    def place(self, key: str, view: Weight) -> None:
        """Take the key and the weight of the site; the deltas inside take them too."""
        self.key = key
        for delta in self.inner():
            delta.place(key, view)

    def join(self, runtime: Runtime) -> None:
        """Take what the sites of a model share; the deltas inside take it too."""
        self.runtime = runtime
        for delta in self.inner():
            delta.join(runtime)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors, named as in `state_dict`: they become its own. GraftError for a missing, unknown or misshapen one."""
        own = self.state_dict(keep_vars=True)
        for name in own.keys() | tensors.keys():
            there, here = tensors.get(name), own.get(name)
            if there is None or here is None or there.shape != here.shape:
                raise GraftError(
                    f"the tensor {name!r} of {getattr(self, 'key', type(self).__name__)}",
                    f"stored {_shape(there)}, expected {_shape(here)}",
                    "the file was made by other hyper-parameters or for another backbone",
                )
        adopt(self, tensors)

    def auxiliary_loss(self) -> Tensor | None:
        """A term for the training loss, or None."""
        return None

    def context(self, name: str, default: Any = None) -> Any:
        """Side information of the batch, set by `gw.context`."""
        return self.runtime.context.get(name, default)

    def role(self, tensor: str) -> str:
        """What a parameter is, by its name in the delta, for what is set by role (learning rates, weight decay): "embedding" of
        a table of embeddings, "scale" a vector (a magnitude, a bias), "up" the factor at the output (B), "down" any other.
        """
        view, value = getattr(self, "view", NO_WEIGHT), self.get_parameter(tensor)
        if view.lookup:
            return "embedding"
        if value.dim() <= 1 + len(view.batch):
            return "scale"
        return "up" if any(word.rstrip("0123456789") == "up" for word in re.split(r"[._]", tensor)) else "down"

    def overrides(self, function: str) -> bool:
        """Whether this delta has the function of that name. A combinator answers for the delta inside it."""
        return getattr(type(self), function, None) is not getattr(Delta, function, None)


def _shape(t: Tensor | None) -> str:
    return "nothing" if t is None else str(list(t.shape))


Diagonal = tuple[Tensor | None, Tensor | None, Tensor | None]


class WeightDelta(Delta):
    """A delta that re-parameterises the site's weight: merge, unmerge, every host and export come for free.

    Override one of
        factors() -> (A, B)     W' = W + B A
        update() -> dW          W' = W + dW
        weight(W) -> W'         any other W' [*batch, out, in]
    and, where it changes the bias, bias(b) -> b' (b is None where the host has none).
    linear(x, base, host) -> y is the fast path on a host that computes y = x W^T + b: it calls base(x) once and must agree with `weight`;
    the first two come with one.
    additive: W' - W does not depend on W, so that fast paths of several deltas can be chained; of the first two it is known.
    lasting: W' depends on W and on the tensors of `sources` alone, so that it may be kept from one pass to the next.
    dropout: on the input of A, in training only.
    """

    additive: bool = False
    lasting: bool = False
    dropout: float = 0.0
    view: Weight  # that of the site, given by `place`, unless it has chosen another

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__dict__.keys() & {"factors", "update"} and "additive" not in cls.__dict__:
            cls.additive = True

    def place(self, key: str, view: Weight) -> None:
        if "view" not in self.__dict__:
            self.view = view
        super().place(key, self.view)

    def weight(self, w: Tensor) -> Tensor:
        """The adapted dense weight [*batch, out, in]."""
        pair = self.factors()
        return w + (self.update() if pair is None else pair[1] @ pair[0])

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The adapted bias [out]."""
        raise NotImplementedError

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        """y [..., out] from x [..., in], in the place of base(x), which is fresh and may be written into."""
        pair = self.factors()
        if pair is None:
            return whole_update(x, base, host, self.update())
        return low_rank(x, base, host, *pair, 1.0, self.dropout if self.training else 0.0)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(down [*batch, r, in], up [*batch, out, r]) of a delta with W' = W + up down. One that `overrides` it always has them
        and changes nothing else; one that does not may still have them for what the context says now.
        """
        return None

    def update(self) -> Tensor:
        """dW [*batch, out, in]."""
        raise NotImplementedError

    def work(self) -> int:
        """Multiply-adds of `linear` beyond the host's product, for one position; what it does once a call included.

        Where that is dear, inference keeps W' instead. Thin updates say 0: many adapters of them fit beside one backbone.
        """
        return math.prod(self.view.shape) if self._has("update") else 0

    def _has(self, function: str) -> bool:
        return getattr(type(self), function) is not getattr(WeightDelta, function)

    def sources(self) -> Iterator[nn.Module]:
        """The modules whose tensors make W': itself, and what it shares with other sites."""
        yield self

    def diagonal(self) -> Diagonal | None:
        """(before [in], after [out], shift [out]), each None for nothing, where y' = after * base(before * x) + shift for the host's
        y = base(x), channel by channel, otherwise None.
        """
        return None

    def names(self) -> tuple[str, ...]:
        """Names of the host's parameters that this delta re-parameterises."""
        changed = [self.view.name] if self.overrides("weight") else []
        if self.overrides("bias") and self.view.bias:
            changed.append(self.view.bias)
        return tuple(changed)

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        """The host's parameter `name` in its stored layout, in numbers, adapted."""
        if name == self.view.name and stored is not None:
            stored = self.view.decoded(stored)
            if stored.shape != self.view.stored:
                raise GraftError(
                    f"the weight {name!r} of {self.key}",
                    f"{list(stored.shape)} now, {list(self.view.stored)} when it was grafted",
                    "change the size (resize_token_embeddings) before grafting, or remove the adapter first",
                )
            return self.view.restore(stored, self.weight(self.view.dense(stored)))
        return self.view.restore_bias(stored, self.bias(self.view.bias_of(stored)))

    def overrides(self, function: str) -> bool:
        if function in ("weight", "linear"):
            return self._has(function) or self._has("factors") or self._has("update")
        if function == "factors":
            return self._has("factors") and not self.overrides("bias")
        return self._has(function) if function in ("bias", "diagonal", "update") else super().overrides(function)
