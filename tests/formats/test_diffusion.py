"""kohya's and diffusers' files, against W' = W + (alpha / r) up down written into the weights by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.grafting.root import is_grafted

from .unets import Pipeline, TextEncoder, UNet, draw, factors, layers, made, run, with_lora

ALPHAS = (1.5, 3.0, 0.5)
Update = tuple[Tensor, Tensor, float]


def updates(m: nn.Module, among: str = "") -> dict[str, Update]:
    """Factors of rank 2, 3, 2, 3... for every layer, of different alphas: (down, up, alpha)."""
    chosen = [path for path in layers(m) if among in path]
    return {p: (*factors(m, p, 2 + i % 2), ALPHAS[i % 3]) for i, p in enumerate(chosen)}


def expected(m: nn.Module, given: dict[str, Update], alphas: bool = True) -> Tensor:
    scaled = {p: (down, up, alpha / len(down) if alphas else 1.0) for p, (down, up, alpha) in given.items()}
    return run(with_lora(m, scaled))


def kohya(given: dict[str, Update], lead: str = "lora_unet_") -> dict[str, Tensor]:
    out = {}
    for path, (down, up, alpha) in given.items():
        name = lead + path.replace(".", "_")
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return out


def write(path: Path, tensors: dict[str, Tensor], **texts: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, path, texts or None)
    return path


def close(ours: Tensor, right: Tensor) -> None:
    assert (ours - right).abs().max() <= 1e-5 * max(1.0, right.abs().max().item())


def refused(m: nn.Module, path: Path, *words: str, **given: Any) -> None:
    before = run(m)
    with pytest.raises(gw.GraftError) as error:
        gw.load(m, path, "a", **given)
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert not is_grafted(m) and run(m).equal(before)


def test_kohya_is_the_closed_form_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    m = made(UNet)
    given = updates(m)
    path = write(tmp_path / "style.safetensors", kohya(given))
    base, right = run(m), expected(m, given)
    adapter = gw.load(m, path)
    assert adapter.name == "style" and len(adapter.sites) == len(given)
    assert (right - base).abs().max() > 1e-2
    close(run(m), right)
    gw.save(m, "style", tmp_path / "back.safetensors", format="kohya")
    back, before = (safetensors.torch.load_file(p) for p in (tmp_path / "back.safetensors", path))
    assert back.keys() == before.keys()
    assert all(back[k].equal(before[k]) and back[k].dtype == before[k].dtype for k in before)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_folder_holds_the_file(format: str, tmp_path: Path) -> None:
    m = made(UNet)
    given = updates(m)
    gw.load(m, write(tmp_path / "a.safetensors", kohya(given)))
    gw.save(m, "a", tmp_path / format, format=format)
    new = made(UNet)
    assert gw.load(new, tmp_path / format).name == format
    assert run(new).equal(run(m))


def test_without_an_alpha_the_scale_is_one(tmp_path: Path) -> None:
    m = made(UNet)
    given = updates(m)
    tensors = {k: v for k, v in kohya(given).items() if not k.endswith(".alpha")}
    right = expected(m, given, alphas=False)
    gw.load(m, write(tmp_path / "a.safetensors", tensors))
    close(run(m), right)


def test_kohya_on_a_pipeline_and_on_its_parts(tmp_path: Path) -> None:
    pipe = made(Pipeline)
    unet, text = updates(pipe.unet), updates(pipe.text_encoder)
    tensors = kohya(unet) | kohya(text, "lora_te_text_model_")  # a wrapper that this text encoder does not have
    path = write(tmp_path / "a.safetensors", tensors)
    every = {f"unet.{p}": u for p, u in unet.items()} | {f"text_encoder.{p}": u for p, u in text.items()}
    right = expected(pipe, every)
    gw.load(pipe, path)
    close(run(pipe), right)
    gw.save(pipe, "a", tmp_path / "b.safetensors", format="kohya")
    back = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys() and all(back[k].equal(tensors[k]) for k in back)

    alone = made(Pipeline).unet
    refused(alone, path, f"{3 * len(text)} that belong nowhere", "lora_te_text_model_layers_0_q_proj.alpha", "partial")
    right = expected(alone, unet)
    with pytest.warns(UserWarning, match="left out"):
        gw.load(alone, path, "a", partial=True)
    close(run(alone), right)


def test_new_files_name_the_component(tmp_path: Path) -> None:
    leads = {}
    for kind in (UNet, TextEncoder, Pipeline):
        m = made(kind)
        gw.graft(m, "lora(r=2, at='linear')", "a", head=False)
        for format, file in (("kohya", "lora"), ("diffusers", "pytorch_lora_weights")):
            gw.save(m, "a", tmp_path / kind.__name__ / format, format=format)
            path = tmp_path / kind.__name__ / format / f"{file}.safetensors"
            leads[kind.__name__, format] = {
                k.split("_block")[0].split("layers")[0] for k in safetensors.torch.load_file(path)
            }
            gw.load(made(kind), path)
    assert leads["UNet", "kohya"] == {"lora_unet_down"} and leads["TextEncoder", "kohya"] == {"lora_te_"}
    assert leads["Pipeline", "kohya"] == {"lora_unet_down", "lora_te_"}
    assert leads["UNet", "diffusers"] == {"unet.down"} and leads["TextEncoder", "diffusers"] == {"text_encoder."}
    assert leads["Pipeline", "diffusers"] == {"unet.down", "text_encoder."}


def test_two_text_encoders_mean_one_module(tmp_path: Path) -> None:
    given = updates(made(TextEncoder))
    path = write(tmp_path / "a.safetensors", kohya(given, "lora_te1_") | kohya(given, "lora_te2_"))
    refused(
        made(TextEncoder),
        path,
        "'lora_te1_layers_0_out_proj' and 'lora_te2_layers_0_out_proj' both mean",
        "text_encoder_2",
    )
    both = nn.ModuleDict({"text_encoder": made(TextEncoder), "text_encoder_2": made(TextEncoder)})
    assert len(gw.load(both, path).sites) == 2 * len(given)


def test_a_name_that_means_two_modules(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.a = nn.Linear(4, 4), nn.ModuleDict({"b": nn.Linear(4, 4)})

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.a["b"](self.a_b(x[..., :4]))

    m = made(Twins)
    down, up = torch.ones(1, 4), torch.ones(4, 1)
    refused(m, write(tmp_path / "a.safetensors", kohya({"a.b": (down, up, 1.0)})), "several modules: a.b, a_b")
    gw.graft(m, "lora(r=2, at='/a/')", "a", head=False)
    with pytest.raises(gw.GraftError, match="the same name"):
        gw.save(m, "a", tmp_path / "out", format="kohya")
    assert not (tmp_path / "out").exists()
    gw.save(m, "a", tmp_path / "out", format="diffusers")


def test_three_factors_of_a_convolution(tmp_path: Path) -> None:
    """up mid down: dW[o, i, k] = s sum_ab up[o, a] mid[a, b, k] down[b, i]."""
    m, name, r = made(UNet), "lora_unet_down_blocks_0_conv1", 3
    up, mid, down = draw(8, r, 1, 1), draw(r, r, 3, 3, seed=1), draw(r, 8, 1, 1, seed=2)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid, f"{name}.lora_down.weight": down}
    right = made(UNet)
    update = torch.einsum("oa,abkl,bi->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    with torch.no_grad():
        right.down_blocks[0].conv1.weight += 2.0 / r * update
    gw.load(m, write(tmp_path / "a.safetensors", tensors | {f"{name}.alpha": torch.tensor(2.0)}))
    close(run(m), run(right))


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_dora_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    """W' = m V / |V|, V = W + s up down, |V| of each row."""
    m, path = made(UNet), "down_blocks.0.attn2.to_k"
    (down, up), scale = factors(m, path, 2), draw(8).abs() + 0.5
    name = "lora_unet_" + path.replace(".", "_")
    tensors = kohya({path: (down, up, 3.0)}) | {f"{name}.dora_scale": scale.reshape(shape)}
    right = with_lora(m, {path: (down, up, 1.5)})
    with torch.no_grad():
        w = right.get_submodule(path).weight
        w *= (scale / w.norm(dim=1))[:, None]
    gw.load(m, write(tmp_path / "a.safetensors", tensors), "a")
    close(run(m), run(right))
    gw.save(m, "a", tmp_path / "b.safetensors", format="kohya")
    assert safetensors.torch.load_file(tmp_path / "b.safetensors")[f"{name}.dora_scale"].flatten().equal(scale)
    gw.save(m, "a", tmp_path / "d", format="diffusers")
    gw.load(new := made(UNet), tmp_path / "d")
    assert run(new).equal(run(m))


