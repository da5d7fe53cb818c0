"""pyreft's folders, written here as ReftModel.save writes them, against the equations put into the blocks by hooks.

LoReFT  h + R^T (W h + b - R h)    NoReFT  the same, R free, and (R h + c) in the place of R h
DiReFT  h + R^T (W h + b)          NodiReFT  the same, R free
ConsReFT  h + R^T (b - R h)        LobiReFT  h + R^T b
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import graftwork as gw
from graftwork.grafting.root import is_grafted

from .peers import inputs, model, outputs, perturb

D, R, LAYERS = 24, 3, 2
IDS = inputs("llama")["input_ids"]  # [3, 7], no padding
Edit = Callable[[Tensor], Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rotate(nn.Module):
    """pyreft's LowRankRotateLayer: weight R^T [d, r]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(D, R, seed=seed))


def rotation(seed: int) -> nn.Module:
    """The same, parametrised as pyreft does, and moved as training moves it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Rotate(seed)
        nn.init.orthogonal_(made.weight)
        made = parametrizations.orthogonal(made)
        with torch.no_grad():
            made.parametrizations["weight"].original.add_(draw(D, R, seed=seed).tril(-1))
    return made


def intervention(kind: str, seed: int) -> tuple[dict[str, Tensor], Edit]:
    """What pyreft saves of one intervention of this class, and what it computes of h."""
    w, b, free, c = draw(R, D, seed=seed), draw(R, seed=seed + 1), draw(R, D, seed=seed + 2), draw(R, seed=seed + 3)
    layer = rotation(seed)
    turned = layer.weight.detach().clone()
    sizes = {"embed_dim": torch.tensor(D), "interchange_dim": torch.tensor(D)}
    parametrised = sizes | {f"rotate_layer.{k}": v.detach().clone() for k, v in layer.state_dict().items()}
    learned = {"learned_source.weight": w, "learned_source.bias": b}
    return {
        "Loreft": (
            {"weight": w, "bias": b, "rotate_layer": turned},
            lambda h: h + (h @ w.T + b - h @ turned) @ turned.T,
        ),
        "Noreft": (
            sizes | learned | {"proj_layer.weight": free, "proj_layer.bias": c},
            lambda h: h + (h @ w.T + b - (h @ free.T + c)) @ free,
        ),
        "Direft": (parametrised | learned, lambda h: h + (h @ w.T + b) @ turned.T),
        "Nodireft": (
            sizes | learned | {"proj_layer.weight": free, "proj_layer.bias": c},
            lambda h: h + (h @ w.T + b) @ free,
        ),
        "Consreft": (parametrised | {"learned_source": b}, lambda h: h + (b - h @ turned) @ turned.T),
        "Lobireft": (parametrised | {"learned_source": b}, lambda h: h + b @ turned.T),
    }[kind]


def folder(
    place: Path, kind: str, tied: bool, position: str = "f2+l1", **given: Any
) -> tuple[Path, dict[tuple[int, int], Edit]]:
    """A folder of pyreft's, and what it computes at (layer, turn)."""
    place.mkdir(parents=True, exist_ok=True)
    edits, keys, representations = {}, [], []
    for turn in range(1 if tied else 2):
        for layer in range(LAYERS):
            tensors, edits[layer, turn] = intervention(kind, 10 * layer + 100 * turn)
            keys.append(f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{turn}")
            representations.append([layer, "block_output", "pos", 1, R, *[None] * 9])
            torch.save(tensors, place / f"intkey_{keys[-1]}.bin")
    config = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [D] * len(keys),
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(keys),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
        "transformers_version": "4.45.1",
    }
    (place / "config.json").write_text(json.dumps(config | given))
    (place / "args.json").write_text(
        json.dumps({"position": position, "share_weights": tied, "act_fn": None, "rank": R})
    )
    return place, edits


@torch.no_grad()
def edited(edits: dict[tuple[int, int], Edit], first: list[int], last: list[int], name: str = "llama") -> Tensor:
    """The logits with the edits at the first positions by turn 0, and at the last ones by the last turn."""
    m = model(name)
    for layer, block in enumerate(m.model.layers):

        def hook(module: nn.Module, args: Any, out: Tensor, layer: int = layer) -> Tensor:
            new = out.clone()
            new[:, first] = edits[layer, 0](out[:, first])
            new[:, last] = edits[layer, max(turn for _, turn in edits)](out[:, last])
            return new

        block.register_forward_hook(hook)
    return m(IDS).logits


@torch.no_grad()
def logits(m: nn.Module) -> Tensor:
    return m(IDS).logits


