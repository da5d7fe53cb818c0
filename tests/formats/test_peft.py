"""HF PEFT's files: written there and read here, written here and read there, and back again, number for number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BeftConfig,
    BOFTConfig,
    GloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
)

import graftwork as gw

from .peers import config_of, inputs, loaded, model, outputs, peer, perturb, read_by_peer, written

TOKENS = [1, *inputs("llama")["input_ids"][0, :2].tolist()]
CAUSAL = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **CAUSAL)),
    "lora_all": ("llama", LoraConfig(r=3, lora_alpha=4, target_modules="all-linear", use_rslora=True, **CAUSAL)),
    "lora_regex": ("llama", LoraConfig(r=2, target_modules=r".*\.(self_attn|mlp)\.(q_proj|up_proj)")),
    "lora_patterns": (
        "llama",
        LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "lora_layers": (
        "llama",
        LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    ),
    "lora_exclude": (
        "llama",
        LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    ),
    "lora_embedding": ("llama", LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "lora_bias_all": ("biased", LoraConfig(r=2, target_modules=["q_proj"], bias="all", lora_alpha=5)),
    "lora_bias_only": ("biased", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], bias="lora_only")),
    "lora_lora_bias": ("biased", LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True, lora_alpha=5)),
    "lora_saved": ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **CAUSAL)),
    "lora_saved_block": ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])),
    "lora_tokens": ("llama", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "lora_tokens_tied": ("tied", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "lora_tokens_both": (
        "llama",
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [1]}),
    ),
    "lora_parameter": ("llama", LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])),
    "lora_conv1d": (
        "gpt2",
        LoraConfig(r=4, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True, bias="all", **CAUSAL),
    ),
    "lora_bert": (
        "bert",
        LoraConfig(r=4, target_modules=["query", "dense"], use_rslora=True, bias="lora_only", task_type="SEQ_CLS"),
    ),
    "lora_t5": ("t5", LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")),
    "lora_vit": ("vit", LoraConfig(r=4, target_modules=["q_proj", "projection"], modules_to_save=["classifier"])),
    "lora_whisper": ("whisper", LoraConfig(r=4, target_modules=["q_proj", "fc1"], lora_dropout=0.1)),
    "lora_net": ("net", LoraConfig(r=2, target_modules=["conv1", "conv2", "table", "mid"], modules_to_save=["last"])),
    "lora_experts": (
        "mixtral",
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
        ),
    ),
    "lora_experts_turned": (
        "gpt_oss",
        LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "lora_heads": ("heads", LoraConfig(r=2, target_modules=["attn", "first"])),
    "dora": ("llama", LoraConfig(r=4, target_modules="all-linear", use_dora=True, **CAUSAL)),
    "dora_rslora": ("biased", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True)),
    "dora_conv1d": ("gpt2", LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "dora_net": ("net", LoraConfig(r=2, target_modules=["conv1", "conv2", "mid"], use_dora=True)),
    "dora_embedding": ("llama", LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)),
    "adalora": (
        "llama",
        AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=30, target_modules=["q_proj", "v_proj"]),
    ),
    "adalora_conv1d": (
        "gpt2",
        AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3_outputs": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])),
    "ia3_inputs": ("biased", IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])),
    "ia3_conv1d": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "ia3_t5": ("t5", IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type="SEQ_2_SEQ_LM")),
    "ia3_net": ("net", IA3Config(target_modules=["conv1", "mid"], feedforward_modules=["mid"])),
    "vera": ("llama", VeraConfig(r=8, target_modules=["q_proj", "v_proj"])),
    "vera_drawn": (
        "llama",
        VeraConfig(r=8, target_modules=["q_proj", "v_proj"], save_projection=False, projection_prng_key=5),
    ),
    "vera_conv1d": ("gpt2", VeraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, bias="vera_only")),
    "oft": ("llama", OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "oft_bias": ("biased", OFTConfig(oft_block_size=5, target_modules=["q_proj", "up_proj"], bias="oft_only")),
    "oft_exact": ("llama", OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], use_cayley_neumann=False)),
    "oft_shared": (
        "llama",
        OFTConfig(
            oft_block_size=0, r=3, target_modules=["q_proj", "up_proj"], block_share=True, num_cayley_neumann_terms=3
        ),
    ),
    "oft_embedding": ("llama", OFTConfig(oft_block_size=4, target_modules=["embed_tokens", "v_proj"])),
    "coft": ("llama", OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"], coft=True, eps=0.5)),
    "boft": ("llama", BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "boft_number": ("biased", BOFTConfig(boft_block_size=0, boft_block_num=8, target_modules=["q_proj"], bias="all")),
    "hra": ("llama", HRAConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "hra_odd": ("biased", HRAConfig(r=3, target_modules=["q_proj", "v_proj"], init_weights=False)),
    "hra_orthonormal": ("llama", HRAConfig(r=3, apply_GS=True, target_modules=["q_proj"], init_weights=False)),
    "hra_net": ("net", HRAConfig(r=4, target_modules=["conv1", "mid"])),
    "road": ("llama", RoadConfig(group_size=8, target_modules=["q_proj", "down_proj"])),
    "road_2": ("biased", RoadConfig(variant="road_2", group_size=4, target_modules=["q_proj", "up_proj"])),
    "road_4": ("biased", RoadConfig(variant="road_4", group_size=4, target_modules=["q_proj", "v_proj"])),
    "loha": ("llama", LoHaConfig(r=4, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **CAUSAL)),
    "loha_patterns": (
        "biased",
        LoHaConfig(
            r=3,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={"q_proj": 5},
            rank_dropout=0.1,
        ),
    ),
    "loha_net": ("net", LoHaConfig(r=2, target_modules=["conv1", "conv2", "mid"], modules_to_save=["last"])),
    "loha_effective": ("net", LoHaConfig(r=2, target_modules=["conv1", "conv2"], use_effective_conv2d=True)),
    "lokr": ("llama", LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **CAUSAL)),
    "lokr_both": (
        "biased",
        LoKrConfig(
            r=1,
            target_modules=["q_proj", "up_proj"],
            decompose_both=True,
            decompose_factor=4,
            alpha_pattern={"q_proj": 3},
            module_dropout=0.1,
        ),
    ),
    "lokr_full": ("llama", LoKrConfig(r=8, alpha=20, target_modules=["v_proj", "down_proj"])),
    "lokr_net": ("net", LoKrConfig(r=1, target_modules=["conv1", "conv2", "mid"], modules_to_save=["last"])),
    "lokr_net_full": ("net", LoKrConfig(r=8, target_modules=["conv1", "conv2"])),
    "lokr_effective": (
        "net",
        LoKrConfig(r=2, target_modules=["conv1", "conv2"], use_effective_conv2d=True, decompose_factor=1),
    ),
    "glora": ("biased", GloraConfig(r=3, target_modules=["q_proj", "up_proj"], **CAUSAL)),
    "glora_unbiased": ("llama", GloraConfig(r=3, target_modules=["q_proj", "up_proj"])),
    "glora_vectors": (
        "bert",
        GloraConfig(target_modules=["query", "dense"], config_A_B="vector", config_C="vector", config_D_E="vector"),
    ),
    "glora_constants": (
        "biased",
        GloraConfig(target_modules=["v_proj"], config_A_B="constant", config_C="none", bias="glora_only"),
    ),
    "glora_bias": ("biased", GloraConfig(r=3, target_modules=["v_proj"], config_A_B="none", config_D_E="none")),
    "vblora": ("llama", VBLoRAConfig(r=2, num_vectors=9, vector_length=4, target_modules=["q_proj", "down_proj"])),
    "vblora_topk": (
        "biased",
        VBLoRAConfig(
            r=2,
            num_vectors=300,
            vector_length=6,
            topk=3,
            save_only_topk_weights=True,
            target_modules=["v_proj"],
            vblora_dropout=0.1,
        ),
    ),
    "vblora_conv1d": (
        "gpt2",
        VBLoRAConfig(r=3, num_vectors=20, vector_length=8, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    ),
    "prompt": ("llama", PromptTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prompt_gpt2": ("gpt2", PromptTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prompt_t5": (
        "t5",
        PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1),
    ),
    "p_tuning": ("llama", PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8, **CAUSAL)),
    "prefix": ("llama", PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prefix_projection": (
        "llama",
        PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8, **CAUSAL),
    ),
    "prefix_gpt2": ("gpt2", PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "prefix_bert": ("bert", PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS")),
    "prefix_mixtral": ("mixtral", PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "beft": ("biased", BeftConfig(target_modules=["v_proj", "up_proj"])),
    "beft_unbiased": ("llama", BeftConfig(target_modules=["v_proj"])),
    "adaption_prompt": ("llama", AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **CAUSAL)),
    "ln_tuning": ("llama", LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])),
    "ln_tuning_bert": ("bert", LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS")),
    "tokens": ("llama", TrainableTokensConfig(token_indices=TOKENS)),
    "tokens_tied": ("tied", TrainableTokensConfig(token_indices=TOKENS)),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By name of the case: (model's name, the peer's folder, its logits), made once."""
    made: dict[str, tuple[str, Path, torch.Tensor]] = {}

    def get(case: str) -> tuple[str, Path, torch.Tensor]:
        if case not in made:
            name, config = CASES[case]
            theirs = peer(name, config)
            made[case] = name, written(theirs, tmp_path_factory.mktemp(case)), outputs(theirs, name)
        return made[case]

    return get


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@cases
def test_theirs_computes_the_same_here(case: str, peers: Any) -> None:
    name, folder, theirs = peers(case)
    assert (theirs - outputs(model(name), name)).abs().max() > 1e-3  # the adapter does something
    close(outputs(loaded(name, folder), name), theirs)


