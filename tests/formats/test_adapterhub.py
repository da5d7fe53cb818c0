"""AdapterHub's folders, from files that adapters 1.3.0 wrote: the same logits, and there and back without a bit of difference."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.formats.adapterhub import AdapterHub

HERE = Path(__file__).parent.parent / "fixtures" / "adapterhub"
FILES = HERE / "files"
sys.path.insert(0, str(HERE))
from backbones import backbone, inputs, numbers  # noqa: E402

KINDS = ("bert", "roberta", "bart", "gpt2", "llama", "t5", "vit")
CASES = [f"{kind}/{folder.name}" for kind in KINDS for folder in sorted((FILES / kind).iterdir())]
# what graftwork has no method for: the word of the config that the error names
REFUSED = {
    "bert/mtl_lora": "mtl_lora",
    "bert/prompt": "prompt_tuning",
    "bert/residual_of_norm": "residual_before_ln",
    "t5/compacter": "shared_parameters.a.phm_rule",  # which the library itself leaves out of a T5's file
}
# where the library computes something else than it says: the warning, and a test of its own below
FAULTY = {
    "bert/direft": "NoReFT",
    "bert/dora": "scales the bias",
    "bert/dora_scaled": "leaves alpha / r = 2 out",
    "llama/dora_scaled": "leaves alpha / r = 2 out",
    "t5/prefix_flat": "relative positions",
    "t5/prefix_cross": "relative positions",
    **{
        f"{kind}/invertible": "the inverse in front of its own LM heads only"
        for kind in ("bart", "gpt2", "llama", "t5")
    },
}
WARNED = {
    **FAULTY,
    "llama/dora": "scales the bias",
    "bert/noreft": "NoReFT",
    "bert/vera": "whole matrices",
    "bert/prefix_relu": "another non-linearity",
    "bert/compacter_factorised_rule": "two factors",
    "bert/compacter_shared_W": "shared by all layers",
    "t5/prefix_no_bias": "relative positions",
}
# read as another method that computes the same: written back as that one
FOLDED = ("bert/vera", "bert/prefix_relu", "bert/compacter_factorised_rule", "bert/compacter_shared_W")
# of the feed-forward layer one projection, by a config that takes up for down on this model
AMBIGUOUS = "llama/ia3"
READ = [case for case in CASES if case not in REFUSED]


def model_of(case: str) -> torch.nn.Module:
    kind, _, name = case.partition("/")
    return backbone(kind, biased=not name.endswith("no_bias"))


def loaded(case: str, folder: Path | None = None):
    """(model, adapter, texts of the warnings)"""
    model = model_of(case)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        adapter = gw.load(model, folder or FILES / case)
    return model, adapter, [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


def logits(model: torch.nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(kind)).logits


def expected(folder: Path) -> torch.Tensor:
    return safetensors.torch.load_file(folder / "expected.safetensors")["logits"]


def content(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    safe = folder / "adapter.safetensors"
    if safe.exists():
        return config, safetensors.torch.load_file(safe)
    return config, torch.load(folder / "pytorch_adapter.bin", weights_only=True)


@pytest.mark.parametrize("case", READ)
def test_a_file_computes_what_its_library_computes(case):
    kind = case.partition("/")[0]
    model, _, warned = loaded(case)
    apart = (logits(model, kind) - expected(FILES / case)).abs().max().item()
    effect = (logits(model_of(case), kind) - expected(FILES / case)).abs().max().item()
    assert effect > 1e-3  # the adapter does something
    assert (apart > 1e-3) if case in FAULTY else (apart < 1e-5), apart
    if case in WARNED:
        assert any(WARNED[case] in text for text in warned), warned
    else:
        assert warned == []


@pytest.mark.parametrize("case", READ)
def test_there_and_back(case, tmp_path):
    model, adapter, _ = loaded(case)
    before = logits(model, case.partition("/")[0])
    gw.save(model, "a", tmp_path / "out", format="adapterhub")
    (config, tensors), (config_back, tensors_back) = content(FILES / case), content(tmp_path / "out")
    if case not in FOLDED:
        assert config == config_back
        # the library keeps a copy of every prefix in every layer, and factors of a rotation that several factors make
        tensors = {k: t for k, t in tensors.items() if ".prefix_tuning.pool." not in k}
        assert tensors.keys() == tensors_back.keys()
        unused = "units.1." if config["config"].get("suffix_positions") == 0 else "nothing"
        for key, value in tensors.items():
            if ".parametrizations." not in key and unused not in key:
                assert torch.equal(value, tensors_back[key]), key
    again, twin, _ = loaded(case, tmp_path / "out")
    assert torch.equal(logits(again, case.partition("/")[0]), before)
    mine, theirs = adapter.state_dict(), twin.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("case", READ)
def test_a_config_made_anew_says_the_same(case, tmp_path):
    """An adapter without its foreign config, as one that was trained here has none."""
    model, adapter, _ = loaded(case)
    adapter.metadata = {}
    if case == AMBIGUOUS:
        with pytest.raises(GraftError, match="takes one for the other"):
            gw.save(model, "a", tmp_path / "out", format="adapterhub")
        return
    gw.save(model, "a", tmp_path / "out", format="adapterhub")
    again, _, _ = loaded(case, tmp_path / "out")
    assert torch.equal(logits(again, case.partition("/")[0]), logits(model, case.partition("/")[0]))


@pytest.mark.parametrize("case", REFUSED)
def test_what_graftwork_lacks_is_refused_by_name(case):
    model = backbone(case.partition("/")[0])
    before = logits(model, case.partition("/")[0])
    with pytest.raises(GraftError, match=REFUSED[case]):
        gw.load(model, FILES / case)
    assert gw.adapters(model) == {} and torch.equal(logits(model, case.partition("/")[0]), before)


NATIVE = [
    ("bert", gw.MADXLanguage(reduction=4)),
    ("roberta", gw.MADXLanguage(inv_reduction=4)),
    ("bert", gw.UniPELT(reduction=4, length=2, mid=4, r=2)),
    ("llama", gw.UniPELT("pl", length=2, mid=4, r=2)),
    ("bert", gw.Houlsby(d=4, norms=False)),
    ("bert", gw.Pfeiffer(d=4)),
    ("gpt2", gw.Pfeiffer(d=4, norm="none")),
    ("vit", gw.AdapterPlus(r=4, drop_path=0.0)),
    ("bert", gw.Parallel(d=4)),
    ("bert", gw.Compacter(reduction=4, norms=False)),
    ("llama", gw.LoRA(r=2, at="q, v")),
    ("gpt2", gw.LoRA(r=2, rslora=True, at="q, v, up, down")),
    ("bert", gw.DoRA(r=2, at="q, k")),
    ("bert", gw.VeRA(r=2)),
    ("bert", gw.IA3(at="k, v, up")),
    ("bart", gw.Prefix(length=3, reparam="mlp", mid=4)),
    ("llama", gw.Prefix(length=3)),
    ("bert", gw.LoReFT(r=2, positions="p2+s1", tied=False)),
    ("bert", [gw.Prefix(length=2), *gw.Parallel(d=3), gw.LoRA(r=1)]),
]


@pytest.mark.parametrize(("kind", "methods"), NATIVE, ids=[f"{k}-{n}" for n, (k, _) in enumerate(NATIVE)])
def test_an_adapter_made_here_goes_there_and_comes_back(kind, methods, tmp_path):
    model = backbone(kind)
    adapter = gw.graft(model, methods, name="mine", head=False, seed=0)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.add_(numbers(name, tuple(p.shape), 0.2))
    gw.save(model, "mine", tmp_path / "out", format="adapterhub")
    again = backbone(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gw.load(again, tmp_path / "out")
    torch.testing.assert_close(logits(again, kind), logits(model, kind), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "found"),
    [
        (gw.Houlsby(d=4), "no method for full"),
        (gw.Bottleneck(d=4, position="before", at="mlp"), "has no adapter there|no norm"),
        (gw.Bottleneck(d=4, bias=False, at="mlp"), "no config says"),
        (gw.Bottleneck(d=4, dropout=0.1, at="mlp"), "no config says"),
        (gw.LoRA(r=2, at="o"), "no config says"),
        (gw.LoReFT(r=2, variant="direft"), "loreft and noreft"),
        (gw.Invertible(), "invertible adapter alone"),
        (gw.MADXLanguage(coupling="glow"), "glow"),
        (gw.Gated(of=gw.LoRA(r=2, alpha=4)), "no config says"),
        (gw.Gated(of=gw.LoRA(r=2, alpha=2), tokens="real"), "no config says"),
        (gw.AdapterDrop(of=gw.Bottleneck(d=4, at="mlp")), "no method for adapter_drop"),
        (gw.BitFit(), "no method for bitfit"),
        ([gw.Bottleneck(d=4, at="mlp"), gw.Bottleneck(d=4, act="relu", at="self.attn")], "no config says"),
    ],
)
def test_what_their_files_cannot_say_is_refused(methods, found, tmp_path):
    model = backbone("bert")
    gw.graft(model, methods, name="mine", head=False)
    with pytest.raises(GraftError, match=found):
        gw.save(model, "mine", tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


# -- faults of adapters 1.3.0: what it gives, what is right, and why -------------------------------------


@pytest.mark.parametrize("case", ["bert/dora", "bert/dora_scaled", "llama/dora_scaled"])
def test_dora_there_scales_the_bias_and_forgets_alpha_in_the_norm(case):
    """W' = m / |V| V with V = W + s B A (Liu et al. 2024, eq. 5) leaves b as it is. There: y = m / |W + B A| (W x + b + s B A x)."""
    kind = case.partition("/")[0]
    model, adapter, _ = loaded(case)
    plain, right = backbone(kind), backbone(kind)
    (method,) = adapter.methods
    s = method.scale
    for key, delta in adapter.parts[0].deltas.items():
        path = key.partition(":")[0]
        for other, norm_scale, with_bias in ((plain, 1.0, True), (right, s, False)):
            linear = other.get_submodule(path)
            with torch.no_grad():
                w, update = linear.weight, delta.up @ delta.down
                g = delta.magnitude / (w + norm_scale * update).norm(dim=1)
                linear.weight.copy_(g[:, None] * (w + s * update))
                if with_bias and linear.bias is not None:
                    linear.bias.mul_(g)
    torch.testing.assert_close(logits(plain, kind), expected(FILES / case), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, kind), logits(right, kind), rtol=0, atol=1e-5)