KINDS = ("Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_intervention_is_its_equation(kind: str, tied: bool, tmp_path: Path) -> None:
    place, edits = folder(tmp_path / "reft", kind, tied)
    right = edited(edits, [0, 1], [6])
    m = model("llama")
    assert (right - logits(m)).abs().max() > 1e-2
    adapter = gw.load(m, place)
    assert adapter.name == "reft" and adapter.methods[0].tied == tied
    assert (logits(m) - right).abs().max() <= 1e-5

    gw.save(m, "reft", tmp_path / "back", format="pyreft")
    gw.load(again := model("llama"), tmp_path / "back")
    assert logits(again).equal(logits(m))
    assert json.loads((tmp_path / "back" / "args.json").read_text()) == {"position": "f2+l1", "share_weights": tied}
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "back", place))
    assert ours == {k: v for k, v in theirs.items() if k != "transformers_version"}


@pytest.mark.parametrize("kind", KINDS)
def test_pyreft_computes_the_same_from_ours(kind: str, tmp_path: Path) -> None:
    """Every file has pyreft's names and shapes, and torch's parametrisation makes R of it again to the bit."""
    place, _ = folder(tmp_path / "reft", kind, True)
    gw.load(m := model("llama"), place, "a")
    gw.save(m, "a", tmp_path / "back", format="pyreft")
    for path in place.glob("*.bin"):
        before, ours = (torch.load(p, weights_only=True) for p in (path, tmp_path / "back" / path.name))
        # the bias of the projection is taken into b, or has never been used
        assert {k: v.shape for k, v in ours.items()} == {
            k: v.shape for k, v in before.items() if k != "proj_layer.bias"
        }
        if "rotate_layer.parametrizations.weight.original" not in ours:
            same = [k for k in ours if not (kind == "Noreft" and k == "learned_source.bias")]
            assert all(ours[k].equal(before[k]) for k in same)
            continue
        turned = []
        for tensors in (before, ours):
            layer = rotation(0)
            layer.load_state_dict({k.removeprefix("rotate_layer."): v for k, v in tensors.items() if "rotate" in k})
            turned.append(layer.weight.detach())
        assert turned[0].equal(turned[1])
        base = ours["rotate_layer.parametrizations.weight.0.base"]
        assert (base.T @ base - torch.eye(D)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("position", "first", "last"),
    [("f1", [0], []), ("l2", [], [5, 6]), ("f3+l2", [0, 1, 2], [5, 6]), ("all", [*range(7)], [])],
)
def test_positions(position: str, first: list[int], last: list[int], tmp_path: Path) -> None:
    place, edits = folder(tmp_path / "reft", "Loreft", True, position)
    gw.load(m := model("llama"), place, "a")
    assert (logits(m) - edited(edits, first, last)).abs().max() <= 1e-5
    gw.save(m, "a", tmp_path / "back", format="pyreft")
    assert json.loads((tmp_path / "back" / "args.json").read_text())["position"] == position


def test_modules_by_their_path(tmp_path: Path) -> None:
    """model.layers[1].output, as pyreft writes for models whose parts pyvene has no names for."""
    tensors, edit = intervention("Loreft", 0)
    representation = [None, "model.layers[1].output", "pos", 1, R, *[None] * 9]
    place, _ = folder(
        tmp_path / "reft",
        "Loreft",
        True,
        "f1",
        representations=[representation],
        intervention_types=["x.LoreftIntervention'>"],
    )
    torch.save(tensors, place / "intkey_comp_model_layers[1]_output_unit_pos_nunit_1#0.bin")
    gw.load(m := model("llama"), place, "a")
    same: Edit = lambda h: h  # noqa: E731
    assert (logits(m) - edited({(0, 0): same, (1, 0): edit}, [0], [])).abs().max() <= 1e-5


def test_an_activation_is_trained_with_and_kept(tmp_path: Path) -> None:
    place, _ = folder(tmp_path / "reft", "Direft", True, "all")
    arguments = json.loads((place / "args.json").read_text())
    (place / "args.json").write_text(json.dumps(arguments | {"act_fn": "relu"}))
    gw.load(m := model("llama"), place, "a")
    edits: dict[tuple[int, int], Edit] = {}
    for layer in range(LAYERS):
        t, turned = intervention("Direft", 10 * layer)[0], rotation(10 * layer).weight.detach()

        def edit(h: Tensor, t: dict[str, Tensor] = t, turned: Tensor = turned) -> Tensor:
            return h + torch.relu(h @ t["learned_source.weight"].T + t["learned_source.bias"]) @ turned.T

        edits[layer, 0] = edit
    assert (logits(m) - edited(edits, [*range(7)], [])).abs().max() <= 1e-5
    with pytest.raises(gw.GraftError, match="keeps no activation"):
        gw.save(m, "a", tmp_path / "back", format="pyreft")


def test_own_adapters_go_there_and_back(tmp_path: Path) -> None:
    for at in ("block", "mlp", "attn"):
        m = model("llama")
        adapter = gw.graft(m, f"loreft(r=2, positions='p2+s2', tied=False, at='{at}', layers='1')", "a", head=False)
        perturb(adapter.parameters())
        gw.save(m, "a", tmp_path / at, format="pyreft")
        gw.load(again := model("llama"), tmp_path / at)
        assert (logits(again) - logits(m)).abs().max() <= 1e-6
        assert (logits(again) - logits(model("llama"))).abs().max() > 1e-3