def test_magnitudes_per_input_are_refused(tmp_path: Path) -> None:
    path = "down_blocks.0.attn2.to_q"
    tensors = kohya({path: (*factors(made(UNet), path, 2), 1.0)})
    tensors |= {"lora_unet_down_blocks_0_attn2_to_q.dora_scale": torch.ones(1, 8)}
    refused(made(UNet), write(tmp_path / "a.safetensors", tensors), "dora_scale", "[1, 8], expected [8, 1]")


@pytest.mark.parametrize(
    ("part", "word"), [("oft_blocks", "OFT"), ("boft_blocks", "BOFT"), ("diff", "full"), ("glora_a1", "GLoRA")]
)
def test_other_methods_are_refused_by_name(part: str, word: str, tmp_path: Path) -> None:
    tensors = {f"lora_unet_conv_in.{part}": torch.ones(2, 2), "lora_unet_conv_in.alpha": torch.tensor(1.0)}
    refused(made(UNet), write(tmp_path / "a.safetensors", tensors), word, "not read")


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    m = made(UNet)
    tensors = kohya(updates(m))
    lacking = {k: v for k, v in tensors.items() if k != "lora_unet_conv_in.lora_up.weight"}
    path = write(tmp_path / "a.safetensors", lacking)
    refused(m, path, "1 missing: lora_unet_conv_in.lora_up.weight")
    wrong = tensors | {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 5, 3, 3)}
    refused(m, write(tmp_path / "b.safetensors", wrong), "[2, 5, 3, 3], expected [2, 3, 3, 3]")
    wrong = tensors | {"lora_unet_conv_in.alpha": torch.ones(2)}
    refused(m, write(tmp_path / "c.safetensors", wrong), "lora_unet_conv_in.alpha", "one real number")
    with pytest.warns(UserWarning, match="lora_up"):
        assert len(gw.load(m, path, "a", partial=True).sites) == len(layers(m)) - 1


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya({p: u for p, u in updates(made(UNet)).items() if "attn2" in p}))
    refused(made(TextEncoder), path, "belong nowhere", "lora_unet_down_blocks_0_attn2_to_q")