def test_direft_there_is_stored_without_what_makes_it_one():
    """h + R^T (W h + b): its file is that of NoReFT, h + R^T (W h + b - R h), and so it is read, there as here."""
    _, adapter, _ = loaded("bert/direft")
    assert adapter.methods[0].variant == "noreft"
    values = [{k: t.clone() for k, t in d.folded().items()} for d in adapter.deltas()]
    direft = backbone("bert")
    made = gw.graft(direft, dataclasses.replace(adapter.methods[0], variant="direft"), head=False)
    for delta, tensors in zip(made.deltas(), values, strict=True):
        delta.restore(tensors)
    torch.testing.assert_close(logits(direft, "bert"), expected(FILES / "bert/direft"), rtol=0, atol=1e-5)


def test_vera_there_is_a_lora():
    """diag(b) B diag(d) A needs out + r numbers per weight; there whole matrices, out^2 + r^2, are trained: a LoRA of rank r."""
    _, tensors = content(FILES / "bert/vera")
    path = "bert.encoder.layer.0.attention.self.query.loras.a."
    assert tensors[f"{path}vera_B"].shape == (16, 16) and tensors[f"{path}vera_D"].shape == (2, 2)
    _, adapter, _ = loaded("bert/vera")
    assert [m.name for m in adapter.methods] == ["lora"]
    delta = adapter.parts[0].deltas["bert.encoder.layer.0.attention.self.query:q"]
    a, b = (tensors[f"bert.shared_parameters.a.lora_{m}"] for m in "AB")
    whole = tensors[f"{path}vera_B"] @ b @ tensors[f"{path}vera_D"] @ a
    torch.testing.assert_close(delta.weight(torch.zeros(16, 16)), whole)