def refused(place: Path, *words: str) -> None:
    m = model("llama")
    before = logits(m)
    with pytest.raises(gw.GraftError) as error:
        gw.load(m, place, "a")
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert not is_grafted(m) and logits(m).equal(before)


KEY = "layer_0_comp_block_output_unit_pos_nunit_1#0"


def representation(**fields: Any) -> list[list[Any]]:
    names = (
        "layer",
        "component",
        "unit",
        "max_number_of_units",
        "low_rank_dimension",
        "type",
        "intervention",
        "subspace_partition",
    )
    values = {
        "layer": 0,
        "component": "block_output",
        "unit": "pos",
        "max_number_of_units": 1,
        "low_rank_dimension": R,
    } | fields
    return [[values.get(name) for name in names]]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"intervention_types": ["<class 'pyvene.models.interventions.VanillaIntervention'>"] * 2},
            ("VanillaIntervention",),
        ),
        ({"mode": "serial"}, ("mode = 'serial'",)),
        ({"representations": []}, ("no representations",)),
        ({"representations": 3}, ("no representations",)),
        (
            {"representations": representation(unit="h.pos"), "intervention_types": ["LoreftIntervention"]},
            ("unit = 'h.pos'",),
        ),
        (
            {
                "representations": representation(subspace_partition=[[0, 1]]),
                "intervention_types": ["LoreftIntervention"],
            },
            ("subspace",),
        ),
        ({"representations": representation(layer=7), "intervention_types": ["LoreftIntervention"]}, ("of layer 7",)),
        (
            {"representations": representation(component="query_output"), "intervention_types": ["LoreftIntervention"]},
            ("query_output",),
        ),
        (
            {
                "representations": representation(component="../../x.output"),
                "intervention_types": ["LoreftIntervention"],
            },
            ("../../x.output",),
        ),
    ],
)
def test_what_the_config_says_and_is_not_supported(
    config: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    refused(folder(tmp_path / "reft", "Loreft", True, **config)[0], *words)


def test_positions_must_be_known(tmp_path: Path) -> None:
    place, _ = folder(tmp_path / "reft", "Loreft", True)
    for text in ('{"position": 3}', '{"position": "x1"}', '{"position": "f1+l1", "act_fn": ["relu"]}'):
        (place / "args.json").write_text(text)
        refused(place)
    (place / "args.json").unlink()
    refused(place, "which positions", '{"position": "f1+l1"}')
    place, _ = folder(tmp_path / "two", "Loreft", False, "f2")
    refused(place, "2 interventions", "'f2'")


def test_tensors_that_are_not_there_or_do_not_fit(tmp_path: Path) -> None:
    place, _ = folder(tmp_path / "reft", "Noreft", True)
    file = place / f"intkey_{KEY}.bin"
    good = torch.load(file, weights_only=True)
    for changed, word in (
        ({k: v for k, v in good.items() if k != "proj_layer.weight"}, "1 missing"),
        (good | {"more": torch.ones(2)}, "1 that belong nowhere"),
        (good | {"proj_layer.weight": torch.ones(R, D + 1)}, f"expected [{R}, {D}]"),
        (good | {"proj_layer.bias": torch.ones(R + 1)}, "proj_layer.bias"),
        (good | {"embed_dim": torch.tensor(99)}, "embed_dim"),
        (good | {"learned_source.bias": torch.full((R,), torch.nan)}, "not finite"),
    ):
        torch.save(changed, file)
        refused(place, word)
    file.unlink()
    refused(place, f"no intkey_{KEY}.bin")


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    place, _ = folder(tmp_path / "reft", "Loreft", True)
    torch.save({"weight": Code()}, place / f"intkey_{KEY}.bin")
    refused(place, "damaged")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method", ["lora(r=2)", "loreft(r=2) + lora(r=2)", "loreft(r=2, at='linear')", "loreft(r=2, act='relu')"]
)
def test_what_pyreft_cannot_hold(method: str, tmp_path: Path) -> None:
    m = model("llama")
    gw.graft(m, method, "a", head=False)
    with pytest.raises(gw.GraftError):
        gw.save(m, "a", tmp_path / "out", format="pyreft")
    assert not (tmp_path / "out").exists()


def test_half_precision(tmp_path: Path) -> None:
    """Folders of models in bfloat16, whose rotation torch computes in float32."""
    place, edits = folder(tmp_path / "reft", "Direft", True)
    for path in place.glob("*.bin"):
        torch.save({k: v.bfloat16() if v.is_floating_point() else v for k, v in torch.load(path).items()}, path)
    gw.load(m := model("llama"), place, "a")
    assert (logits(m) - edited(edits, [0, 1], [6])).abs().max() <= 2e-2
    assert (outputs(m, "llama") - outputs(model("llama"), "llama")).abs().max() > 2e-2
