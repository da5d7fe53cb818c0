"""Adapters of weights as plain LoRA: exact where the update is of low rank, else as near as a rank allows, and said to be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.formats import plain_lora
from graftwork.grafting.root import is_grafted
from graftwork.products.spectrum import of_matrix

from .peers import model, outputs, perturb, read_by_peer


def grafted(name: str, method: str | list[str], head: bool | None = False) -> nn.Module:
    m = model(name)
    perturb(gw.graft(m, method, "a", head=head).parameters())
    return m.eval()


def close(ours: Tensor, right: Tensor) -> None:
    assert (ours - right).abs().max() <= 1e-5 * max(1.0, right.abs().max().item())


@pytest.fixture(autouse=True)
def nothing_is_lost_silently() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as LoRA.*")
        yield


EXACT = [
    ("llama", "lora(r=4, alpha=3)"),
    ("llama", "lora(r=4, alpha=3, rslora=True)"),
    ("biased", "lora(r=3, alpha=5, bias=True)"),
    ("llama", "vera(r=6, at='q, v, down')"),
    ("llama", "adalora(init_r=4, target_r=2)"),
    ("llama", ["lora(r=2)", "vera(r=2)"]),
    ("llama", "trainable_tokens(tokens=[1, 5, 9])"),
    ("gpt2", "lora(r=3, at='q, v')"),  # slices of one packed weight: together of rank 6
    ("gpt2", "vera(r=3, at='qkv, embed')"),
    ("net", "adalora(init_r=2, target_r=2, at='conv, linear, embed')"),
    ("mixtral", "adalora(init_r=2, target_r=2, at='expert.gate_up, expert.down')"),
]


@pytest.mark.parametrize(("name", "method"), EXACT)
def test_what_is_of_low_rank_is_exact(name: str, method: str | list[str], tmp_path: Path) -> None:
    m = grafted(name, method)
    right = outputs(m, name)
    assert (right - outputs(model(name), name)).abs().max() > 1e-3
    gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True)
    assert outputs(m, name).equal(right) and list(gw.adapters(m)) == ["a"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] and not config["use_dora"]
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    close(outputs(read_by_peer(name, tmp_path / "out"), name), right)
    gw.load(again := model(name), tmp_path / "out")
    close(outputs(again, name), right)


def test_the_rank_is_found_in_the_numbers() -> None:
    needed = {
        "lora(r=4)": {4},
        "adalora(init_r=4, target_r=2)": {4},
        "vera(r=6)": {6},
        "trainable_tokens(tokens=[1, 5, 9])": {3},
    }
    for method, ranks in needed.items():
        adapter, rows = plain_lora(grafted("llama", method), "a")
        assert {row.needed for row in rows} == {row.kept for row in rows} == ranks
        assert max(row.error for row in rows) < 1e-6
        assert [str(m).split("(")[0] for m in adapter.methods] == ["lora"]


def update(m: nn.Module, path: str, name: str) -> Tensor:
    """W' - W in float64, by merging."""
    before = m.get_submodule(path)._parameters["weight"].detach().double().clone()
    gw.merge(m)
    after = m.get_submodule(path)._parameters["weight"].detach().double().clone()
    gw.unmerge(m)
    return after - before


@pytest.mark.parametrize(
    "method", ["dora(r=3, at='q, down')", "full(at='q, down')", "ia3(at='v, down')", "lora(r=9, at='q, down')"]
)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_error_is_that_of_the_best_approximation(method: str, rank: int) -> None:
    """Eckart and Young: |dW - B A|^2 is the sum of the squares of the singular values left out."""
    m = grafted("llama", method)
    adapter, rows = plain_lora(m, "a", rank=rank)
    deltas = adapter.parts[0].deltas
    for row in rows:
        dense = update(m, row.site.split(":")[0], "llama")
        s = torch.linalg.svdvals(dense)
        least = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
        d = deltas[row.site]
        lost = (dense - (d.up @ d.down).detach().double()).norm() / dense.norm()
        assert row.error == pytest.approx(least, rel=1e-3, abs=2e-6) and float(lost) == pytest.approx(
            least, rel=1e-3, abs=2e-6
        )
        assert row.kept == min(rank, row.needed) and d.down.shape[0] == max(r.kept for r in rows)