def test_a_vera_whose_matrices_are_diagonal_is_one(tmp_path):
    folder = tmp_path / "vera"
    shutil.copytree(FILES / "bert/vera", folder)
    config, tensors = content(folder)
    tensors = {k: t.diagonal().diag() if "vera_" in k else t for k, t in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors")
    model, adapter, warned = loaded("bert/vera", folder)
    assert [m.name for m in adapter.methods] == ["vera"] and warned == []
    assert adapter.num_parameters == 4 * (16 + 2)
    gw.save(model, "a", tmp_path / "out", format="adapterhub")
    config_back, tensors_back = content(tmp_path / "out")
    assert config == config_back and tensors.keys() == tensors_back.keys()
    assert all(torch.equal(tensors[k], tensors_back[k]) for k in tensors)


def test_a_prefix_there_moves_t5s_real_tokens():
    """Queries count from 0 and keys from the prefix on: the token at i sees itself at distance `length`. Right is 0 (Li and Liang
    2021: a prefix adds keys and values, nothing else): without a bias for distances both agree."""
    model, _, _ = loaded("t5/prefix_no_bias")
    torch.testing.assert_close(logits(model, "t5"), expected(FILES / "t5/prefix_no_bias"), rtol=0, atol=1e-5)
    model, _, _ = loaded("t5/prefix_flat")

    def moved(self, query_length, key_length, **kwargs):
        return type(self).compute_bias(self, query_length, key_length + 3, **kwargs)[..., 3:]

    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = moved.__get__(module)
    there = expected(FILES / "t5/prefix_flat")
    here = logits(model, "t5")
    # what is left is the bias of the prefix itself, which there stands at distances of its own
    assert (here - there).abs().max() < 0.8 * (logits(loaded("t5/prefix_flat")[0], "t5") - there).abs().max()


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama", "t5"])
def test_an_invertible_adapter_there_has_no_inverse_in_front_of_transformers_heads(kind):
    """MAD-X (Pfeiffer et al. 2020, section 4.3) inverts in front of the output embeddings; without that both agree."""
    model, adapter, _ = loaded(f"{kind}/invertible")
    (delta,) = (d for part in adapter.parts if part.method.name == "invertible" for d in part.deltas.values())
    delta.undone = False
    gw.activate(model, None)
    gw.activate(model, "a")
    torch.testing.assert_close(logits(model, kind), expected(FILES / f"{kind}/invertible"), rtol=0, atol=1e-5)


def test_an_invertible_adapter_there_has_one_in_front_of_its_own_head():
    model = backbone("bert", cls="BertForMaskedLM")
    head = model.cls.predictions
    parts = {"0": head.transform.dense, "2": head.transform.LayerNorm, "3": head}
    with torch.no_grad():
        for n, module in parts.items():
            for leaf, p in module.named_parameters(recurse=False):
                name = f"heads.a.{n}.{leaf}"
                p.copy_(numbers(name, tuple(p.shape), 0.5) + float(name == "heads.a.2.weight"))
    adapter = gw.load(model, FILES / "heads/bert_masked_lm")
    assert [m.name for m in adapter.methods] == ["invertible", "bottleneck"]
    torch.testing.assert_close(logits(model, "bert"), expected(FILES / "heads/bert_masked_lm"), rtol=0, atol=1e-5)


def test_the_words_of_earlier_versions_for_invertible_adapters(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(FILES / "bert/invertible", folder)
    about, tensors = content(folder)
    inner = about["config"]
    inner["invertible_adapter"] = {"block_type": inner.pop("inv_adapter"), "non_linearity": "relu"}
    inner["invertible_adapter"]["reduction_factor"] = inner.pop("inv_adapter_reduction_factor")
    (folder / "adapter_config.json").write_text(json.dumps(about))
    old = {k.replace(".invertible_adapters.", ".invertible_lang_adapters."): t for k, t in tensors.items()}
    safetensors.torch.save_file(old, folder / "adapter.safetensors")
    model, _, _ = loaded("bert/x", folder)
    torch.testing.assert_close(logits(model, "bert"), expected(FILES / "bert/invertible"), rtol=0, atol=1e-5)


# -- heads and other folders -------------------------------------


def test_the_head_of_a_transformers_class(tmp_path):
    model, adapter, warned = loaded("bert/x", FILES / "heads/bert_static")
    torch.testing.assert_close(logits(model, "bert"), expected(FILES / "heads/bert_static"), rtol=0, atol=1e-5)
    assert adapter.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and warned == []
    gw.save(model, "a", tmp_path / "out", format="adapterhub")
    stored = torch.load(FILES / "heads/bert_static/pytorch_model_head.bin", weights_only=True)
    back = safetensors.torch.load_file(tmp_path / "out/model_head.safetensors")
    assert stored.keys() == back.keys() and all(torch.equal(stored[k], back[k]) for k in stored)
    config = json.loads((FILES / "heads/bert_static/head_config.json").read_text())
    assert json.loads((tmp_path / "out/head_config.json").read_text()) == config


@pytest.mark.parametrize(
    ("case", "kind", "cls"),
    [
        ("bert_pooled", "bert", "BertForSequenceClassification"),
        ("bert_tagging", "bert", "BertForTokenClassification"),
        ("roberta_two_layers", "roberta", "RobertaForSequenceClassification"),
    ],
)
def test_flexible_heads_where_a_class_computes_the_same(case, kind, cls, tmp_path):
    labels = 4 if case == "bert_tagging" else 3
    model = backbone(kind, cls=cls, num_labels=labels)
    adapter = gw.load(model, FILES / "heads" / case)
    torch.testing.assert_close(logits(model, kind), expected(FILES / "heads" / case), rtol=0, atol=1e-5)
    assert adapter.labels == (tuple("xyz") if labels == 3 else tuple(f"LABEL_{i}" for i in range(4)))
    gw.save(model, "a", tmp_path / "out", format="adapterhub")
    stored = torch.load(FILES / "heads" / case / "pytorch_model_head.bin", weights_only=True)
    back = safetensors.torch.load_file(tmp_path / "out/model_head.safetensors")
    assert stored.keys() == back.keys() and all(torch.equal(stored[k], back[k]) for k in stored)


def test_a_head_that_computes_something_else_is_refused():
    with pytest.raises(GraftError, match="head of 2 layers"):
        gw.load(backbone("bert"), FILES / "heads/bert_two_layers")


# -- fusion layers ---------------------------------------------------------------------------------------

FUSIONS = sorted(
    folder.name for folder in (FILES / "fusion").iterdir() if folder.name not in ("setup", "bert_parallel")
)


def plain_copy(folder: Path, tmp_path: Path) -> Path:
    """An adapter's folder without the head beside it."""
    return Path(shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("*head*")))


def fused(case: str, folder: Path | None = None):
    """(model, fusion, texts of the warnings), its two adapters loaded first."""
    model = backbone(case.partition("_")[0])
    for name in "ab":
        gw.load(model, FILES / "fusion" / case / name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        adapter = gw.load(model, folder or FILES / "fusion" / case / "both")
    return model, adapter, [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("case", FUSIONS)
def test_a_fusion_computes_what_its_library_computes(case):
    kind = case.partition("_")[0]
    model, adapter, warned = fused(case)
    torch.testing.assert_close(logits(model, kind), expected(FILES / "fusion" / case), rtol=0, atol=1e-5)
    assert [m.of for m in adapter.methods] == [("a", "b")]
    for other in ("a", "b", "mean(a, b)"):
        with gw.using(model, other):
            assert (logits(model, kind) - expected(FILES / "fusion" / case)).abs().max() > 1e-3
    assert [text for text in warned if "where no adapter acts" in text] == warned and bool(warned) == (
        case == "bert_leave_out"
    )


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("case", FUSIONS)
def test_a_fusion_goes_there_and_back(case, anew, tmp_path):
    kind = case.partition("_")[0]
    model, adapter, _ = fused(case)
    before = logits(model, kind)
    if anew:
        adapter.metadata = {}
    gw.save(model, "both", tmp_path / "out", format="adapterhub")
    files = [
        folder / "model_adapter_fusion.safetensors" for folder in (FILES / "fusion" / case / "both", tmp_path / "out")
    ]
    theirs, ours = map(safetensors.torch.load_file, files)
    assert ours and all(torch.equal(t, theirs[k]) for k, t in ours.items())
    assert theirs.keys() == ours.keys() or case == "bert_leave_out"
    if not anew:
        configs = [json.loads((f.parent / "adapter_fusion_config.json").read_text()) for f in files]
        assert configs[0] == configs[1]
    again, twin, _ = fused(case, tmp_path / "out")
    assert torch.equal(logits(again, kind), before) and twin.methods == adapter.methods


def test_a_setup_is_read_folder_by_folder(tmp_path):
    setup = FILES / "fusion/setup"
    model = backbone("bert")
    with pytest.raises(GraftError, match="one by one, then the folder of their fusion"):
        gw.load(model, setup)
    with pytest.raises(GraftError, match="no adapter 'a'"):
        gw.load(model, setup / "a,b")
    assert gw.adapters(model) == {}
    for name in "ab":
        gw.load(model, plain_copy(setup / name, tmp_path))
    gw.load(model, setup / "a,b")  # a torch file
    assert gw.active(model) == '"a,b"'
    torch.testing.assert_close(logits(model, "bert"), expected(setup), rtol=0, atol=1e-5)
    out = logits(model, "bert")
    gw.activate(model, "fuse(a, b)")
    assert torch.equal(logits(model, "bert"), out)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"query_before_ln": True}, "query_before_ln"),
        ({"residual_before": True}, "residual_before"),
        ({"temperature": True}, "temperature"),
        ({"query": False}, "query = False"),
        ({"value": "x"}, "restore the file"),
        ({"a_new_option": 1}, "a_new_option"),
        ({"value": False}, "belong nowhere"),
    ],
)
def test_switches_of_a_fusion_that_are_not_here_are_refused(fields, found, tmp_path):
    folder = Path(shutil.copytree(FILES / "fusion/gpt2_seq_bn/both", tmp_path / "both"))
    about = json.loads((folder / "adapter_fusion_config.json").read_text())
    about["config"] |= fields
    (folder / "adapter_fusion_config.json").write_text(json.dumps(about))
    with pytest.raises(GraftError, match=found):
        fused("gpt2_seq_bn", folder)


