"""One adapted module of a file: LoRA (down [r, in, *kernel], up [out, r, 1...], alpha), or DoRA with its magnitudes.

W' = W + (alpha / r) up down. Of a convolution, down is one of the same kernel and up is one of 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.weight.dora import DoRA
from ...methods.weight.lora import LoRA
from ...sites.body import Body
from ..pieces import Piece, Slot, grouped, held, one, spread
from ..places import whole_site

Keys = Mapping[str, str]  # part of a module (down, up, mid, magnitude, shift, alpha) -> its key in the file
Module = tuple[str, LoRA | DoRA, Keys]  # path, method, keys
# the shape of DoRA's magnitudes, from out and a 1 for each axis of a kernel
Magnitudes = Callable[[int, tuple[int, ...]], tuple[int, ...]]
AXES = 5  # of the weight of a three-dimensional convolution


def method_of(keys: Keys, tensors: Mapping[str, Tensor], alpha: float | None, rslora: bool = False) -> LoRA | DoRA:
    """The method that these keys say. alpha: None is the rank, so that the scale is 1."""
    down, up = (tensors.get(keys.get(part, "")) for part in ("down", "up"))
    r = down.shape[0] if down is not None and down.dim() else up.shape[1] if up is not None and up.dim() > 1 else 1
    alpha = float(r) if alpha is None else alpha
    if "magnitude" in keys:
        return DoRA(r=r, alpha=alpha * r**0.5 if rslora else alpha)
    return LoRA(r=r, alpha=alpha, rslora=rslora, bias="shift" in keys)


def slots(site: Site, method: LoRA | DoRA, keys: Keys, magnitudes: Magnitudes, asked: str) -> list[Slot]:
    """Which tensor of the module is which key."""
    w, kernel = site.weight, _kernel(site, asked)
    deep = (method.r, w.d_in // math.prod(kernel), *kernel)
    ones = tuple(1 for _ in kernel)
    made = [
        _shaped(keys["down"], site, "down", (method.r, w.d_in), deep),
        _shaped(keys["up"], site, "up", (w.d_out, method.r), (w.d_out, method.r, *ones)),
    ]
    if isinstance(method, DoRA):
        made.append(_shaped(keys["magnitude"], site, "magnitude", (w.d_out,), magnitudes(w.d_out, ones)))
    elif method.bias:
        made.append(_shaped(keys["shift"], site, "shift", (w.d_out,), (w.d_out,)))
    return made


def _shaped(key: str, site: Site, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> Slot:
    """Two layouts of the same numbers; a file may leave out axes of length 1 at the end, or have more of them."""

    def read(t: Tensor) -> Tensor:
        if [*t.shape, *[1] * (AXES - t.dim())] != [*there, *[1] * (AXES - len(there))]:
            raise ValueError(f"its shape is {list(t.shape)}, expected {list(there)}")
        return t.reshape(here)

    return one(key, site, name, read, lambda t: t.reshape(there))


def _kernel(site: Site, asked: str) -> tuple[int, ...]:
    """The kernel of a convolution, () for a linear layer. GraftError for a host on which the format says something else."""
    module, w = site.module, site.weight
    conv = isinstance(module, nn.modules.conv._ConvNd)
    if w.lookup or w.batch or not (w.linear or conv):
        found = f"{type(module).__name__} at {site.path!r}"
        raise GraftError(asked, found, "these files hold LoRA of linear layers and convolutions only")
    if conv and (module.groups > 1 or module.transposed):  # type: ignore[union-attr,operator]
        found = f"{site.path!r} is a convolution in {module.groups} groups, or transposed"
        raise GraftError(asked, found, "the format's update of such a module is no change of its weight")
    return tuple(module.kernel_size) if conv else ()  # type: ignore[arg-type]


def read_alphas(found: Mapping[str, Keys], tensors: dict[str, Tensor], asked: str) -> dict[str, float | None]:
    """The alpha of each module, None where the file has none or 0. Takes them out of the tensors."""
    out: dict[str, float | None] = {}
    for name, keys in found.items():
        value = tensors.pop(keys["alpha"]) if "alpha" in keys else None
        if value is not None and (value.numel() != 1 or value.is_complex()):
            found_there = f"{value.dtype} {list(value.shape)}"
            raise GraftError(f"{asked}: {keys['alpha']!r}", found_there, "expected one real number")
        out[name] = float(value) or None if value is not None else None
    return out


def without_mid(found: Mapping[str, Keys], tensors: dict[str, Tensor], asked: str) -> None:
    """Replace the three factors of a convolution, up mid down, by two: down' = mid down [r, in, *kernel], the same update."""
    for keys in found.values():
        mid, down = tensors.get(keys.get("mid", "")), tensors.get(keys["down"])
        if mid is None or down is None:
            continue
        fits = mid.dim() > 2 and down.dim() > 1 and mid.shape[1] == down.shape[0] and down.shape[2:].numel() == 1
        if not (fits and mid.dtype == down.dtype and mid.is_floating_point()):
            what = f"{mid.dtype} {list(mid.shape)} beside {down.dtype} {list(down.shape)}"
            raise GraftError(f"{asked}: {keys['mid']!r}", what, "expected [r, r, *kernel] beside [r, in, 1, 1]")
        tensors[keys["down"]] = torch.einsum("ab...,bi->ai...", mid, down.flatten(1))
        del tensors[keys["mid"]]


def pieces(found: Iterable[Module], magnitudes: Magnitudes, body: Body, asked: str) -> list[Piece]:
    """What the file says of each module."""
    made = [(whole_site(body, path, asked), method, keys) for path, method, keys in found]
    return grouped((method, slots(site, method, keys, magnitudes, asked)) for site, method, keys in made)


def modules_of(adapter: Adapter, keys: Callable[[str, LoRA | DoRA], Keys], asked: str) -> list[Module]:
    """The modules that a file of this adapter is made of. keys: of a path with its method.

    GraftError where the adapter is more than one LoRA or DoRA at a module.
    """
    do = "write it with as_lora=True (--as-lora), or keep it in graftwork's own format"
    out: dict[str, Module] = {}
    taken: dict[str, str] = {}
    for method, by_spot in held(adapter):
        for path, param in (spot for spot in by_spot if spot is not None):
            if not isinstance(method, LoRA | DoRA):
                raise GraftError(asked, f"{method} at {path!r}: these files hold LoRA and DoRA only", do)
            if param != "weight" or path in out:
                what = "a second method there" if path in out else "no module's weight"
                raise GraftError(asked, f"{method} at {path}.{param}: {what}", do)
            out[path] = path, method, keys(path, method)
            other = taken.setdefault(out[path][2]["down"], path)
            if other != path:
                raise GraftError(
                    asked, f"{other!r} and {path!r} have the same name in such a file", "use another format"
                )
    return list(out.values())


def tensors_of(
    adapter: Adapter, modules: Iterable[Module], magnitudes: Magnitudes, body: Body, asked: str
) -> dict[str, Tensor]:
    """The tensors of a file, without alphas."""
    return spread(pieces(modules, magnitudes, body, asked), held(adapter), asked)


def alpha_of(method: Method) -> float:
    """alpha of a scale alpha / r."""
    assert isinstance(method, LoRA | DoRA)
    return method.alpha if isinstance(method, LoRA) and not method.rslora else method.scale * method.r