def test_several_files_in_a_folder(tmp_path: Path) -> None:
    tensors = kohya(updates(made(UNet)))
    write(tmp_path / "a.safetensors", tensors)
    write(tmp_path / "b.safetensors", tensors)
    refused(made(UNet), tmp_path, "2 files of LoRA: a.safetensors, b.safetensors", "name the file")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"conv_in.weight": torch.ones(2)})
    refused(made(UNet), path, "a file; an adapter is a folder")
    path.write_bytes(path.read_bytes()[:20])
    refused(made(UNet), path, "damaged")


def new_names(given: dict[str, Update], lead: str = "unet.") -> dict[str, Tensor]:
    sides = {"A": 0, "B": 1}
    return {f"{lead}{p}.lora_{s}.weight": u[i] for p, u in given.items() for s, i in sides.items()}


def test_diffusers_with_its_header(tmp_path: Path) -> None:
    """alpha from alpha_pattern, else lora_alpha, over the rank of each module."""
    m = made(UNet)
    given = updates(m)
    special = next(p for p, u in given.items() if u[2] == 3.0)
    given = {p: (down, up, 3.0 if p == special else 1.5) for p, (down, up, _) in given.items()}
    header = {
        "unet.r": 2,
        "unet.rank_pattern": {p: 3 for p, u in given.items() if len(u[0]) == 3},
        "unet.lora_alpha": 1.5,
        "unet.alpha_pattern": {special: 3.0},
        "unet.target_modules": sorted(given),
        "unet.init_lora_weights": True,
        "unet.megatron_core": "megatron.core",
    }
    path = write(tmp_path / "p.safetensors", new_names(given), lora_adapter_metadata=json.dumps(header))
    right = expected(m, given)
    gw.load(m, path)
    close(run(m), right)
    gw.save(m, "p", tmp_path / "back", format="diffusers")
    file = tmp_path / "back" / "pytorch_lora_weights.safetensors"
    back, before = safetensors.torch.load_file(file), new_names(given)
    assert back.keys() == before.keys() and all(back[k].equal(before[k]) for k in back)
    gw.load(again := made(UNet), file)
    assert run(again).equal(run(m))


