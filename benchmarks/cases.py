"""The methods that benchmarks/training.py measures, their twins in HF PEFT, and the ratio to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import graftwork as gw

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]

# measured without a twin, on every linear map of the blocks
PLAIN = ["abba", "kadaptation", "soka", "moka_kron", "loretta_rep", "hydra", "msplora", "asymmetry_lora", "eigenlorax"]
PLAIN += ["dylora", "urae", "pissa", "rslora", "loraplus", "lt_sft", "diff_pruning", "neuroada", "bi_lora"]


@dataclass(frozen=True)
class Case:
    """A method here, its twin there (None: the peer has none), and the ratio to reach."""

    method: Any
    peer: Callable[[str], Any] | None
    target: float


def cases(model: str) -> dict[str, Case]:
    """The methods measured. Peers are named as HF PEFT's configurations."""
    import peft

    linears = LLAMA if model == "llama" else BERT
    attention = ["q_proj", "v_proj"] if model == "llama" else ["query", "value"]
    inner = ["k_proj", "v_proj", "down_proj"] if model == "llama" else ["key", "value", "output.dense"]
    down = ["down_proj"] if model == "llama" else ["output.dense"]
    task = "CAUSAL_LM" if model == "llama" else "SEQ_CLS"
    every = "q, k, v, o, gate, up, down" if model == "llama" else "q, k, v, o, up, down"
    return {
        "lora": Case(gw.LoRA(r=8, at=every), lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=linears), 1.10),
        "lora, dropout 0.1": Case(
            gw.LoRA(r=8, dropout=0.1, at=every),
            lambda: peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=linears),
            1.16,
        ),
        "lora on q, v": Case(
            gw.LoRA(r=8, at="q, v"), lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=attention), 1.04
        ),
        "dora": Case(
            gw.DoRA(r=8, at=every),
            lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=linears),
            1.25,
        ),
        "vera": Case(gw.VeRA(r=256, at=every), lambda: peft.VeraConfig(r=256, target_modules=linears), 1.30),
        "ia3": Case(gw.IA3(), lambda: peft.IA3Config(target_modules=inner, feedforward_modules=down), 1.04),
        "bitfit": Case(gw.BitFit(at="linear", add_missing=True), None, 1.04),
        "loreft": Case(gw.LoReFT(r=4), None, 1.04),
        "prefix": Case(
            gw.Prefix(length=10), lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=10), 1.04
        ),
        "bottleneck": Case(gw.Houlsby(d=32 if model == "llama" else 24), None, 1.08),
        "lst": Case(gw.Ladder(), None, 0.75),
        # the second wave of weight methods, on every linear map of the blocks
        "ether": Case(gw.ETHER(at=every), None, 1.35),
        "ether_plus": Case(gw.ETHERPlus(at=every), None, 1.35),
        "road": Case(gw.RoAd(at=every), lambda: peft.RoadConfig(target_modules=linears), 1.35),
        "oft": Case(gw.OFT(at=every), lambda: peft.OFTConfig(target_modules=linears), 1.35),
        "boft": Case(gw.BOFT(at=every), lambda: peft.BOFTConfig(target_modules=linears), 1.35),
        "hra": Case(gw.HRA(r=8, at=every), lambda: peft.HRAConfig(r=8, target_modules=linears), 1.35),
        "loha": Case(gw.LoHa(r=8, at=every), lambda: peft.LoHaConfig(r=8, target_modules=linears), 1.35),
        "lokr": Case(gw.LoKr(r=8, at=every), lambda: peft.LoKrConfig(r=8, target_modules=linears), 1.35),
        "vblora": Case(
            gw.VBLoRA(at=every, length=64),
            lambda: peft.VBLoRAConfig(target_modules=linears, vector_length=64),
            1.35,
        ),
        "glora": Case(gw.GLoRA(at=every), lambda: peft.GloraConfig(target_modules=linears), 1.35),
        "qlora": Case(gw.QLoRA(r=8, dropout=0.0, at=every), None, 1.35),
        "losia": Case(gw.LoSiA(at=every), None, 1.35),
        "surm on q, o": Case(gw.SURM(at="q, o"), None, 1.35),  # square ones alone
    } | {name: Case(f"{name}(at={every!r})", None, 1.35) for name in PLAIN}
