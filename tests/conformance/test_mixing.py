"""Methods that mix adapters, over members of several kinds on several hosts: the promises of the suite, with the members in place."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.core.method import REGISTRY

from .cases import Snapshot, close, gradients, is_base, leave_init, loss, train
from .hosts import BY_NAME, Host, fresh, output

MEMBERS = {
    "lora": gw.LoRA(r=3),
    "ia3": gw.IA3(),
    "bottleneck": gw.Bottleneck(d=5, init="bert"),
    "sum": gw.Bottleneck(d=5, position="sum", at="mlp", init="bert"),
    "prefix": gw.Prefix(length=3, reparam="flat"),
}
HOSTS = {
    "lora": "linear_square linear_wide conv1d conv2d embedding packed_qkv bert llama gpt2 t5 vit",
    "ia3": "linear_wide bert llama",
    "bottleneck": "linear_square conv2d encoder bert llama gpt2 t5 vit",
    "sum": "llama gpt2 t5",
    "prefix": "bert llama t5",
}
MIXERS = {
    "fusion": {"residual": False},
    "weighted": {},
    "uniform": {},
    "arrow": {"top_k": 1},
}
ONLY_LORA = ("arrow",)  # of linear layers
UNTRAINED = ("key_bias",)  # a constant on all scores


@dataclass(frozen=True)
class Mix:
    """A mixing method over two adapters of one kind on a host."""

    name: str
    members: str
    host: Host

    @property
    def method(self) -> gw.Method:
        return REGISTRY[self.name](of=("m0", "m1"), **MIXERS[self.name])

    def __str__(self) -> str:
        return f"{self.name}-{self.members}-{self.host}"


def _mixes() -> list[Mix]:
    out = []
    for name in MIXERS:
        for members, hosts in HOSTS.items():
            for host in hosts.split():
                linear = members == "lora" and host not in ("conv1d", "conv2d", "embedding")
                if linear or name not in ONLY_LORA:
                    out.append(Mix(name, members, BY_NAME[host]))
    return out


MIXES = _mixes()
TRAINED = [mix for mix in MIXES if REGISTRY[mix.name].trains]
every = pytest.mark.parametrize("mix", MIXES, ids=str)
trained = pytest.mark.parametrize("mix", TRAINED, ids=str)


def on(*hosts: str, only: list[Mix] = MIXES, slow: str = "") -> pytest.MarkDecorator:
    """The mixtures on these hosts, and on one that is left to `make slow`."""
    chosen = [mix for mix in only if mix.host.name in (*hosts, slow)]
    marked = [pytest.param(mix, marks=pytest.mark.slow if mix.host.name == slow else ()) for mix in chosen]
    return pytest.mark.parametrize("mix", marked, ids=str)


def with_members(mix: Mix, model: nn.Module | None = None) -> nn.Module:
    """The host with the two members, away from their initial values."""
    model = fresh(mix.host) if model is None else model
    method = MEMBERS[mix.members]
    if mix.host.at is not None:
        method = type(method)(
            **{**{k: v for k, v in vars(method).items() if k not in ("at", "layers")}, "at": mix.host.at}
        )
    for seed in range(2):
        leave_init(gw.graft(model, method, f"m{seed}", head=False, seed=seed), seed=seed)
    return model


def mixed(mix: Mix, name: str = "a", noise: bool = True, model: nn.Module | None = None):
    """The members and the mixture of them."""
    model = with_members(mix) if model is None else model
    adapter = gw.graft(model, mix.method, name, head=False, seed=0)
    if noise:
        leave_init(adapter, seed=5)
    return model, adapter


def test_every_mixing_method_is_here():
    assert {name for name, made in REGISTRY.items() if made.mixes and made.__module__.startswith("graftwork.")} == set(
        MIXERS
    )


@every
def test_the_mixture_is_neither_member_nor_the_backbone_and_the_same_in_both_modes(mix: Mix):
    inputs = mix.host.inputs()
    model, _ = mixed(mix)
    acting = output(model, inputs)
    for other in ("m0", "m1", None):
        with gw.using(model, other):
            assert (output(model, inputs) - acting).abs().max() > 1e-5, other
    close(output(model.train(), inputs), acting)


@every
def test_the_backbone_and_the_members_keep_their_bits(mix: Mix):
    inputs = mix.host.inputs()
    model = with_members(mix)
    before = Snapshot(model)
    own = {n: {k: v.clone() for k, v in gw.adapters(model)[n].state_dict().items()} for n in ("m0", "m1")}
    alone = {n: _of(model, n, inputs) for n in ("m0", "m1")}
    _, adapter = mixed(mix, model=model)
    assert adapter.num_parameters == sum(mix.method.count(site) for site in adapter.sites)
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    if adapter.num_parameters:
        train(model, adapter, inputs, range(2), 2)
    before.same_weights(model)
    for name, state in own.items():
        assert all(torch.equal(v, state[k]) for k, v in gw.adapters(model)[name].state_dict().items())
        assert torch.equal(_of(model, name, inputs), alone[name])
    gw.remove(model, "a")
    gw.activate(model, before.active)
    before.same(model)
    for name in ("m0", "m1"):
        gw.remove(model, name)
    Snapshot(fresh(mix.host)).same_bits(model)


def _of(model: nn.Module, name: str, inputs) -> torch.Tensor:
    with gw.using(model, name):
        return output(model, inputs)


@trained
def test_gradients_go_to_the_mixture_and_to_all_of_it(mix: Mix):
    model, adapter = mixed(mix)
    model.train()
    (loss(model, mix.host.inputs()) + gw.auxiliary_loss(model)).backward()
    own = {id(p) for p in adapter.parameters()}
    assert all(p.requires_grad == (id(p) in own) and (id(p) in own or p.grad is None) for p in model.parameters())
    idle = [
        n for n, p in adapter.named_parameters() if (p.grad is None or not p.grad.any()) and not n.endswith(UNTRAINED)
    ]
    assert not idle, f"never trained: {idle}"


@trained
def test_training_lowers_the_loss(mix: Mix):
    inputs = mix.host.inputs()
    model, adapter = mixed(mix, noise=False)
    before = loss(model, inputs).item()
    train(model, adapter, inputs, range(12), 12, lr=0.5 if mix.name == "weighted" else 0.05)  # two numbers a place
    assert loss(model, inputs).item() < before


@every
def test_saved_and_loaded_is_the_same_to_the_bit(mix: Mix, tmp_path: Path):
    inputs = mix.host.inputs()
    model, adapter = mixed(mix)
    for name in ("m0", "m1", "a"):
        gw.save(model, name, tmp_path / name)
    twin = fresh(mix.host)
    with pytest.raises(GraftError, match="m0"):
        gw.load(twin, tmp_path / "a")
    assert gw.adapters(twin) == {} and not any(not is_base(name) for name, _ in twin.named_modules())
    for name in ("m0", "m1", "a"):
        loaded = gw.load(twin, tmp_path / name)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    assert loaded.methods == adapter.methods and not any(p.requires_grad for p in twin.parameters())


@every
def test_copies_are_whole_and_apart(mix: Mix):
    inputs = mix.host.inputs()
    model, _ = mixed(mix)
    out = output(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(output(twin, inputs), out)
        leave_init(gw.adapters(twin)["m0"], seed=9)
        assert not torch.equal(output(twin, inputs), out)
        assert torch.equal(output(model, inputs), out)


@every
def test_the_meta_device_allocates_nothing(mix: Mix):
    with torch.device("meta"):
        model = mix.host.make()
    model = with_members(mix, model)
    if mix.name in ONLY_LORA:  # its prototypes are numbers, made in the pass
        return
    adapter = gw.graft(model, mix.method, "a", head=False)
    assert all(t.is_meta for m in adapter.modules() for t in (*m.parameters(), *m.buffers()))


@trained
def test_checkpointing_gives_the_same_gradients(mix: Mix):
    inputs = mix.host.inputs()
    if not mix.host.whole or mix.host.name in ("packed_qkv", "encoder"):
        return
    model, adapter = mixed(mix)
    model.train()
    loss(model, inputs).backward()
    plain = gradients(adapter)
    for p in adapter.parameters():
        p.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss(model, inputs).backward()
    again = gradients(adapter)
    assert again.keys() == plain.keys()
    for name, grad in plain.items():
        close(again[name], grad, 1e-5)


@on("llama", "gpt2", "t5")
def test_generate_with_and_without_the_cache_agrees(mix: Mix):
    model, _ = mixed(mix)
    ids = torch.tensor([[0, 0, 9, 17, 5], [8, 30, 22, 6, 40]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    given = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **given, use_cache=True)
    plain = model.generate(**inputs, **given, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits), 1e-4)


@on("linear_wide", "linear_square", slow="llama")
def test_compile_fullgraph_equals_eager(mix: Mix):
    torch.compiler.reset()
    inputs = mix.host.inputs()
    model, _ = mixed(mix)
    eager = output(model, inputs)
    close(output(torch.compile(model, fullgraph=True, backend="eager"), inputs), eager)


@on("linear_wide", "bert", "llama")
def test_bfloat16_and_autocast(mix: Mix):
    inputs = mix.host.inputs()
    model, _ = mixed(mix)
    exact = output(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        close(output(model, inputs), exact, 0.1)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    model = with_members(mix, fresh(mix.host).bfloat16())
    _, adapter = mixed(mix, model=model)
    assert {p.dtype for p in adapter.parameters()} <= {torch.bfloat16}
    out = output(model, half)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


@on("bert", "linear_square")
def test_a_member_that_is_gone_is_named(mix: Mix):
    model, _ = mixed(mix)
    gw.remove(model, "m0")
    assert gw.active(model) is None
    with pytest.raises(GraftError, match="m0"):
        gw.activate(model, "a")