@pytest.mark.parametrize(
    "case", ["lora_bias_all", "lora_bias_only", "lora_conv1d", "lora_saved", "lora_tokens_tied", "ln_tuning"]
)
def test_an_adapter_that_was_never_trained_is_the_backbone(case: str, tmp_path: Path) -> None:
    """What it holds beside the method equals the backbone's own numbers, and is still expected."""
    name, config = CASES[case]
    m = loaded(name, written(peer(name, config, moved=False), tmp_path / "theirs"))
    assert outputs(m, name).equal(outputs(model(name), name))
    gw.save(m, "a", tmp_path / "back", format="peft")
    close(outputs(read_by_peer(name, tmp_path / "back"), name), outputs(m, name))


@cases
def test_there_and_back_is_the_same_file(case: str, peers: Any, tmp_path: Path) -> None:
    name, folder, theirs = peers(case)
    gw.save(loaded(name, folder), "a", tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back") == config_of(folder)
    ours, before = tensors_of(tmp_path / "back"), tensors_of(folder)
    for key, value in ours.items():
        assert torch.equal(value, before[key]), key
    # what PEFT stores beside what was trained: whole embeddings, unchanged, and modules that were replaced
    assert all(".base_layer." in key or ".original_module." in key for key in before.keys() - ours.keys())
    close(outputs(read_by_peer(name, tmp_path / "back"), name), theirs)


@cases
def test_ours_computes_the_same_there(case: str, peers: Any, tmp_path: Path) -> None:
    """The config is a new one: nothing of theirs is at hand."""
    name, folder, theirs = peers(case)
    m = loaded(name, folder)
    gw.save(m, "a", tmp_path / "own")  # through our own format
    again = model(name)
    gw.load(again, tmp_path / "own", "b").metadata.clear()
    close(outputs(again, name), theirs)
    gw.save(again, "b", tmp_path / "peft", format="peft")
    assert outputs(again, name).equal(outputs(m, name))
    close(outputs(read_by_peer(name, tmp_path / "peft"), name), theirs)


MUTATED = {
    "pissa": ("llama", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", lora_alpha=5)),
    "pissa_rslora": (
        "biased",
        LoraConfig(
            r=3,
            target_modules=["q_proj", "up_proj"],
            init_lora_weights="pissa",
            use_rslora=True,
            rank_pattern={"up_proj": 2},
            alpha_pattern={"q_proj": 2},
        ),
    ),
    "pissa_conv1d": (
        "gpt2",
        LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True),
    ),
    "pissa_dora": ("llama", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa", use_dora=True)),
    "olora": ("llama", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights="olora")),
}


@pytest.mark.parametrize("case", MUTATED)
def test_the_backbone_need_not_change(case: str, tmp_path: Path) -> None:
    """PEFT changes the weights to load such a file; here it is a plain LoRA of twice the rank, and the backbone stays."""
    name, config = MUTATED[case]
    theirs = peer(name, config)
    written(theirs, tmp_path / "theirs")
    m, bare = loaded(name, tmp_path / "theirs"), outputs(model(name), name)
    close(outputs(m, name), outputs(theirs, name))
    with gw.using(m, None):
        assert outputs(m, name).equal(bare)
    with theirs.disable_adapter():  # the peer: what is left is not the backbone
        assert (outputs(theirs, name) - bare).abs().max() > 1e-4
    gw.save(m, "a", tmp_path / "plain", format="peft")
    again = read_by_peer(name, tmp_path / "plain")
    close(outputs(again, name), outputs(theirs, name))
    with again.disable_adapter():
        assert outputs(again, name).equal(bare)


def test_what_is_off_in_glora_must_be_zero(peers: Any, tmp_path: Path) -> None:
    name, folder, _ = peers("glora_bias")
    tensors = tensors_of(folder)
    key = next(key for key in tensors if key.endswith("glora_A.zeros"))
    tensors[key][0, 0] = 1.0
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(gw.GraftError, match="the config says none"):
        loaded(name, tmp_path)


def test_a_supernet_is_no_file_of_theirs(tmp_path: Path) -> None:
    m = model("biased")
    gw.graft(m, gw.GLoRA(a="vector", at="q"), "mixed", head=False)
    with pytest.raises(gw.GraftError, match="no config says"):
        gw.save(m, "mixed", tmp_path / "mixed", format="peft")
    gw.graft(m, gw.GLoRA(supernet=True, at="q"), "net", head=False)
    with pytest.raises(gw.GraftError, match="no method for glora"):
        gw.save(m, "net", tmp_path / "net", format="peft")


def test_a_random_start_is_taken_for_the_exact_one(tmp_path: Path) -> None:
    theirs = peer("llama", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa_niter_16"))
    written(theirs, tmp_path)
    with pytest.warns(UserWarning, match="random approximation"):
        m = loaded("llama", tmp_path)
    assert (outputs(m, "llama") - outputs(theirs, "llama")).abs().max() < 1e-3


def test_transformers_reads_what_is_written(peers: Any, tmp_path: Path) -> None:
    name, folder, theirs = peers("lora_patterns")
    m = loaded(name, folder)
    gw.adapters(m)["a"].metadata.clear()
    gw.save(m, "a", tmp_path, format="peft")
    host = model(name)
    host.load_adapter(str(tmp_path))
    close(outputs(host, name), theirs)


def test_methods_of_differences_are_written_as_values(tmp_path: Path) -> None:
    """BitFit beside LoRA is PEFT's bias="all"; LN tuning keeps differences here and values there."""
    for name, methods, kind in (
        ("biased", [gw.LoRA(r=2), gw.BitFit(at="any")], "LORA"),
        ("llama", [gw.LNTuning()], "LN_TUNING"),
        ("biased", [gw.BitFit(at="q, up")], "BEFT"),
        ("llama", [gw.Full(at="norm")], "LN_TUNING"),
    ):
        m = model(name)
        perturb(gw.graft(m, methods, "a", head=False, seed=0).parameters())
        folder = gw.save(m, "a", tmp_path / kind, format="peft")
        assert config_of(folder)["peft_type"] == kind
        close(outputs(read_by_peer(name, folder), name), outputs(m, name))
        close(outputs(loaded(name, folder), name), outputs(m, name))
    assert config_of(tmp_path / "LORA")["bias"] == "all"


def test_short_names_where_they_are_enough(tmp_path: Path) -> None:
    """Engines that serve adapters read the last words of module paths; rank_pattern names one module each."""
    m = model("llama")
    gw.graft(m, gw.LoRA(r=2, at="q, down"), "a", head=False)
    gw.graft(m, gw.LoRA(r=2, at="q", layers="1"), "b", head=False)
    gw.graft(m, [gw.LoRA(r=2, at="q"), gw.LoRA(r=3, at="v", layers="0")], "c", head=False)
    a, b, c = (config_of(gw.save(m, name, tmp_path / name, format="peft")) for name in "abc")
    assert a["target_modules"] == ["down_proj", "q_proj"] and a["task_type"] == "CAUSAL_LM"
    assert b["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert c["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.v_proj": 3}


def test_a_reparameterised_prefix_is_written_folded(tmp_path: Path) -> None:
    m = model("llama")
    perturb(gw.graft(m, gw.Prefix(length=3, reparam="mlp", mid=8, at="attn, entry"), "a").parameters())
    gw.save(m, "a", tmp_path, format="peft")
    close(outputs(read_by_peer("llama", tmp_path), "llama"), outputs(m, "llama"))


def test_an_embedding_that_grew_comes_with_the_adapter(tmp_path: Path) -> None:
    """PEFT stores the whole matrix beside its LoRA; where it is not the backbone's, it stands in for it."""
    theirs = peer("llama", LoraConfig(r=2, target_modules=["embed_tokens"]))
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight[5:9] += 1
    written(theirs, tmp_path / "theirs")
    m, bare = loaded("llama", tmp_path / "theirs"), outputs(model("llama"), "llama")
    close(outputs(m, "llama"), outputs(theirs, "llama"))
    assert [method.name for method in gw.adapters(m)["a"].methods] == ["full", "lora"]
    gw.save(m, "a", tmp_path / "back", format="peft")
    close(outputs(read_by_peer("llama", tmp_path / "back"), "llama"), outputs(theirs, "llama"))
    gw.remove(m, "a")
    assert outputs(m, "llama").equal(bare)


def test_pruned_triplets_of_adalora(tmp_path: Path) -> None:
    theirs = peer(*CASES["adalora"])
    theirs.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.self_attn.{n}_proj.lora_E": [bool(i), True, n == "q", False] for i in (0, 1) for n in "qv"
    }
    theirs.base_model.rankallocator.mask_using_rank_pattern(
        theirs, {f"base_model.model.{k}": v for k, v in theirs.peft_config["default"].rank_pattern.items()}
    )
    written(theirs, tmp_path / "theirs")
    m = loaded("llama", tmp_path / "theirs")
    close(outputs(m, "llama"), outputs(theirs, "llama"))
    assert sorted({d.values.shape[-1] for d in gw.adapters(m)["a"].deltas()}) == [1, 2, 3]
    gw.adapters(m)["a"].metadata.clear()
    gw.save(m, "a", tmp_path / "ours", format="peft")
    close(outputs(read_by_peer("llama", tmp_path / "ours"), "llama"), outputs(theirs, "llama"))


POLY: dict[str, tuple[str, Any]] = {  # apart from the others: the peer's forward asks for the tasks of the rows
    "poly": ("llama", PolyConfig(r=3, n_tasks=3, n_skills=2, target_modules=["q_proj", "v_proj", "up_proj"], **CAUSAL)),
    "mhr": (
        "llama",
        PolyConfig(r=2, n_tasks=3, n_skills=4, n_splits=4, target_modules=r".*\.(q_proj|o_proj)", **CAUSAL),
    ),
}


def of_tasks(m: torch.nn.Module, theirs: bool = False) -> torch.Tensor:
    """Logits of a batch whose rows have different tasks."""
    tasks = torch.tensor([2, 0, 1])
    with torch.no_grad():
        if theirs:
            return m(**inputs("llama"), task_ids=tasks).logits
        with gw.context(m, task=tasks):
            return outputs(m, "llama")


@pytest.mark.parametrize("case", POLY)
def test_the_tasks_of_poly(case: str, tmp_path: Path) -> None:
    """Both ways; its tasks have numbers there, and names here."""
    theirs = peer(*POLY[case])
    written(theirs, tmp_path / "theirs")
    wanted = of_tasks(theirs, theirs=True)
    m = loaded("llama", tmp_path / "theirs")
    close(of_tasks(m), wanted)
    assert (wanted - outputs(model("llama"), "llama")).abs().max() > 1e-3
    gw.save(m, "a", tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back") == config_of(tmp_path / "theirs")
    ours, before = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == before.keys() and all(torch.equal(ours[key], before[key]) for key in ours)
    gw.adapters(m)["a"].metadata.clear()  # a config of our own
    gw.save(m, "a", tmp_path / "ours", format="peft")
    close(of_tasks(read_by_peer("llama", tmp_path / "ours"), theirs=True), wanted)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_tasks", 2**50), ("n_tasks", -1), ("n_splits", 5), ("n_skills", 0), ("poly_type", "top"), ("n_tasks", 2)],
)
def test_a_config_of_poly_that_says_what_cannot_be(field: str, value: Any, tmp_path: Path) -> None:
    folder = written(peer(*POLY["poly"]), tmp_path)
    said = json.loads((folder / "adapter_config.json").read_text()) | {field: value}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    m = model("llama")
    with pytest.raises(gw.GraftError):
        gw.load(m, folder)
    assert not gw.adapters(m)


def test_what_poly_has_there_and_what_not(tmp_path: Path) -> None:
    m = model("llama")
    named = gw.Poly(r=2, skills=3, tasks=("mnli", "rte", "sst2"), tau=0.5, prior=0.1, router_lr=10.0)
    perturb(gw.graft(m, named, "named", head=False).parameters())
    gw.save(m, "named", tmp_path / "named", format="peft")
    close(of_tasks(read_by_peer("llama", tmp_path / "named"), theirs=True), of_tasks(m))
    for name, method in (
        ("shared", gw.Poly(shared=True)),
        ("given", gw.Poly(skills=2, allocation=("10",))),
        ("frozen", gw.Poly(tasks=("a", "b"), frozen=1)),
    ):
        gw.graft(m, method, name, head=False)
        with pytest.raises(gw.GraftError, match="own format"):
            gw.save(m, name, tmp_path / name, format="peft")
        assert not (tmp_path / name).exists()
    other = model("gpt2")
    gw.graft(other, gw.Poly(at="o"), "conv1d", head=False)
    with pytest.raises(gw.GraftError, match="linear layers"):
        gw.save(other, "conv1d", tmp_path / "conv1d", format="peft")


NATIVE = {
    "lora": gw.LoRA(),
    "pissa": gw.PiSSA(r=3, alpha=5.0),  # written as the plain LoRA that it is on the untouched weights
    "olora": gw.LoRA(r=3, alpha=5.0, rslora=True, init="olora"),
    "urae": gw.URAE(r=3),
    "loraplus": gw.LoRAPlus(of=gw.LoRA(r=3)),
    "dora": gw.DoRA(r=8, alpha=16.0),
    "vera": gw.VeRA(r=8),
    "loha": gw.LoHa(r=3, alpha=5.0),
    "lokr": gw.LoKr(r=2),
    "vblora": gw.VBLoRA(r=2, vectors=12, length=4),
    "ia3": gw.IA3(),
    "adalora": gw.AdaLoRA(),
    "oft": gw.OFT(),
    "boft": gw.BOFT(),
    "hra": gw.HRA(),
    "road": gw.RoAd(group=4),
    "prompt": gw.Prompt(length=3),
    "prefix": gw.Prefix(length=3, at="attn, entry"),
    "ln_tuning": gw.LNTuning(),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_grafted_here_with_its_defaults_computes_the_same_there(name: str, tmp_path: Path) -> None:
    m = model("llama")
    perturb(gw.graft(m, NATIVE[name], "a", head=False).parameters())
    gw.save(m, "a", tmp_path, format="peft")
    close(outputs(read_by_peer("llama", tmp_path), "llama"), outputs(m, "llama"))
