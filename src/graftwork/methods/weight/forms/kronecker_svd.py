"""The delta of SoKA: trained terms of a Kronecker-product SVD in the place of those that the weight has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import parameter, values
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight
from graftwork.products.spectrum import Spectrum, leading

from .formed import is_thin
from .kronecker import factorized, kronecker_linear, kronecker_sum, rearranged, work_of

SAME = 2e-2  # how far the singular values of a backbone may be from those that an adapter started from, as a share of the largest


def sides(w: Weight) -> tuple[tuple[int, int], tuple[int, int]]:
    """((m1, n1), (m2, n2)), the shapes of U and V at this weight."""
    (m1, m2), (n1, n2) = factorized(w.d_out), factorized(w.d_in)
    return (m1, n1), (m2, n2)


def decomposed(site: Site, r: int | None) -> Spectrum:
    """The SVD of the site's rearranged weight [*batch, m1 n1, m2 n2]: its first r terms, or all."""
    w = rearranged(site.dense, *sides(site.weight)[0])
    return leading(w, min(w.shape[-2:]) if r is None else r)


class KroneckerSVD(WeightDelta):
    """values = s [*batch, r], left = U [*batch, r, m1, n1], right = V [*batch, r, out / m1, in / n1];  first_values, first_left,
    first_right: those that make W_pr, of which only the first is stored.
    """

    lasting = True
    values: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter
    first_values: Tensor
    first_left: Tensor
    first_right: Tensor

    def __init__(self, w: Weight, r: int, spectrum: Spectrum | None) -> None:
        super().__init__()
        self.sizes = (m1, n1), (m2, n2) = sides(w)
        for name, shape in {"values": (r,), "left": (r, m1, n1), "right": (r, m2, n2)}.items():
            first = torch.empty((*w.batch, *shape), device="meta")
            if spectrum is not None:
                t = {"values": spectrum.s, "left": spectrum.u.mT, "right": spectrum.v}[name]
                first = (t[..., :r] if name == "values" else t[..., :r, :]).reshape(first.shape)
            first = first if w.like is None else first.to(w.like.dtype)
            self.register_buffer(f"first_{name}", first.contiguous(), persistent=name == "values")
            self.register_parameter(name, parameter(tuple(first.shape), values(first), w.like))

    def _principal(self) -> tuple[Tensor, Tensor]:
        return self.first_values[..., None, None] * self.first_left, self.first_right

    def _trained(self) -> tuple[Tensor, Tensor]:
        return self.values[..., None, None] * self.left, self.right

    def update(self) -> Tensor:
        return kronecker_sum(*self._trained()) - kronecker_sum(*self._principal())  # alike to the bit at the start

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if not is_thin(self.work(), self.view.shape):
            return super().linear(x, base, host)
        y, new, old = base(x), kronecker_linear(x, *self._trained()), kronecker_linear(x, *self._principal())
        return torch.add(y, (new - old).to(y.dtype))

    def work(self) -> int:
        return 2 * work_of(*self.sizes, self.values.shape[-1])

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors. GraftError where the backbone's spectrum is not the one that they started from."""
        there, here = tensors.get("first_values"), self.first_values
        if there is not None and not here.is_meta and there.shape[:-1] == here.shape[:-1]:
            r = there.shape[-1]
            off = (there[..., : here.shape[-1]].to(here) - here[..., :r]).float().abs().amax()
            if r > here.shape[-1] or float(off) > SAME * float(here.float().amax()):
                found = f"{r} terms that begin with {there.flatten()[:3].tolist()}, here {here.flatten()[:3].tolist()}"
                do = "load the backbone that it was trained on; its weight is the first part of the adapter"
                raise GraftError(f"the singular values of {getattr(self, 'key', 'a SoKA delta')}", found, do)
            for name in ("values", "left", "right"):  # a backbone in half precision may have picked some more
                axis = here.dim() - 1
                setattr(self, f"first_{name}", getattr(self, f"first_{name}").narrow(axis, 0, r))
                own = getattr(self, name)
                setattr(self, name, nn.Parameter(own.detach().narrow(axis, 0, r), own.requires_grad))
        super().restore(tensors)