def test_diffusers_with_numbers_beside_or_none(tmp_path: Path) -> None:
    m = made(UNet)
    given = updates(m)
    alphas = {f"unet.{p}.alpha": torch.tensor(u[2]) for p, u in given.items()}
    gw.load(m, write(tmp_path / "a.safetensors", new_names(given) | alphas))
    close(run(m), expected(made(UNet), given))
    gw.load(m, write(tmp_path / "b.safetensors", new_names(given)))
    close(run(m), expected(made(UNet), given, alphas=False))


def test_older_names(tmp_path: Path) -> None:
    """.lora.down, lora_linear_layer, and to_q_lora of attention processors, with to_out for to_out.0 and q_proj as to_q."""
    pipe = made(Pipeline)
    unet, text = updates(pipe.unet, "attn2"), updates(pipe.text_encoder)
    old = {}
    for path, (down, up, _) in unet.items():
        above, last = path.removesuffix(".0").rsplit(".", 1)
        name = f"unet.{above}.processor.{last}_lora" if "blocks.0" in path else f"unet.{path}.lora"
        old |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    for path, (down, up, _) in text.items():
        above, last = path.rsplit(".", 1)
        first = f"text_encoder.{above}.to_{last.removesuffix('_proj')}_lora"
        name = first if "layers.0" in path else f"text_encoder.{path}.lora_linear_layer"
        old |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    every = {f"unet.{p}": u for p, u in unet.items()} | {f"text_encoder.{p}": u for p, u in text.items()}
    right = expected(pipe, every, alphas=False)
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(old, folder / "pytorch_lora_weights.bin")
    gw.load(pipe, folder)
    close(run(pipe), right)
    gw.save(pipe, "old", tmp_path / "new", format="diffusers")
    back = safetensors.torch.load_file(tmp_path / "new" / "pytorch_lora_weights.safetensors")
    before = new_names(every, "")
    assert back.keys() == before.keys() and all(back[k].equal(before[k]) for k in back)


@pytest.mark.parametrize(
    ("option", "value"),
    [("init_lora_weights", "pissa"), ("bias", "all"), ("layer_replication", [[0, 1]]), ("lora_alpha", "x")],
)
def test_options_in_the_header_are_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    header = json.dumps({"unet.r": 2, f"unet.{option}": value})
    path = write(tmp_path / "a.safetensors", new_names(updates(made(UNet))), lora_adapter_metadata=header)
    refused(made(UNet), path, option, "lora_adapter_metadata")


def test_rslora_and_biases(tmp_path: Path) -> None:
    m = made(UNet)
    a = gw.graft(m, "lora(r=3, alpha=5, rslora=True, at='conv')", "a")
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.1 * draw(*p.shape))
    for format in ("kohya", "diffusers"):
        gw.save(m, "a", tmp_path / format, format=format)
        gw.load(new := made(UNet), tmp_path / format)
        close(run(new), run(m))
    gw.graft(m, "lora(r=3, alpha=5, bias=True, at='conv')", "b")
    with pytest.raises(gw.GraftError, match="changes the bias"):
        gw.save(m, "b", tmp_path / "b", format="kohya")
    gw.save(m, "b", tmp_path / "b", format="diffusers")


@pytest.mark.parametrize("method", ["full(at='/conv_in/')", "bottleneck(at='conv', d=2)", "lora(r=2, at='embed')"])
def test_what_the_formats_cannot_hold(method: str, tmp_path: Path) -> None:
    for format in ("kohya", "diffusers"):
        m = made(Pipeline)
        gw.graft(m, method, "a")
        with pytest.raises(gw.GraftError):
            gw.save(m, "a", tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    m = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    gw.graft(m, "lora(r=2, at='conv')", "a")
    with pytest.raises(gw.GraftError, match="2 groups"):
        gw.save(m, "a", tmp_path / "out", format="kohya")
