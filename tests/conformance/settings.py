"""The one table of the suite: with which settings each method is tried, and what is expected of it.

Every registered method is in the suite. One without a row here is tried with its defaults, wherever it can sit. Those that mix other
adapters sit where these do: `test_mixing.py` tries them over members.
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
from graftwork.core.method import REGISTRY, Method
from graftwork.grafting.graft import graft

from .hosts import HOSTS, Host, fresh

NOT_ACTIVATIONS = "packed_qkv multihead multihead_whole experts"  # parts of a module have no output of their own
LAYERS = f"linear_square linear_wide linear_read conv1d conv2d conv2d_reflect embedding {NOT_ACTIVATIONS}"
NOT_ROWS = "conv2d conv2d_reflect packed_qkv multihead multihead_whole experts"
NOT_ATTENTION = LAYERS.replace("multihead ", "")
MODELS = "encoder bert llama t5 gpt2 vit"
PRE_NORM = "llama t5 gpt2 vit"
NOT_PRODUCTS = "conv2d conv2d_reflect embedding multihead multihead_whole experts encoder"  # read, or no y = x W^T
STARTS = "linear_wide conv2d embedding packed_qkv experts bert"  # of what starts inside of the weight
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
    adds_biases: a host without a bias gets one.
    stored: the file's size in units of what is trained (2: each trained factor has a frozen one beside it, which is no other's).
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
    stored: float = 1.0
    thin: tuple[str, ...] = ()
    caches: bool = True
    adds_biases: bool = False
    lr: float = 0.05


SETTINGS: dict[str, list[Setting]] = {
    "lora": [
        Setting({"r": 3}, identity=True, refuses=""),
        Setting({"r": 2, "rslora": True, "alpha": 5.0, "at": "linear"}, "rslora", True, hosts="bert gpt2 encoder"),
        Setting({"r": 2, "at": "embed"}, "embed", True, hosts="gpt2 t5"),  # tied to the output layer
        Setting({"r": 2, "bias": True, "at": "linear"}, "bias", True, hosts="linear_square linear_read conv2d bert"),
        Setting({"r": 2, "init": "pissa"}, "pissa", exact=False, stored=2, from_weight=True, refuses=""),
        Setting(
            {"r": 2, "init": "olora", "rslora": True}, "olora", exact=False, stored=2, from_weight=True, hosts=STARTS
        ),
        Setting(
            {"r": 2, "init": "minor", "alpha": 2.0}, "minor", exact=False, stored=2, from_weight=True, hosts=STARTS
        ),
        Setting({"r": 2, "init": "pissa", "niter": 3}, "niter", exact=False, stored=2, from_weight=True, hosts=STARTS),
    ],
    "loraplus": [
        Setting({"of": REGISTRY["lora"](r=3)}, identity=True, refuses=""),
        Setting({"of": REGISTRY["dora"](r=3)}, "dora", exact=False, from_weight=True, hosts="linear_wide conv2d bert"),
    ],
    "corda": [
        # its inputs are seen where the module is called
        Setting(
            {"r": 2, "alpha": 4.0},
            exact=False,
            stored=2,
            from_weight=True,
            hosts=f"linear_square linear_wide conv1d conv2d embedding packed_qkv multihead experts {MODELS}",
            refuses="conv2d embedding multihead experts encoder",
        ),
        Setting({"r": 2, "mode": "kpm"}, "kpm", exact=False, stored=2, from_weight=True, hosts="linear_wide bert"),
    ],
    "vblora": [
        Setting({"r": 2, "vectors": 8, "length": 4}, identity=False, lr=0.2),
        Setting(
            {"r": 2, "vectors": 6, "length": 4, "topk": 3, "only_topk": False},
            "logits",
            False,
            hosts="bert llama",
            lr=1.0,
        ),
    ],
    "asymmetry_lora": [
        Setting({"r": 3}, identity=True, refuses=""),
        Setting(
            {"r": 3, "init_down": "svd"}, "svd", True, from_weight=True, stored=2, hosts="linear_wide experts bert"
        ),
        Setting({"r": 2, "train": "down", "init_down": "zero", "init_up": "rand"}, "down", True, hosts="conv2d bert"),
        Setting(
            {"r": 2, "train": "middle", "init_up": "svd"}, "middle", False, from_weight=True, stored=20, hosts="bert"
        ),
    ],
    "msplora": [
        Setting({"r": 4, "alpha": 2.0, "groups": 2, "dropout": 0.0}, identity=True),
        Setting({"ranks": (0, 2, 1), "dropout": 0.0}, "ranks", True, hosts="conv2d embedding bert"),
    ],
    "eigenlorax": [
        # the bases are stored with the coordinates
        Setting({"r": 3, "k": 2, "extra": 1}, identity=True, stored=20),
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
    "ether": [
        Setting({"blocks": 2}, identity=False, refuses=""),
        Setting({"side": "smaller"}, "smaller", False, hosts="linear_wide conv2d bert"),
    ],
    "ether_plus": [
        Setting({"blocks": 4}, identity=True, exact=False, refuses=""),
        Setting({"side": "input"}, "input", True, exact=False, hosts="linear_wide conv2d bert"),
        Setting({"side": "output"}, "output", True, exact=False, hosts="linear_wide conv1d multihead"),
    ],
    "road": [
        Setting({"group": 4}, identity=True, refuses=""),
        Setting({"group": 4, "variant": "2"}, "2", True, hosts="linear_square conv2d experts bert"),
        Setting({"group": 2, "variant": "4"}, "4", True, hosts="linear_square conv2d experts gpt2"),
    ],
    "oft": [
        Setting({"block_size": 4}, identity=True, refuses=""),
        Setting({"blocks": 2, "exact": True}, "exact", True, hosts="linear_wide conv2d embedding experts llama"),
        Setting({"block_size": 4, "share": True}, "share", True, hosts="linear_wide conv2d experts bert"),
    ],
    "boft": [
        Setting(identity=True, refuses=""),
        Setting({"block_size": 2, "factors": 2}, "factors", True, hosts="linear_wide conv1d conv2d experts llama"),
    ],
    "hra": [
        Setting({"r": 4}, identity=True, exact=False, refuses=""),
        Setting({"r": 3}, "odd", False, hosts="linear_wide conv2d embedding bert"),
        Setting({"r": 3, "gram_schmidt": True}, "gram_schmidt", False, hosts="linear_wide conv2d experts llama"),
    ],
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
    "loha": [
        Setting({"r": 2}, identity=True, refuses="", lr=0.5),
        Setting(
            {"r": 3, "effective": True, "init": "lycoris"}, "effective", True, hosts="linear_wide conv2d conv2d_reflect"
        ),
        Setting({"r": 8, "at": "linear"}, "dense", True, hosts="linear_wide conv1d bert encoder"),
    ],
    "lokr": [
        Setting({"r": 2}, identity=True, refuses="", lr=0.1),
        Setting(
            {"r": 1, "decompose_both": True, "decompose_factor": 4, "init": "lycoris"},
            "both",
            True,
            hosts="linear_wide conv1d bert",
            lr=0.1,
        ),
        Setting({"r": 1, "effective": True}, "effective", True, hosts="conv2d conv2d_reflect", lr=0.1),
    ],
    "moka_kron": [
        Setting({"r": 4}, identity=True, refuses="", lr=0.5),
        Setting({"r": 2, "fixed": True, "gate": "uniform"}, "fixed", True, hosts="linear_wide conv1d bert", lr=0.5),
        Setting({"r": 2, "shapes": ("1x4", "2x1")}, "shapes", True, hosts="linear_square llama", lr=0.5),
    ],
    "kadaptation": [
        # without dropout: what a training pass computes is compared with another one
        Setting({"t": 2, "update_dropout": 0.0, "bias": False}, identity=True, refuses="", lr=0.05),
        Setting(
            {"t": 4, "slow_rank": 2, "fast_rank": 2, "update_dropout": 0.0, "at": "linear"},
            "bias",
            True,
            hosts="linear_square conv2d bert",
        ),
    ],
    "subspace": [Setting({"k": 4}, identity=True, refuses="", lr=1.0)],
    "soka": [
        Setting({"r": 3}, identity=True, refuses="", from_weight=True),
    ],
    "abba": [
        Setting({"r1": 2, "r2": 2}, identity=True, refuses="", from_weight=True),
        Setting({"r1": 5, "r2": 6, "scale": "paper"}, "dense", True, hosts="linear_wide llama", from_weight=True),
    ],
    "dylora": [
        Setting({"r": 3}, identity=True, refuses=""),
        Setting({"r": 3, "frozen": True, "at": "linear"}, "frozen", True, hosts="linear_wide bert experts"),
    ],
    "glora": [
        Setting({"r": 2}, identity=True, refuses="embedding experts", adds_biases=True),
        Setting({"r": 2, "c": "none", "d": "none", "e": "none"}, "weights", True, refuses=""),
        Setting(
            {"a": "vector", "b": "vector", "c": "vector", "d": "constant", "e": "constant"},
            "vectors",
            True,
            hosts="linear_square linear_read conv2d packed_qkv conv1d",
        ),
        Setting({"r": 2, "a": "constant", "b": "constant", "c": "none"}, "constants", True, hosts="linear_square gpt2"),
    ],
    "loretta_rep": [
        Setting({"r": 4, "tt_rank": 3}, identity=True, refuses="", lr=0.5),
        Setting({"r": 2, "cores": 1, "init": "released"}, "one core", False, hosts="linear_wide conv2d bert"),
    ],
    "loretta_adp": [
        Setting({"bottleneck": 8, "tt_rank": 3}, identity=True, refuses=NOT_ACTIVATIONS),
        Setting({"bottleneck": 6, "init": "released"}, "released", False, hosts="linear_wide bert llama"),
    ],
    "surm": [
        Setting({"kind": "kronecker", "r": 4}, "kronecker", True, refuses="", lr=0.2),
        Setting(
            identity=True,
            label="circulant",
            hosts="linear_square linear_wide packed_qkv multihead bert llama",
            refuses="linear_wide llama",
        ),
        Setting({"kind": "toeplitz", "at": "q"}, "toeplitz", True, hosts="linear_square bert llama t5"),
        Setting({"kind": "ldr", "at": "q"}, "ldr", True, hosts="linear_square multihead bert llama gpt2"),
    ],
    "surm_adapter": [
        Setting(identity=True, refuses=NOT_ACTIVATIONS),
        Setting({"kind": "ldr"}, "ldr", True, hosts="linear_wide llama"),
        Setting({"kind": "kronecker", "r": 4}, "kronecker", True, hosts="linear_wide bert"),
    ],
    "hydra": [
        Setting(identity=True, refuses="embedding experts", adds_biases=True, lr=0.2),
        Setting({"bias": False, "r_parallel": 0, "scale": 1.0}, "sequential", True, refuses=""),
    ],
    "adalora": [Setting({"init_r": 4, "target_r": 2, "every": 1}, refuses="", lr=0.5)],
    "ia3": [
        Setting(identity=True, refuses=""),
        Setting({"side": "input"}, "input", True, hosts="linear_wide conv2d bert llama"),
        Setting({"side": "output"}, "output", True, hosts="linear_wide conv2d bert llama"),
    ],
    "bitfit": [Setting(identity=True, refuses="linear_wide embedding experts llama t5")],
    "ssf": [
        Setting(
            identity=True,
            refuses="experts",
            adds_biases=True,
            hosts=f"{LAYERS} encoder bert gpt2 vit",
        ),
        Setting({"at": "linear"}, "linear", True, adds_biases=True, hosts="llama t5"),  # norms without bias: not merged
    ],
    "token_bias": [
        Setting(identity=True, refuses="embedding experts", adds_biases=True, lr=0.2),
        Setting({"reads_from": "output", "share_alpha": True}, "output", True, adds_biases=True, hosts="conv2d bert"),
    ],
    "r_adapter": [
        Setting({"p": 0.0, "momentum": 0.5}, identity=True, refuses=""),
        Setting({"r": 3, "p": 0.0, "momentum": 0.0}, "low rank", True, hosts="linear_wide conv2d bert"),
    ],
    "ln_tuning": [Setting(identity=True, refuses=LAYERS, from_weight=True)],
    "loreft": [Setting({"r": 2, "positions": "p2+s2"}, refuses=NOT_ACTIVATIONS)],
    "adaptable_adapters": [
        # with switches, training draws: tests/systems has them
        Setting({"d": 5, "switch": False, "rational": "gelu"}, identity=False, refuses=NOT_ACTIVATIONS),
        Setting({"d": 5, "switch": False, "init": "lora"}, "lora", True, hosts="bert"),
    ],
    "vl_pet_encoder": [
        Setting(
            {"d": 6, "heads": 2, "gate_dim": 5},
            identity=False,
            refuses=f"conv2d conv2d_reflect embedding {NOT_ACTIVATIONS}",
        ),
        Setting({"d": 6, "heads": 2, "gate": "small"}, "small", False, caches=False, hosts="bert vit"),
    ],
    "conv_adapter": [
        Setting(identity=False, hosts="conv2d conv2d_reflect convnet"),
        Setting({"init": "zero_up", "position": "sequential"}, "sequential", True, hosts="conv2d"),
    ],
    # batch statistics differ from the running ones that evaluation uses, and what both modes compute is compared
    "batch_norm": [
        Setting({"statistics": "running"}, identity=True, hosts="convnet", from_weight=True, stored=2),
    ],
    "series_conv": [
        Setting(
            {"statistics": "running", "init": "zero"},
            identity=True,
            hosts="conv2d conv2d_reflect convnet",
            adds_biases=True,
            stored=1.2,
        ),
        Setting({"statistics": "running", "skip": "u"}, "u", False, hosts="convnet", adds_biases=True, stored=1.2),
    ],
    "parallel_conv": [
        Setting({"init": "zero"}, identity=True, hosts="conv2d conv2d_reflect convnet", refuses="conv2d_reflect"),
        Setting({"r": 3}, "low rank", False, hosts="conv2d convnet"),
    ],
    "phm": [
        Setting({"d": 8}, refuses=NOT_ACTIVATIONS),
        Setting({"d": 8, "position": "sum", "at": "mlp"}, "sum", False, hosts=PRE_NORM),
    ],
    "prefix": [
        Setting({"length": 3, "mid": 8}, identity=False, refuses=NOT_ATTENTION),
        Setting({"length": 3, "reparam": "flat"}, "plain", identity=False, hosts="bert llama t5"),
    ],
    "laplacian": [
        Setting({"reduction": 2, "mu0": 2.0}, identity=True, exact=False, refuses=LAYERS),
        Setting({"reduction": 2, "graph": "bipartite", "train_p": True, "pool": 2}, "bipartite", True, hosts="bert t5"),
    ],
    "kv_prompt": [Setting({"length": 3}, identity=False, refuses=NOT_ATTENTION)],
    "llama_adapter": [Setting({"length": 3}, identity=True, exact=False, refuses=NOT_ATTENTION)],
    "prompt": [Setting({"length": 3}, identity=False, refuses=f"{LAYERS} encoder vit")],
    "vpt": [
        Setting({"num_tokens": 3, "dropout": 0.0}, identity=False, refuses=f"{LAYERS} bert llama t5 gpt2"),
        Setting({"num_tokens": 3, "dropout": 0.0, "deep": False, "project": 5}, "shallow", False, hosts="encoder vit"),
    ],
    "pruned_vpt": [
        Setting(
            {"num_tokens": 3, "segments": 4, "dropout": 0.0}, identity=False, refuses=f"{LAYERS} bert llama t5 gpt2"
        ),
    ],
    "blackvip": [  # a norm over the batch is another function in training
        Setting(
            {"features": 12, "src_dim": 128, "grid": 2, "stages": 2, "encoder": "pixels", "norm": "instance"},
            identity=False,
            refuses=f"{LAYERS} encoder bert llama t5 gpt2",
        ),
    ],
    "adalink": [  # where a whole module embeds, a linear one has no weight to fold into
        Setting({"r": 3}, identity=True, hosts=f"{LAYERS} t5 vit encoder", refuses="encoder"),
        Setting({"r": 3, "act": "gelu"}, "gelu", True, hosts="linear_wide conv2d bert gpt2 llama"),
    ],
    "invertible": [
        Setting(identity=False, refuses=f"{LAYERS} encoder vit"),
        Setting({"coupling": "glow", "act": "tanh"}, "glow", False, hosts="bert t5 llama gpt2"),
    ],
    "read": [
        Setting({"d": 6}, identity=True, refuses=LAYERS),
        Setting({"d": 6, "joiner": True, "agg": "last"}, "joiner", True, hosts="bert llama", caches=False),
        Setting({"d": 6, "cell": "lstm", "start": "embedding"}, "lstm", True, hosts="bert t5"),
    ],
    "k_adapter": [
        Setting(
            {"states": "0,-1", "d": 8, "depth": 1, "heads": 2, "d_ff": 16, "init_std": 0.2},
            identity=False,
            refuses=LAYERS,
            caches=False,
        ),
    ],
    "s2a_side": [
        Setting({"r": 4}, identity=True, refuses=f"{LAYERS} llama t5 gpt2"),
        Setting({"r": 4, "pool": False, "bits": 8}, "tokens", True, hosts="llama t5 vit"),
    ],
    "ladder": [Setting({"r": 3, "drop": 0}, refuses=LAYERS)],
    "generated": [
        Setting(
            {"of": REGISTRY["bottleneck"](d=3), "task_dim": 4, "hidden": 16, "proj": 4}, False, refuses=NOT_ACTIVATIONS
        )
    ],
    "perft_e": [Setting({"r": 3}, identity=True, hosts="experts")],
    "mixture": [
        # read around the module, its weight is refused with the reason: it differs from token to token
        Setting(
            {"of": REGISTRY["lora"](r=2), "experts": 3},
            hosts=f"linear_square linear_wide conv1d conv2d embedding packed_qkv multihead {MODELS}",
            refuses="conv2d embedding multihead encoder",
        ),
        Setting(
            {"of": REGISTRY["lora"](r=2), "experts": (2, 3), "top_k": 2, "renormalise": True, "balance": 1e-3},
            "by depth",
            True,
            hosts="llama t5",
        ),
        Setting(
            {"of": REGISTRY["bottleneck"](d=4, position="parallel", at="mlp"), "router": "input", "top_k": 2},
            "input",
            hosts="t5 vit",
            thin=("experts",),
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
    "keyed": [
        Setting({"of": REGISTRY["bottleneck"](d=5)}, refuses=NOT_ACTIVATIONS),
        Setting({"of": REGISTRY["lora"](r=2)}, "lora", hosts="conv2d bert"),
    ],
    "split_merge": [
        Setting({"of": REGISTRY["bottleneck"](d=5), "copies": 2}, hosts=f"linear_square conv2d {MODELS}"),
        Setting({"of": REGISTRY["lora"](r=2), "share": "none"}, "lora", hosts="bert"),
    ],
    "coda": [
        Setting(
            {"m": 12, "eps": 1.0, "reduction": 1.5},
            identity=False,
            hosts="packed_qkv encoder bert llama vit",
            refuses="packed_qkv",
            caches=False,
            thin=("layer.1:block/weight",),  # where the first token is not among the chosen
        ),
        Setting(
            {"m": 12, "eps": 1.0, "reduction": 2.0, "attention": "k-to-k", "solver": "exact"},
            "k-to-k",
            False,
            hosts="bert gpt2",
            caches=False,
        ),
        Setting({"m": 12, "eps": 1.0, "reduction": 1.5}, "encoder", False, hosts="t5"),
    ],
    "das": [
        Setting(
            {"k": 1, "skip_width": 4, "adapter_width": 9, "turns": 2},  # at 5 each relu is shut for ViT's class token
            identity=False,
            hosts="encoder bert llama gpt2 vit",
            stored=3,
        ),
        Setting({"skip_width": 4, "adapter_width": 5, "blocks": ("1",)}, "known", False, hosts="packed_qkv llama vit"),
        Setting({"skip_width": 4, "adapter_width": 5, "blocks": ("decoder.1",)}, "tower", False, hosts="t5"),
    ],
    "dyt": [
        # without draws: what a training pass computes is compared with another one
        Setting({"d": 5, "dropout": 0.0, "stochastic": False}, identity=False, refuses=f"{LAYERS} encoder bert"),
        Setting({"d": 5, "dropout": 0.0, "stochastic": False, "keep": 0}, "all", False, hosts="vit llama"),
    ],
    "adapter_drop": [
        # of two layers the first has none in half of the passes
        Setting({"of": REGISTRY["bottleneck"](d=5)}, hosts=MODELS),
        Setting({"of": REGISTRY["lora"](r=2)}, "lora", hosts=MODELS),
        Setting({"of": REGISTRY["prefix"](length=2, reparam="mlp", mid=8)}, "prefix", False, hosts="bert"),
    ],
    "moa_hetero": [
        Setting(identity=True, hosts="llama linear_square", refuses="linear_square"),
        Setting(
            {
                "of": [REGISTRY["lora"](r=2, at="self.q, self.v"), REGISTRY["bottleneck"](d=4, at="mlp", init="bert")],
                "router": "swiglu",
                "sparse": True,
                "shifted": True,
                "max_threshold": 0.8,
            },
            "sparse",
            False,
            hosts="bert t5",
            caches=True,
        ),
    ],
    "ortho": [
        Setting({"of": REGISTRY["bottleneck"](d=5)}, refuses=NOT_ACTIVATIONS),
        Setting({"of": REGISTRY["bottleneck"](d=5, init="bert"), "mode": "joint"}, "joint", hosts="linear_wide bert"),
    ],
    "adamix": [
        # the objective has two passes, which the suite's own loop does not make
        Setting(
            {"of": REGISTRY["bottleneck"](d=5), "copies": 3, "consistency": 0.0},
            refuses=NOT_ACTIVATIONS,
        ),
        Setting(
            {"of": REGISTRY["lora"](r=2), "copies": 2, "share": "none", "consistency": 0.0},
            "lora",
            hosts="linear_wide conv2d bert",
        ),
    ],
    "quantised": [
        Setting({"of": REGISTRY["lora"](r=3)}, identity=False, refuses=""),
        Setting({"of": REGISTRY["bottleneck"](d=6), "bits": 2}, "bottleneck", False, hosts="linear_wide bert llama"),
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
    for name in sorted(name for name, made in REGISTRY.items() if not made.mixes):
        for setting in SETTINGS.get(name, [Setting()]):
            for host in HOSTS:
                if host.name not in setting.hosts.split() if setting.hosts is not None else host.asked:
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
