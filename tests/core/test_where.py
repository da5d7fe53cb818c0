"""Choosing sites by text, by function and by layer; one clear error per mistake."""

from __future__ import annotations

import pytest
import torch
from anatomy_models import meta
from torch import nn

from graftwork.core.errors import GraftError
from graftwork.core.site import Site
from graftwork.sites.anatomy import anatomy
from graftwork.sites.where import select


def chosen(name: str, at: str, layers: str | None = None) -> list[str]:
    return [site.path for site in select(anatomy(meta(name)), at, layers)]


def test_roles_and_lists() -> None:
    assert chosen("llama", "q, v") == [f"layers.{i}.self_attn.{p}_proj" for p in "qv" for i in range(2)]
    assert chosen("llama", "q,q") == chosen("llama", "q")


def test_norms_of_a_sublayer() -> None:
    assert chosen("bert", "mlp.norm", "1") == ["encoder.layer.1.output.LayerNorm"]
    assert chosen("bert", "attn.norm") == [f"encoder.layer.{i}.attention.output.LayerNorm" for i in range(2)]
    assert chosen("t5", "decoder.mlp.norm") == [f"decoder.block.{i}.layer.2.layer_norm" for i in range(2)]


def test_alternatives_take_the_first_that_finds_all() -> None:
    assert chosen("llama", "expert.up|up,gate|linear") == chosen("llama", "up,gate")
    assert chosen("llama", "up,router|q") == chosen("llama", "q")


def test_towers_and_cross() -> None:
    assert chosen("t5", "decoder.cross.v") == [f"decoder.block.{i}.layer.1.EncDecAttention.v" for i in range(2)]
    assert chosen("t5", "self.q") == [p for p in chosen("t5", "q") if "SelfAttention" in p]
    assert chosen("clip", "vision.mlp") == [f"vision_model.encoder.layers.{i}.mlp" for i in range(12)]


def test_layers_count_in_each_tower() -> None:
    assert chosen("bart", "mlp", "-1") == ["encoder.layers.1", "decoder.layers.2"]
    assert chosen("bart", "decoder.mlp", "0-1") == ["decoder.layers.0", "decoder.layers.1"]
    assert chosen("bart", "decoder.mlp", "0, -2--1") == [f"decoder.layers.{i}" for i in range(3)]
    assert chosen("clip", "text.q", "-2--1") == [f"text_model.encoder.layers.{i}.self_attn.q_proj" for i in (10, 11)]


def test_regular_expressions() -> None:
    assert chosen("bert", r"/layer\.1\..*dense$/") == [
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.intermediate.dense",
    ]
    assert chosen("bert", "/query|value/, o") == [*chosen("bert", "/query|value/"), *chosen("bert", "o")]
    assert chosen("mixtral", "/experts.down_proj$/") == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    roles = [site.role for site in select(anatomy(meta("bert")), "/attention/")]
    assert "attn" not in roles and roles.count("q") == 2, "modules around weights are left out"
    assert [site.role for site in select(anatomy(meta("bert")), "/attention$/")] == ["attn", "attn"]


def test_a_function() -> None:
    def wide(site: Site) -> bool:
        return site.role == "linear" and site.weight.d_out == 3072

    assert [s.path for s in select(anatomy(meta("bert")), wide)] == [
        f"encoder.layer.{i}.intermediate.dense" for i in range(2)
    ]
    with pytest.raises(GraftError, match="none of them was accepted"):
        select(anatomy(meta("bert")), lambda site: False)


def test_packed_rows_or_the_whole() -> None:
    assert [s.rows for s in select(anatomy(meta("gpt2")), "q,v", "0")] == [(0, 768), (1536, 2304)]
    whole = select(anatomy(meta("gpt_neox")), "q,k,v")
    assert [(s.role, s.path, s.rows) for s in whole] == [("qkv", "layers.0.attention.query_key_value", None)]


def test_low_rank_pairs_come_once() -> None:
    found = chosen("deepseek_v3", "k,v", "0")
    assert found == ["layers.0.self_attn.kv_a_proj_with_mqa", "layers.0.self_attn.kv_b_proj"]


@pytest.mark.parametrize(
    ("name", "at", "layers", "words"),
    [
        ("llama", "quary", None, ["no role 'quary'", "choose among the roles"]),
        ("llama", "q_prj", None, ["no role 'q_prj'", "/q_proj/"]),
        ("llama", "q,lin", None, ["no role 'lin'"]),
        ("llama", "q,", None, ["an empty name"]),
        ("llama", "conv", None, ["this model has no 'conv'", "linear"]),
        ("llama", "cross.q", None, ["none; this model has q"]),
        ("llama", "decoder.q", None, ["no tower 'decoder'", "one tower only"]),
        ("t5", "encodr.q", None, ["no tower 'encodr'", "did you mean 'encoder'", "encoder, decoder"]),
        ("llama", "mlp.q", None, ["no tower 'mlp'"]),
        ("t5", "encoder.cross.q", None, ["decoder.cross.q", "encoder.q"]),
        ("llama", "/nothing/", None, ["no module path matches"]),
        ("llama", "/q_proj", None, ["not closed"]),
        ("llama", "/q(/", None, ["not a regular expression"]),
        ("llama", "q", "two", ["neither a number nor a range"]),
        ("llama", "q", "7", ["2 layers", "none of them in 7"]),
        ("llama", "q", "0,5-9", ["none of them in 5-9"]),
        ("llama", "embed", "0", ["stand in no layer"]),
    ],
)
def test_mistakes(name: str, at: str, layers: str | None, words: list[str]) -> None:
    with pytest.raises(GraftError) as error:
        select(anatomy(meta(name)), at, layers)
    for word in words:
        assert word in str(error.value)


def test_a_model_without_blocks() -> None:
    with torch.device("meta"):
        found = anatomy(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert [s.path for s in select(found, "q,v|linear")] == ["0"]
    assert [s.path for s in select(found, "head")] == ["2"]