def test_a_fusion_of_adapters_beside_the_sub_layer_is_refused():
    """There it adds the sub-layer's input once more than one adapter alone does."""
    model = backbone("bert")
    for name in "ab":
        gw.load(model, FILES / "fusion/bert_parallel" / name)
    with pytest.raises(GraftError, match="adds once more"):
        gw.load(model, FILES / "fusion/bert_parallel/both")
    assert set(gw.adapters(model)) == {"a", "b"}


def made_fusion(methods=None, **options) -> torch.nn.Module:
    """A fusion that was made here, with a head."""
    model = backbone("bert")
    for name in "ab":
        gw.graft(model, methods or gw.Pfeiffer(d=4, norm="none"), name, head=False)
    gw.graft(model, gw.Fusion(of=["a", "b"], **options), "f", seed=0)
    with torch.no_grad():
        for name in "abf":
            for key, p in gw.adapters(model)[name].named_parameters():
                p.add_(numbers(f"{name}{key}", tuple(p.shape), 0.2))
    return model


def test_a_fusion_made_here_goes_there_and_comes_back(tmp_path):
    model = made_fusion()
    for name in "abf":
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gw.save(model, name, tmp_path / name, format="adapterhub")
    assert ["cannot have none" in str(w.message) for w in seen] == [True]  # BERT's own dropout stands for 0 there
    again = backbone("bert")
    for name in "abf":
        gw.load(again, tmp_path / name)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: made_fusion(residual=True), "attends to what the adapters add"),
        (lambda: made_fusion(query_output=True), "asked by what they read"),
        (lambda: made_fusion(gw.LoRA(r=2)), "bottleneck adapters alone"),
        (lambda: made_fusion(gw.Parallel(d=4)), "adds once more"),
        (lambda: made_fusion(gw.Bottleneck(d=4, norm="after", at="mlp")), "without their norm"),
    ],
)
def test_a_fusion_that_their_files_cannot_say_is_refused(make, found, tmp_path):
    model = make()
    with pytest.raises(GraftError, match=found):
        gw.save(model, "f", tmp_path / "out", format="adapterhub")
    assert not (tmp_path / "out").exists()