def test_energy_is_the_least_rank_that_keeps_it() -> None:
    m = grafted("llama", "full(at='q, down')")
    _, rows = plain_lora(m, "a", energy=0.9)
    for row in rows:
        s = torch.linalg.svdvals(update(m, row.site.split(":")[0], "llama")).square()
        share = s.cumsum(0) / s.sum()
        assert share[row.kept - 1] >= 0.9 > share[row.kept - 2]
        assert row.error**2 == pytest.approx(1 - float(share[row.kept - 1]), rel=1e-3)
    assert len({row.kept for row in rows}) > 1  # one rank is stored for all: the largest that is needed


def test_a_full_rank_is_exact(tmp_path: Path) -> None:
    for name, method in (("llama", "dora(r=3)"), ("bert", "ia3()"), ("llama", "full(at='q, down')")):
        m = grafted(name, method)
        gw.save(m, "a", tmp_path / f"{name}{method[:3]}", format="peft", as_lora=True, energy=1.0)
        close(outputs(read_by_peer(name, tmp_path / f"{name}{method[:3]}"), name), outputs(m, name))


def test_what_is_lost_is_warned_of(tmp_path: Path) -> None:
    m = grafted("llama", "dora(r=3)")
    rows = plain_lora(m, "a", rank=4)[1]
    worst = max(rows, key=lambda row: row.error)
    with pytest.warns(UserWarning, match="as LoRA the updates are off by") as said:
        warnings.filterwarnings("default", message=".*as LoRA.*")
        gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True, rank=4)
    text = str(said[0].message)
    assert worst.site in text and f"{worst.error:.2g}" in text
    gw.load(again := model("llama"), tmp_path / "out")
    far = (outputs(model("llama"), "llama") - outputs(m, "llama")).norm()
    assert (outputs(again, "llama") - outputs(m, "llama")).norm() < far


def test_a_head_stays_as_it_is(tmp_path: Path) -> None:
    m = grafted("bert", "vera(r=3)", head=True)
    gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    close(outputs(read_by_peer("bert", tmp_path / "out"), "bert"), outputs(m, "bert"))


def test_into_kohyas_files(tmp_path: Path) -> None:
    m = grafted("llama", "vera(r=3)")
    gw.save(m, "a", tmp_path / "a.safetensors", format="kohya", as_lora=True)
    alphas = {k: v for k, v in safetensors.torch.load_file(tmp_path / "a.safetensors").items() if k.endswith("alpha")}
    assert len(alphas) == 4 and all(float(v) == 3 for v in alphas.values())
    gw.load(again := model("llama"), tmp_path / "a.safetensors")
    close(outputs(again, "llama"), outputs(m, "llama"))


def test_an_untrained_adapter_is_an_update_of_nothing(tmp_path: Path) -> None:
    m = model("llama")
    gw.graft(m, "vera(r=3)", "a")
    rows = plain_lora(m, "a")[1]
    assert {(row.needed, row.kept, row.error) for row in rows} == {(0, 0, 0.0)}
    gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True)
    assert outputs(read_by_peer("llama", tmp_path / "out"), "llama").equal(outputs(model("llama"), "llama"))


def test_half_precision(tmp_path: Path) -> None:
    """The update is taken in float64, so that the rank is that of the method and not of the rounding."""
    m = model("llama").bfloat16()
    perturb(gw.graft(m, "vera(r=4)", "a").parameters())
    rows = plain_lora(m, "a")[1]
    assert {row.kept for row in rows} == {4} and max(row.error for row in rows) < 2**-7


# options of methods whose defaults do not fit this small model
FITTING = {
    "adapterbias": "norms=False, ",  # a norm is no matrix
    "trainable_tokens": "tokens=[1, 5, 9], ",
    "corda": "r=4, ",
    "eigenlorax": "k=8, extra=4, ",
    "kadaptation": "t=4, ",
    "bi_lora": "r=4, ",
    "dora": "r=8, ",
    "quantised": "of=lora(r=4), ",
    "qlora": "r=8, ",
    "road": "group=8, ",
    "vblora": "vectors=32, length=8, ",
}


