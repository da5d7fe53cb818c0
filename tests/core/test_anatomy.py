"""The roles of known architectures, site by site, and the structural cases that names alone do not settle."""

from __future__ import annotations

import pytest
import torch
from anatomy_models import meta
from torch import nn

from graftwork.core.site import Site
from graftwork.sites.anatomy import Anatomy, anatomy


def paths(sites: list[Site]) -> list[str]:
    return [site.path for site in sites]


def only(found: Anatomy, role: str, path: str) -> Site:
    (site,) = [site for site in found.of(role) if site.path == path]
    return site


def test_bert_layer() -> None:
    found = anatomy(meta("bert"))
    layer = "encoder.layer.1"
    expected = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attn": "attention",
    }
    for role, name in expected.items():
        assert paths(found.of(role)) == [f"encoder.layer.{i}.{name}" for i in range(2)]
    assert paths(found.of("mlp")) == paths(found.of("block")) == ["encoder.layer.0", "encoder.layer.1"]
    attn, mlp = only(found, "attn", f"{layer}.attention"), only(found, "mlp", layer)
    assert (attn.entry, attn.exit) == (f"{layer}.attention.self.query", f"{layer}.attention.output.dropout")
    assert (mlp.entry, mlp.exit) == (f"{layer}.intermediate.dense", f"{layer}.output.dropout")
    assert (attn.norm, mlp.norm) == (f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
    assert (attn.layer, attn.depth, attn.tower, attn.heads, attn.width, attn.cross) == (1, 2, "", 12, 768, False)
    assert paths(found.of("pooler")) == ["pooler.dense"]
    assert len(found.of("linear")) == 12 and len(found.of("norm")) == 5 and len(found.of("embed")) == 3


def test_bert_base_has_the_biases_that_bitfit_counts() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    biases = [site.module.bias for site in anatomy(model).of("any") if getattr(site.module, "bias", None) is not None]
    assert sum(bias.numel() for bias in biases) == 12 * 8448 + 768 == 102_144


def test_heads_stay_out() -> None:
    found = anatomy(meta("bert", "AutoModelForSequenceClassification"))
    assert paths(found.of("head")) == ["classifier"]
    assert paths(found.of("pooler")) == ["bert.pooler.dense"]
    assert not {"classifier", "bert.pooler.dense"} & {s.path for s in found.sites if s.role not in ("head", "pooler")}
    masked = anatomy(meta("bert", "AutoModelForMaskedLM"))
    assert all(path.startswith("cls.predictions") for path in paths(masked.of("lm_head")))
    assert "cls.predictions.transform.dense" in paths(masked.of("lm_head")) and not masked.of("head")
    assert paths(anatomy(meta("llama", "AutoModelForCausalLM")).of("lm_head")) == ["lm_head"]


def test_llama_grouped_queries() -> None:
    found = anatomy(meta("llama"))
    layer = "layers.0"
    q, k = only(found, "q", f"{layer}.self_attn.q_proj"), only(found, "k", f"{layer}.self_attn.k_proj")
    assert (q.heads, q.weight.d_out, k.heads, k.weight.d_out) == (32, 4096, 8, 1024)
    attn, mlp = only(found, "attn", f"{layer}.self_attn"), only(found, "mlp", f"{layer}.mlp")
    assert (attn.entry, attn.exit) == (f"{layer}.self_attn.q_proj", f"{layer}.self_attn.o_proj")
    assert (attn.norm, mlp.norm) == (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    assert paths(found.of("gate"))[0] == f"{layer}.mlp.gate_proj" and paths(found.of("up"))[0] == f"{layer}.mlp.up_proj"
    assert mlp.exit == f"{layer}.mlp.down_proj" and len(found.of("linear")) == 14


@pytest.mark.parametrize(
    ("name", "path", "rows"),
    [
        ("gpt2", "h.0.attn.c_attn", [(0, 768), (768, 1536), (1536, 2304)]),
        ("gpt_bigcode", "h.0.attn.c_attn", [(0, 768), (768, 832), (832, 896)]),
        ("phi3", "layers.0.self_attn.qkv_proj", [(0, 3072), (3072, 3840), (3840, 4608)]),
        ("gpt_neox", "layers.0.attention.query_key_value", None),
        ("codegen", "h.0.attn.qkv_proj", None),
    ],
)
def test_packed_projections(name: str, path: str, rows: list[tuple[int, int]] | None) -> None:
    """Blocks are cut into rows; what is laid out per head stays whole."""
    found = anatomy(meta(name))
    assert path in paths(found.of("qkv"))
    sliced = [[s.rows for s in found.of(role) if s.path == path] for role in "qkv"]
    assert sliced == ([[r] for r in rows] if rows else [[], [], []])
    assert paths(found.of("linear")).count(path) == 1


def test_gpt2_leaves_through_the_residual_dropout() -> None:
    attn = anatomy(meta("gpt2")).of("attn")[0]
    assert (attn.entry, attn.exit, attn.norm) == ("h.0.attn.c_attn", "h.0.attn.resid_dropout", "h.0.ln_1")
    assert attn.heads == 12


def test_t5_sides_and_cross() -> None:
    found = anatomy(meta("t5"))
    assert found.towers == ["encoder", "decoder"]
    cross = [site for site in found.of("q") if site.cross]
    assert paths(cross) == [f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in range(2)]
    assert all(site.tower == "decoder" for site in cross) and len(found.of("q")) == 6
    mlp = only(found, "mlp", "decoder.block.1.layer.2.DenseReluDense")
    assert (mlp.entry, mlp.exit) == (mlp.path + ".wi", mlp.path + ".wo")
    assert mlp.norm == "decoder.block.1.layer.2.layer_norm"
    assert not any("relative_attention_bias" in path for path in paths(found.of("embed")))


@pytest.mark.parametrize(("name", "encoder", "decoder"), [("bart", 2, 3), ("whisper", 2, 2)])
def test_sequence_to_sequence(name: str, encoder: int, decoder: int) -> None:
    found = anatomy(meta(name))
    blocks = [(site.tower, site.depth) for site in found.of("block")]
    assert blocks == [("encoder", encoder)] * encoder + [("decoder", decoder)] * decoder
    crossed = [site for site in found.of("attn") if site.cross]
    assert paths(crossed) == [f"decoder.layers.{i}.encoder_attn" for i in range(decoder)]
    assert crossed[0].norm == "decoder.layers.0.encoder_attn_layer_norm"
    assert found.of("mlp")[0].norm == "encoder.layers.0.final_layer_norm"
    assert (found.of("mlp")[0].entry, found.of("mlp")[0].exit) == ("encoder.layers.0.fc1", "encoder.layers.0.fc2")


def test_vision_and_text_towers() -> None:
    vit, clip = anatomy(meta("vit")), anatomy(meta("clip"))
    assert paths(vit.of("embed")) == ["embeddings.patch_embeddings.projection"] and vit.towers == []
    assert vit.of("attn")[0].norm == "layers.0.layernorm_before" and vit.of("mlp")[0].norm == "layers.0.layernorm_after"
    assert clip.towers == ["text", "vision"]
    assert {(site.tower, site.width) for site in clip.of("mlp")} == {("text", 512), ("vision", 768)}
    assert all(path.startswith("vision_model.") for path in paths([s for s in clip.of("q") if s.tower == "vision"]))


def test_stages_are_one_tower() -> None:
    found = anatomy(meta("swin"))
    assert [site.layer for site in found.of("block")] == list(range(12)) and found.of("block")[0].depth == 12
    assert {site.heads for site in found.of("q")} == {3, 6, 12, 24}
    assert {site.width for site in found.of("mlp")} == {96, 192, 384, 768}


def test_shared_layers_are_one_block() -> None:
    found = anatomy(meta("albert"))
    assert paths(found.of("block")) == ["encoder.albert_layer_groups.0.albert_layers.0"]
    assert (found.of("up")[0].path.rpartition(".")[2], found.of("down")[0].path.rpartition(".")[2]) == (
        "ffn",
        "ffn_output",
    )
    assert paths(found.of("pooler")) == ["pooler"]


def test_convolutions() -> None:
    resnet, convnext = anatomy(meta("resnet")), anatomy(meta("convnext"))
    assert not resnet.of("linear") and len(resnet.of("block")) == 16
    assert len(resnet.of("conv")) == sum(isinstance(m, nn.Conv2d) for m in meta("resnet").modules()) - 1  # but the stem
    assert len(convnext.of("block")) == 18 and len(convnext.of("linear")) == 36 and len(convnext.of("conv")) == 18


def test_experts_as_parameters() -> None:
    found = anatomy(meta("mixtral"))
    up, down = found.of("expert.gate_up")[0], found.of("expert.down")[0]
    assert (up.path, up.param, up.transposed, up.weight.shape) == (
        "layers.0.mlp.experts",
        "gate_up_proj",
        False,
        (8, 28672, 4096),
    )
    assert (down.param, down.weight.shape) == ("down_proj", (8, 4096, 14336))
    assert paths(found.of("router")) == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    mlp = found.of("mlp")[0]
    assert mlp.path == mlp.entry == mlp.exit == "layers.0.mlp" and mlp.width == 4096
    assert mlp.norm == "layers.0.post_attention_layernorm"
    assert len(found.of("linear")) == 8, "experts and routers are not among the plain linear layers"


def test_experts_stored_in_out() -> None:
    found = anatomy(meta("gpt_oss"))
    up, down = found.of("expert.gate_up")[0], found.of("expert.down")[0]
    assert up.transposed and down.transposed
    assert up.weight.shape == (up.module.gate_up_proj.shape[0], up.module.gate_up_proj.shape[2], 2880)


def test_experts_as_a_list() -> None:
    found = anatomy(meta("nllb-moe"))
    assert len(found.of("expert.up")) == len(found.of("expert.down")) == 6
    assert {site.tower for site in found.of("expert.up")} == {"encoder", "decoder"}
    assert len(found.of("mlp")) == 4 and len(found.of("up")) == 2


def test_low_rank_pairs_answer_to_k_and_v() -> None:
    found = anatomy(meta("deepseek_v3"))
    names = {path.rpartition(".")[2] for path in paths(found.of("k"))}
    assert names == {"kv_a_proj_with_mqa", "kv_b_proj"} and paths(found.of("k")) == paths(found.of("v"))
    assert paths(found.of("q"))[:2] == ["layers.0.self_attn.q_a_proj", "layers.0.self_attn.q_b_proj"]
    assert found.of("attn")[0].exit == "layers.0.self_attn.o_proj"
    assert "layers.3.mlp.shared_experts.up_proj" in paths(found.of("up"))
    assert [site.path for site in found.of("mlp")] == [f"layers.{i}.mlp" for i in range(4)]


def test_two_attentions_in_one_block() -> None:
    found = anatomy(meta("longcat_flash"))
    assert paths(found.of("block")) == ["layers.0"]
    assert paths(found.of("attn")) == ["layers.0.self_attn.0", "layers.0.self_attn.1"]


def test_a_position_bias_is_no_feed_forward() -> None:
    found = anatomy(meta("swinv2"))
    assert not any("position_bias" in site.path for role in ("up", "down", "mlp") for site in found.of(role))
    assert len(found.of("mlp")) == 12


def test_a_pooling_head_is_a_pooler() -> None:
    found = anatomy(meta("siglip_vision_model"))
    assert found.of("pooler") and not any("head" in s.path.split(".") for s in found.sites if s.role != "pooler")


def test_lists_of_bare_cross_attentions() -> None:
    crossed = [site for site in anatomy(meta("blt")).of("attn") if "cross_attn_layers" in site.path]
    assert crossed and all(site.cross for site in crossed)


def test_torch_encoder_and_decoder() -> None:
    with torch.device("meta"):
        model = nn.Transformer(32, 4, 2, 3, 64, batch_first=True)
    found = anatomy(model)
    assert found.towers == ["encoder", "decoder"] and len(found.of("block")) == 5
    attn = only(found, "attn", "decoder.layers.0.multihead_attn")
    assert attn.cross and attn.entry == attn.exit == attn.path and attn.norm == "decoder.layers.0.norm2"
    assert attn.heads == 4 and attn.width == 32
    values = [site for site in found.of("v") if site.path == "encoder.layers.0.self_attn"]
    assert [(site.param, site.rows) for site in values] == [("in_proj_weight", (64, 96))]
    assert only(found, "mlp", "decoder.layers.2").norm == "decoder.layers.2.norm3"
    assert only(found, "mlp", "encoder.layers.1").norm == "encoder.layers.1.norm2"
    linear = [(site.path, site.param) for site in found.of("linear") if site.path.startswith("encoder.layers.0")]
    assert sorted(linear) == [
        ("encoder.layers.0.linear1", "weight"),
        ("encoder.layers.0.linear2", "weight"),
        ("encoder.layers.0.self_attn", "in_proj_weight"),
        ("encoder.layers.0.self_attn.out_proj", "weight"),
    ]


def test_multihead_attention_with_other_keys() -> None:
    model = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    found = anatomy(model)
    assert [(s.role, s.path, s.param) for s in found.sites if s.role in "qkv"] == [
        (role, "", f"{role}_proj_weight") for role in "qkv"
    ]
    assert paths(found.of("o")) == ["out_proj"]
    assert found.of("k")[0].weight.shape == (16, 8)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)])
def test_a_single_module_is_its_own_site(module: nn.Module) -> None:
    role = {nn.Linear: "linear", nn.Conv2d: "conv", nn.Embedding: "embed"}[type(module)]
    assert paths(anatomy(module).of(role)) == [""] and not anatomy(module).of("head")


def test_plain_sequential() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    found = anatomy(model)
    assert [(s.role, s.path) for s in found.sites if s.role in ("conv", "linear", "head", "norm", "block")] == [
        ("conv", "0"),
        ("linear", "3"),
        ("norm", "1"),
        ("head", "5"),
    ]
    assert paths(found.of("any")) == ["0", "1", "3"]


def test_keys_are_unique_and_rows_complete() -> None:
    for name in ("bert", "gpt2", "t5", "mixtral", "clip"):
        found = anatomy(meta(name))
        assert len({site.key for site in found.sites}) == len(found.sites)
        assert sum(row["sites"] for row in found.rows()) == len(found.sites)
        modules = dict(meta(name).named_modules())
        assert all(modules[site.path] is site.module for site in found.sites)
        assert all(modules[p] is not None for site in found.sites for p in (site.entry, site.exit, site.norm) if p)