def test_mixtures_that_adapterhub_has_not_are_refused(tmp_path):
    model = backbone("bert")
    for name in ("a", "b", "c"):
        gw.graft(model, gw.Pfeiffer(d=4), name, head=False)
    gw.graft(model, gw.Weighted(of=["a", "b"]), "w", head=False)
    gw.graft(model, gw.Fusion(of=["a >> c", "b"]), "s", head=False)
    for name, found in (("w", "no mixture but a fusion"), ("s", "adapters by name")):
        with pytest.raises(GraftError, match=found):
            gw.save(model, name, tmp_path / "out", format="adapterhub")


def changed(tmp_path: Path, case: str, **fields) -> Path:
    """A copy of a case whose config has other fields."""
    folder = tmp_path / "changed"
    shutil.copytree(FILES / case, folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    about["config"].update(fields)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("case", "fields", "found"),
    [
        ("bert/seq_bn", {"non_linearity": "prelu2"}, "non_linearity"),
        ("bert/seq_bn", {"original_ln_after": False}, "no adapter with this skip"),
        ("bert/norm_after", {"scaling": 2.0}, "ln_after with scaling"),
        ("bert/norm_after", {"adapter_residual_before_ln": True}, "adapter_residual_before_ln"),
        ("bert/seq_bn", {"reduction_factor": 0}, "reduction_factor"),
        ("bert/seq_bn", {"leave_out": [0]}, "belong nowhere"),
        ("bert/seq_bn", {"mh_adapter": True}, "missing"),
        ("bert/seq_bn", {"a_new_option": 3}, "a_new_option"),
        ("bert/seq_bn", {"scaling": "by heart"}, "scaling"),
        ("bert/invertible", {"inv_adapter": "glow"}, "no bijection"),
        ("bert/invertible", {"inv_adapter": "realnvp"}, "expected 'nice'"),
        ("bert/invertible", {"inv_adapter_reduction_factor": 0}, "inv_adapter_reduction_factor"),
        ("bert/invertible", {"inv_adapter_reduction_factor": 4}, "stored|shape"),
        ("bert/invertible", {"inv_adapter": None}, "belong nowhere"),
        ("bert/lora", {"use_gating": True}, r"loras\.a\.gate\.weight"),
        ("bert/prefix", {"use_gating": True}, r"prefix_gates\.a\.weight"),
        ("bert/prefix", {"use_gating": True, "shared_gating": False}, "shared_gating"),
        ("bert/ia3", {"use_gating": True}, "use_gating = True at .*ia3"),
        ("bert/dora", {"use_gating": True}, "use_gating = True at .*dora"),
        ("bert/compacter", {"use_gating": True}, "use_gating = True at .*phm"),
        ("bert/invertible", {"use_gating": True}, "use_gating = True at .*invertible"),
        ("bert/lora", {"attn_matrices": ["q", "x"]}, "attn_matrices"),
        ("bert/ia3", {"alpha": 2}, "IA"),
        ("bert/prefix", {"prefix_length": 4}, "shape|length|stored"),
        ("bert/prefix_flat", {"prefix_length": 5}, "restore the file"),
        ("bert/compacter", {"phm_bias": False}, "phm_bias"),
        ("bert/loreft", {"r": 3}, "stored"),
    ],
)
def test_bad_configs(case, fields, found, tmp_path):
    model = backbone("bert")
    before = logits(model, "bert")
    with pytest.raises(GraftError, match=found):
        gw.load(model, changed(tmp_path, case, **fields))
    assert gw.adapters(model) == {} and torch.equal(logits(model, "bert"), before)