def test_every_method_that_can_be_merged_is_lora_or_refused(tmp_path: Path) -> None:
    """Of a method that comes later, too."""
    no_matrix = {"bitfit", "ln_tuning"}
    no_linear = {"batch_norm", "series_conv", "parallel_conv", "residual_adapters", "parallel_residual_adapters"}
    at = {"ln_tuning": "norm", "trainable_tokens": "embed", "surm": "q, o"}  # surm: square ones
    for method in set(gw.methods(mergeable=True)) - no_linear:
        m = grafted("biased", f"{method}({FITTING.get(method, '')}at='{at.get(method, 'q, down')}')")
        if method in no_matrix:
            with pytest.raises(gw.GraftError, match="as LoRA"):
                plain_lora(m, "a", energy=1.0)
            continue
        gw.save(m, "a", tmp_path / method, format="peft", as_lora=True, energy=1.0)
        close(outputs(read_by_peer("biased", tmp_path / method), "biased"), outputs(m, "biased"))


def test_numbers_that_are_not_finite_and_weights_of_other_shapes(tmp_path: Path) -> None:
    m = grafted("llama", "vera(r=3)")
    next(iter(gw.adapters(m)["a"].parameters())).data.fill_(torch.nan)
    with pytest.raises(gw.GraftError, match="not finite"):
        plain_lora(m, "a")
    m = grafted("llama", "full(outputs=50, at='lm_head')")
    with pytest.raises(gw.GraftError, match="in the place of"):
        plain_lora(m, "a")


REFUSED = [
    ("llama", "bottleneck()", "bottleneck at model.layers.0.self_attn:attn changes activations"),
    ("llama", "prompt(length=3)", "prompt at model:entry changes activations"),
    ("llama", "prefix(length=3)", "changes activations"),
    ("llama", "lora(r=2) + loreft(r=2)", "loreft at"),
    ("llama", "mixture(of=lora(r=2), experts=2)", "mixture at"),
    ("biased", "bitfit(at='q')", "model.layers.0.self_attn.q_proj.bias, a bias whose weight is not adapted"),
    ("llama", "ln_tuning()", "model.layers.0.input_layernorm.weight, a vector that is adapted"),
    ("llama", "full(at='q')", "has rank 24, as LoRA larger than the weight"),
]


@pytest.mark.parametrize(("name", "method", "word"), REFUSED)
def test_what_is_no_lora_is_refused(name: str, method: str, word: str, tmp_path: Path) -> None:
    m = grafted(name, method)
    before = outputs(m, name)
    with pytest.raises(gw.GraftError) as error:
        gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True)
    assert word in str(error.value)
    assert not (tmp_path / "out").exists() and is_grafted(m) and outputs(m, name).equal(before)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    m = grafted("llama", "lora(r=2)")
    for given in (
        {"format": "peft", "rank": 2},
        {"energy": 0.5},
        {"as_lora": True},
        {"format": "peft", "as_lora": True, "resume": True},
        {"format": "peft", "as_lora": True, "rank": 0},
        {"format": "peft", "as_lora": True, "energy": 1.5},
        {"format": "nothing", "as_lora": True},
        {"format": "pyreft", "as_lora": True},
    ):
        with pytest.raises(gw.GraftError):
            gw.save(m, "a", tmp_path / "out", **given)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    gw.merge(m)
    with pytest.raises(gw.GraftError, match="unmerge"):
        gw.save(m, "a", tmp_path / "out", format="peft", as_lora=True)


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (2, 160, 200)])
@pytest.mark.parametrize("rank", [0, 3, 40, 150])
def test_a_rank_found_by_probes_is_that_of_the_whole(shape: tuple[int, ...], rank: int) -> None:
    *batch, out, into = shape
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(*batch, n, rank, generator=generator, dtype=torch.float64) for n in (out, into))
    dense = left @ right.mT
    found = of_matrix(dense)
    assert found.needed == rank
    assert (found.dense - dense).norm() <= 1e-9 * (1 + dense.norm())
    whole = torch.linalg.svdvals(dense)[..., :rank]
    assert torch.allclose(found.s[..., :rank], whole)
    noise = dense + 1e-4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    assert of_matrix(noise).needed == min(out, into)
