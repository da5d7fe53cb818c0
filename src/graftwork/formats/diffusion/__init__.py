"""LoRA in one file of tensors, as diffusion models have it: kohya's and diffusers' names."""

from __future__ import annotations

from .diffusers import Diffusers
from .kohya import Kohya

__all__ = ["Diffusers", "Kohya"]