def test_stochastic_depth_is_drop_path(tmp_path):
    model = backbone("vit")
    adapter = gw.load(model, changed(tmp_path, "vit/adapter_plus", stochastic_depth=0.1))
    assert adapter.methods[0].drop_path == 0.1
    torch.testing.assert_close(logits(model, "vit"), expected(FILES / "vit/adapter_plus"), rtol=0, atol=1e-5)


def test_files_of_earlier_versions(tmp_path):
    """Names of before, "gelu" for the approximate one, and the LoRA that left alpha / r out."""
    folder = tmp_path / "old"
    shutil.copytree(FILES / "bert/double_seq_bn", folder)
    about, tensors = content(folder)
    del about["version"]
    about["config"]["non_linearity"] = "gelu"
    (folder / "adapter_config.json").write_text(json.dumps(about))
    words = {".attention.output.adapters.": ".attention.output.attention_text_task_adapters."}
    old = {
        k.replace(*next(iter(words.items()))).replace("output.adapters.", "output.layer_text_task_adapters."): t
        for k, t in tensors.items()
    }
    safetensors.torch.save_file(old, folder / "adapter.safetensors")
    _, adapter, _ = loaded("bert/x", folder)
    assert adapter.methods[0].act == "gelu_new" and len(adapter.sites) == 4
    folder = tmp_path / "lora"
    shutil.copytree(FILES / "bert/lora", folder)
    about = json.loads((folder / "adapter_config.json").read_text()) | {"version": "adapters.0.2.2"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    assert loaded("bert/x", folder)[1].methods[0].scale == 1


def test_a_file_of_a_model_without_its_head_and_the_other_way_round(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(FILES / "bert/lora", folder)
    _, tensors = content(folder)
    safetensors.torch.save_file(
        {k.removeprefix("bert."): t for k, t in tensors.items()}, folder / "adapter.safetensors"
    )
    model, _, _ = loaded("bert/x", folder)
    torch.testing.assert_close(logits(model, "bert"), expected(FILES / "bert/lora"), rtol=0, atol=1e-5)
    base = backbone("bert_base")
    gw.load(base, FILES / "bert/lora")
    assert len(gw.adapters(base)["a"].sites) == 4


def test_the_sum_that_pfeiffers_adapter_reads():
    """norm(z + U g(D norm(z)))  with z = a + r, by hand."""
    model = backbone("bert")
    adapter = gw.graft(
        model,
        gw.Bottleneck(d=4, act="relu", position="sum", init="bert", init_std=0.3, at="/output.LayerNorm/"),
        head=False,
    )
    site = adapter.sites[0]
    delta, z = adapter.parts[0].deltas[site.key], numbers("z", (2, 3, 16), 1.0)
    backbones = model.get_submodule(site.path)

    def norm(x):
        return F.layer_norm(x, (16,), backbones.weight, backbones.bias, 1e-12)

    by_hand = norm(z + F.relu(norm(z) @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias)
    with torch.no_grad():
        torch.testing.assert_close(backbones(z), by_hand)


JUNK = st.sampled_from(
    [None, True, 0, -1, 3, 1e9, 0.3, "", "q", "learned", [], [0], [None], {}, {"default": 0}, {"0": "x"}]
)
SOME = (
    "bert/invertible",
    "bert/unipelt",
    "bert/seq_bn",
    "bert/compacter",
    "bert/lora",
    "bert/vera",
    "bert/prefix_flat",
    "bert/prefix",
    "bert/loreft",
    "bert/union",
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_files_are_refused_or_read(data, tmp_path_factory):
    """Fields of the config with other values, tensors gone or of other shapes: never another error than ours."""
    folder = tmp_path_factory.mktemp("mutated")
    about, tensors = content(FILES / data.draw(st.sampled_from(SOME)))
    inner = about["config"].get("configs", [about["config"]])[0]
    for field in data.draw(st.lists(st.sampled_from(sorted(inner)), max_size=2)):
        inner[field] = data.draw(JUNK)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        t = tensors.pop(key)
        shapes = {"flat": t.flatten(), "half": t[: len(t) // 2].clone(), "one": t.sum(), "more": t[None].clone()}
        change = data.draw(st.sampled_from(["gone", "name", *shapes]))
        tensors |= {} if change == "gone" else {f"{key}.x": t} if change == "name" else {key: shapes[change]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    safetensors.torch.save_file({k: t.clone() for k, t in tensors.items()}, folder / "adapter.safetensors")
    model = backbone("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gw.load(model, folder)
        except GraftError:
            assert gw.adapters(model) == {}
    assert AdapterHub().recognises(folder)


def test_dropout_of_a_whole_branch_keeps_its_mean():
    """Each number of s (U g(D h)) is 0 or divided by 1 - p, in training only; the skip is untouched."""
    model = backbone("bert")
    adapter = gw.graft(model, gw.Bottleneck(d=4, init="bert", init_std=0.5, out_dropout=0.5, at="mlp"), head=False)
    delta = next(iter(adapter.deltas()))
    h = numbers("h", (4, 5, 16), 1.0)
    with torch.no_grad():
        whole = delta.eval().branch(h)
        torch.manual_seed(0)
        dropped = delta.train().branch(h)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
