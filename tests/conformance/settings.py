"""The one table of the suite: with which settings each method is tried, and what is expected of it.

Every registered method is in the suite. One without a row here is tried with its defaults, wherever it can sit.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import graftwork.combinators
import graftwork.methods  # noqa: F401  (both register what they hold)
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.graft import graft
from graftwork.core.method import REGISTRY, Method

from .hosts import HOSTS, Host, fresh

NOT_ACTIVATIONS = "packed_qkv multihead multihead_whole experts"  # parts of a module have no output of their own
LAYERS = f"linear_square linear_wide linear_read conv1d conv2d conv2d_reflect embedding {NOT_ACTIVATIONS}"
NOT_ROWS = "conv2d conv2d_reflect packed_qkv multihead multihead_whole experts"
NOT_ATTENTION = LAYERS.replace("multihead ", "")
MODELS = "encoder bert llama t5 gpt2 vit"
PRE_NORM = "llama t5 gpt2 vit"
NOT_PRODUCTS = "conv2d conv2d_reflect embedding multihead multihead_whole experts encoder"  # read, or no y = x W^T
BODY = "linear, norm | linear | conv"  # without embeddings, whose number of rows may change
EXPERTS = ("gate_up_proj", "down_proj")  # those that no token of the small batch chose


@dataclass(frozen=True)
class Setting:
    """How one method is tried.

    options: of the constructor;  label: tells two settings of one method apart.
    identity: the grafted model computes what the backbone does (None: the method's own word);  exact: to the bit.
    merging: largest difference between merged and unmerged outputs, relative to the largest output.
    refuses: hosts on which grafting is a GraftError (None: wherever it says so).
    from_weight: its initial values come from the backbone's weights.
    hosts: only these are tried (None: all).
    lr: of plain SGD, where the loss must fall in a few steps.
    caches: generation with a key-value cache gives what it gives without one (otherwise it is refused).
    thin: parameters that may get no gradient in a small batch, by a part of their name (an expert that no token chose).
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    identity: bool | None = None
    exact: bool = True
    merging: float = 1e-5
    refuses: str | None = None
    from_weight: bool = False
    hosts: str | None = None
    thin: tuple[str, ...] = ()
    caches: bool = True
    lr: float = 0.05


SETTINGS: dict[str, list[Setting]] = {
    "lora": [
        Setting({"r": 3}, identity=True, refuses=""),
        Setting({"r": 2, "rslora": True, "alpha": 5.0, "at": "linear"}, "rslora", True, hosts="bert gpt2 encoder"),
        Setting({"r": 2, "at": "embed"}, "embed", True, hosts="gpt2 t5"),  # tied to the output layer
        Setting({"r": 2, "bias": True, "at": "linear"}, "bias", True, hosts="linear_square linear_read conv2d bert"),
    ],
    "trainable_tokens": [
        Setting({"tokens": (2, 0, *range(5, 12))}, identity=True, refuses=f"{NOT_ROWS} encoder vit", from_weight=True),
        Setting(
            {"tokens": tuple(range(5, 12)), "at": "embed, lm_head"},
            "output",
            True,
            hosts="gpt2",
            from_weight=True,
        ),
    ],
    "full": [
        Setting({"at": "norm"}, "norm", True, refuses="packed_qkv multihead", from_weight=True, thin=EXPERTS),
        Setting({"at": "linear", "only": ("bias",)}, "bias", True, hosts="linear_square gpt2 bert", from_weight=True),
        Setting({"at": "any", "layers": "-1"}, "layer", True, hosts=MODELS, from_weight=True),
    ],
    "bottleneck": [
        Setting({"d": 5}, identity=True, refuses=NOT_ACTIVATIONS),
        Setting(
            {"d": 5, "position": "parallel", "scale": 4.0, "scaling": "scalar", "init": "houlsby"},
            "parallel",
            False,
            refuses=f"conv2d conv2d_reflect embedding {NOT_ACTIVATIONS}",
        ),
        Setting({"d": 5, "position": "before", "at": "mlp", "init": "bert"}, "before", False, hosts=PRE_NORM),
        Setting(
            {"d": 5, "position": "residual", "scaling": "channel", "norm": "before"}, "residual", True, hosts=PRE_NORM
        ),
        Setting({"d": 5, "position": "sum", "at": "mlp"}, "sum", True, hosts=PRE_NORM),
        Setting({"d": 5, "position": "sum", "at": "norm", "init": "bert"}, "sum at norms", False, hosts="bert"),
    ],
    "dora": [
        Setting({"r": 3}, exact=False, from_weight=True, refuses=""),
        Setting({"r": 3, "exact": True}, "exact", exact=False, from_weight=True, hosts="linear_wide conv2d bert"),
    ],
    "vera": [Setting({"r": 8}, refuses="")],
    "qlora": [
        Setting({"r": 3, "dropout": 0.0, "block": 16, "block2": 4}, identity=False, from_weight=True, refuses=""),
        Setting(
            {"r": 3, "dropout": 0.0, "double_quant": False}, "plain constants", False, from_weight=True, hosts="llama"
        ),
    ],
    "neuroada": [
        Setting({"k": 2}, identity=True, refuses="", from_weight=True, lr=0.5),
        Setting({"k": 2, "select": "gradient"}, "gradient", True, hosts="linear_wide llama", lr=0.5),
    ],
    "lt_sft": [
        Setting({"density": 0.2, "at": BODY}, identity=True, refuses="", thin=EXPERTS, lr=0.2),
        Setting({"density": 0.2, "at": "embed"}, "embed", True, hosts="gpt2 t5"),
    ],
    "losia": [Setting({"p": 0.25, "period": 2, "together": True}, identity=True, refuses="", lr=0.5)],
    "diff_pruning": [
        # without draws: what a training pass computes is compared with another one
        Setting({"density": 0.2, "stochastic": False, "at": BODY}, identity=True, refuses="", thin=EXPERTS, lr=0.2),
        Setting({"structured": False, "stochastic": False}, "plain", True, hosts="linear_wide conv2d", lr=0.2),
    ],
    "poly": [
        # without draws: what a training pass computes is compared with another one
        Setting({"r": 2, "skills": 3, "splits": 2, "stochastic": False}, identity=True, refuses=NOT_PRODUCTS),
        Setting(
            {"r": 2, "skills": 2, "shared": True, "stochastic": False, "prior": 0.1}, "shared", True, hosts="bert t5"
        ),
        Setting({"r": 2, "skills": 2, "allocation": ("11",)}, "fixed", True, hosts="bert llama"),
    ],
    "adalora": [Setting({"init_r": 4, "target_r": 2, "every": 1}, refuses="", lr=0.5)],
    "ia3": [
        Setting(identity=True, refuses=""),
        Setting({"side": "input"}, "input", True, hosts="linear_wide conv2d bert llama"),
        Setting({"side": "output"}, "output", True, hosts="linear_wide conv2d bert llama"),
    ],
    "bitfit": [Setting(identity=True, refuses="linear_wide embedding experts llama t5")],
    "ln_tuning": [Setting(identity=True, refuses=LAYERS, from_weight=True)],
    "loreft": [Setting({"r": 2, "positions": "p2+s2"}, refuses=NOT_ACTIVATIONS)],
    "phm": [
        Setting({"d": 8}, refuses=NOT_ACTIVATIONS),
        Setting({"d": 8, "position": "sum", "at": "mlp"}, "sum", False, hosts=PRE_NORM),
    ],
    "prefix": [
        Setting({"length": 3, "mid": 8}, identity=False, refuses=NOT_ATTENTION),
        Setting({"length": 3, "reparam": "none"}, "plain", identity=False, hosts="bert llama t5"),
    ],
    "llama_adapter": [Setting({"length": 3}, identity=True, exact=False, refuses=NOT_ATTENTION)],
    "prompt": [Setting({"length": 3}, identity=False, refuses=f"{LAYERS} encoder vit")],
    "invertible": [
        Setting(identity=False, refuses=f"{LAYERS} encoder vit"),
        Setting({"coupling": "glow", "act": "tanh"}, "glow", False, hosts="bert t5 llama gpt2"),
    ],
    "ladder": [Setting({"r": 3, "drop": 0}, refuses=LAYERS)],
    "generated": [
        Setting(
            {"of": REGISTRY["bottleneck"](d=3), "task_dim": 4, "hidden": 16, "proj": 4}, False, refuses=NOT_ACTIVATIONS
        )
    ],
    "mixture": [
        # read around the module, its weight is refused with the reason: it differs from token to token
        Setting(
            {"of": REGISTRY["lora"](r=2), "experts": 3},
            hosts=f"linear_square linear_wide conv1d conv2d embedding packed_qkv multihead {MODELS}",
            refuses="conv2d embedding multihead encoder",
        ),
    ],
    "gated": [
        Setting({"of": REGISTRY["bottleneck"](d=5)}, caches=False, refuses=NOT_ACTIVATIONS),
        Setting(
            {"of": REGISTRY["bottleneck"](d=5, position="sum", at="mlp.norm", init="bert"), "tokens": "real"},
            "sum at norms",
            hosts="bert",
        ),
        # read around the module, its weight is refused with the reason: it differs from example to example
        Setting(
            {"of": REGISTRY["lora"](r=2), "init": "uniform"},
            "lora",
            caches=False,
            hosts=f"linear_square linear_wide conv1d conv2d embedding packed_qkv multihead {MODELS}",
            refuses="conv2d embedding multihead encoder",
        ),
        Setting(
            {"of": REGISTRY["prefix"](length=3, mid=8)}, "prefix", False, caches=False, hosts=f"multihead {MODELS}"
        ),
        Setting(
            {"of": REGISTRY["prefix"](length=3, reparam="mlp", mid=8)}, "mlp", False, caches=False, hosts="bert llama"
        ),
    ],
    "adapter_drop": [
        # of two layers the first has none in half of the passes
        Setting({"of": REGISTRY["bottleneck"](d=5)}, hosts=MODELS, thin=("0",)),
        Setting({"of": REGISTRY["lora"](r=2)}, "lora", hosts=MODELS, thin=("0",)),
        Setting({"of": REGISTRY["prefix"](length=2, reparam="mlp", mid=8)}, "prefix", False, hosts="bert", thin=("0",)),
    ],
    "sparse": [
        Setting({"of": REGISTRY["bottleneck"](d=6)}, refuses=NOT_ACTIVATIONS),
        Setting({"of": REGISTRY["bottleneck"](d=6, init="houlsby"), "by": "snip"}, "snip", hosts="linear_wide llama"),
    ],
}


@dataclass(frozen=True)
class Case:
    """One method, as it is set, on one host."""

    name: str
    setting: Setting
    host: Host

    @property
    def method(self) -> Method:
        made = REGISTRY[self.name](**self.setting.options)
        return made if self.host.at is None else replace(made, at=self.host.at, layers=None)

    def __str__(self) -> str:
        return f"{self.name}{'.' + self.setting.label if self.setting.label else ''}-{self.host}"


def _example() -> None:
    """A method in a user's own file is in the suite like all others."""
    path = Path(__file__).parents[2] / "examples" / "your_own_method.py"
    spec = importlib.util.spec_from_file_location("your_own_method", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _cases() -> tuple[list[Case], list[Case]]:
    """The cases that a method accepts, and those it refuses."""
    accepted, refused = [], []
    for name in sorted(REGISTRY):
        for setting in SETTINGS.get(name, [Setting()]):
            for host in HOSTS:
                if setting.hosts is not None and host.name not in setting.hosts.split():
                    continue
                case = Case(name, setting, host)
                try:
                    deltas = list(graft(fresh(host), case.method, head=False).deltas())
                except GraftError:
                    refused.append(case)
                except Exception:  # a defect: every test of this case will show it
                    accepted.append(case)
                else:
                    # a module that is never called has no activations to edit; its weight can still be read
                    if host.calls or all(isinstance(d, WeightDelta) and not d.overrides("around") for d in deltas):
                        accepted.append(case)
    return accepted, refused


if (Path(__file__).parents[2] / "examples" / "your_own_method.py").is_file():
    _example()
CASES, REFUSED = _cases()
