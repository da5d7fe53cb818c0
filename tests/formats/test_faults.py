"""Where the peer is wrong: what it gives, what is right, and what is said here about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig
from torch import nn

import graftwork as gw

from .peers import OPEN, loaded, model, outputs, peer, written
from .test_peft import close, tensors_of


def test_the_output_projection_of_torch_attention_is_merged_twice(tmp_path: Path) -> None:
    """W + 2 s B A where W + s B A is meant. The adapter was trained so: here it computes what it computed there."""
    theirs = peer("heads", LoraConfig(r=2, lora_alpha=3, target_modules=["attn"]))
    t = tensors_of(written(theirs, tmp_path))
    with pytest.warns(UserWarning, match="twice"):
        m = loaded("heads", tmp_path)
    close(outputs(m, "heads"), outputs(theirs, "heads"))

    def formula(times: float) -> torch.Tensor:
        bare = model("heads")
        a, b = (t[f"base_model.model.attn.lora_{side}.weight"] for side in "AB")
        c, d = (t[f"base_model.model.attn.base_layer.out_proj.lora_{side}.weight"] for side in "AB")
        with torch.no_grad():
            bare.attn.in_proj_weight += 1.5 * b @ a
            bare.attn.out_proj.weight += times * 1.5 * d @ c
        return outputs(bare, "heads")

    close(outputs(theirs, "heads"), formula(2))
    assert (outputs(theirs, "heads") - formula(1)).abs().max() > 1e-3


def test_a_tied_output_layer_loses_its_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits h W'^T without the head's bias there; with it here."""
    made = model("bert_mlm")
    nn.init.normal_(made.cls.predictions.bias)
    monkeypatch.setattr("formats.peers._made", lambda name: made)
    theirs = peer("bert_mlm", TrainableTokensConfig(token_indices=[5, 9], target_modules=["word_embeddings"]))
    written(theirs, tmp_path)
    with pytest.warns(UserWarning, match="leaves out the bias"):
        m = loaded("bert_mlm", tmp_path)
    close(outputs(m, "bert_mlm") - made.cls.predictions.bias.detach(), outputs(theirs, "bert_mlm"))


class Mirrored(nn.Module):
    """A convolution that does not pad with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 3)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(pixels).relu().mean((2, 3)))


def test_the_padding_of_a_convolution_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's unmerged pass and its own merged weights differ; here it is the merged one."""
    torch.manual_seed(0)
    made = Mirrored().eval()
    monkeypatch.setattr("formats.peers._made", lambda name: made)
    theirs = peer("net", LoraConfig(r=2, target_modules=["conv"]))
    written(theirs, tmp_path)
    with pytest.warns(UserWarning, match="pads the update with zeros"):
        m = loaded("net", tmp_path)
    unmerged = outputs(theirs, "net")
    merged = outputs(theirs.merge_and_unload(), "net")
    assert (unmerged - merged).abs().max() > 1e-4
    close(outputs(m, "net"), merged)


REFUSED = {
    # the pooler reads the first row of the prompt in the place of [CLS]
    "prompt before a pooler": (
        "bert",
        PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        "pools the first row",
    ),
    # the prompt's values are added behind the output projection, without it
    "adaption prompt on packed projections": (
        "gpt2",
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
        "without projecting it",
    ),
    # layer j of the decoder gets the prefix of layer 2j mod L, as if it stood before the tokens; the rest is unused
    "prefix of an encoder-decoder": (
        "t5",
        PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        "num_transformer_submodules",
    ),
    "prompt before a decoder": (
        "t5",
        PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
        "num_transformer_submodules",
    ),
    "grouped convolution": ("grouped", LoraConfig(r=2, target_modules=["conv1"]), "groups"),
}


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.last = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv1(x).mean((2, 3)))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPEN, "grouped", Grouped)
    name, config, words = REFUSED[case]
    written(peer(name, config), tmp_path)
    with pytest.raises(gw.GraftError, match=words):
        loaded(name, tmp_path)


def test_bias_stays_trained_in_the_peers_base(tmp_path: Path) -> None:
    """bias="all" trains the backbone's own biases: switched off, they stay. Here the backbone is the backbone."""
    theirs = peer("biased", LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    m, bare = loaded("biased", written(theirs, tmp_path)), outputs(model("biased"), "biased")
    with theirs.disable_adapter(), gw.using(m, None):
        assert (outputs(theirs, "biased") - bare).abs().max() > 1e-3
        assert outputs(m, "biased").equal(bare)


def test_the_first_factors_of_an_effective_loha_get_another_gradient() -> None:
    """PEFT's own backward pass of t, w1, w2 takes the other product's core for the gradients of w1_a and w2_a."""
    from peft.tuners.loha.layer import make_weight_cp

    generator = torch.Generator().manual_seed(0)
    shapes = {"t1": (2, 2, 3, 3), "w1a": (2, 5), "w1b": (2, 4), "t2": (2, 2, 3, 3), "w2a": (2, 5), "w2b": (2, 4)}
    p = {n: torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for n, s in shapes.items()}

    def rebuilt(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ijkl,jr,ip->prkl", t, b, a)

    theirs = make_weight_cp(*p.values(), torch.tensor(1.0, dtype=torch.double))
    ours = rebuilt(p["t1"], p["w1a"], p["w1b"]) * rebuilt(p["t2"], p["w2a"], p["w2b"])
    torch.testing.assert_close(theirs, ours)
    there, here = (torch.autograd.grad(w.sum(), list(p.values())) for w in (theirs, ours))
    same = {n: torch.allclose(x, y) for n, x, y in zip(p, there, here, strict=True)}
    assert same == {"t1": True, "w1a": False, "w1b": True, "t2": True, "w2a": False, "w2b": True}
