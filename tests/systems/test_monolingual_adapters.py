"""Philip et al. 2020: adapters of the source language in the encoder, of the target language in the decoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_models import bert, closed_form, ids, spread, t5
from modal_models import bart

import graftwork as gw
from graftwork.combinators.named import KeyedDelta

pytestmark = pytest.mark.system("monolingual-adapters")
LANGUAGES = ("de", "en", "fr", "it")


def translating(make=t5, **how):
    model = make()
    adapter = gw.graft(model, gw.MonolingualAdapters(LANGUAGES, d=4, **how), "m", head=False)
    spread(adapter)
    return model, adapter


def logits(model, batch: int = 2):
    with torch.no_grad():
        return model(input_ids=ids(batch), decoder_input_ids=ids(batch, seed=5)).logits


def counted(function, who: str, calls: list[str]):
    """The function, noting in `calls` each time that it is called."""

    def call(*args):
        calls.append(who)
        return function(*args)

    return call


@pytest.mark.parametrize("make", [t5, bart])
def test_monolingual_adapters__a_batch_touches_its_two_languages_alone(make):
    model, adapter = translating(make)
    calls = []
    for part, side in zip(adapter.parts, ("src", "tgt"), strict=True):
        assert {site.tower for site in part.sites} == {"encoder" if side == "src" else "decoder"}
        for delta in part.deltas.values():
            assert isinstance(delta, KeyedDelta)
            for name, inner in zip(delta.named, delta.of, strict=True):
                inner.branch = counted(inner.branch, f"{side}:{name}", calls)
    model.train()
    gw.context(model, source="de", target="fr")
    model(input_ids=ids(), labels=ids(seed=5)).loss.backward()
    assert set(calls) == {"src:de", "tgt:fr"} and len(calls) == 4
    for part, language in zip(adapter.parts, ("de", "fr"), strict=True):
        for delta in part.deltas.values():
            for name, inner in zip(delta.named, delta.of, strict=True):
                touched = [p.grad is not None and bool(p.grad.any()) for p in inner.parameters()]
                assert all(touched) if name == language else not any(touched)


def test_monolingual_adapters__training_leaves_the_other_languages_to_the_bit():
    model, adapter = translating()
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for source, target in (("de", "fr"), ("en", "fr")):
        with gw.context(model, source=source, target=target):
            model(input_ids=ids(), labels=ids(seed=5)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in adapter.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n in before if ("/of.0." in n or "/of.1." in n if n.startswith("0/") else "/of.2." in n)}
    assert moved == trained


def test_monolingual_adapters__zero_shot_is_a_stack_of_the_two():
    model, adapter = translating()
    gw.context(model, source="it", target="de")  # a direction that was not trained
    out = logits(model)
    for part, side, language in zip(adapter.parts, ("encoder", "decoder"), ("it", "de"), strict=True):
        plain = gw.graft(model, gw.Bottleneck(d=4, act="relu", norm="before", at=f"{side}.block"), side, head=False)
        for delta, keyed in zip(plain.deltas(), part.deltas.values(), strict=True):
            delta.restore(keyed.of[LANGUAGES.index(language)].state_dict())
    gw.activate(model, "encoder >> decoder")
    assert torch.equal(logits(model), out)
    gw.activate(model, "m")
    with gw.context(model, source="de", target="it"):
        assert not torch.allclose(logits(model), out, atol=1e-3)


def test_monolingual_adapters__grow_with_the_languages_and_bilingual_ones_with_their_square():
    d, layers = 32, 2
    one = layers * (2 * d * 4 + 4 + d + 2 * d)
    for n in (2, 3, 4):
        mono = gw.MonolingualAdapters(LANGUAGES[:n], d=4)
        pairs = gw.MonolingualAdapters(LANGUAGES[:n], d=4, bilingual=True)
        assert closed_form(t5(), mono) == n * 2 * one
        assert closed_form(t5(), pairs) == n * (n - 1) * 2 * one
        assert gw.graft(t5(), mono, head=False).num_parameters == n * 2 * one
    assert closed_form(t5(), gw.MonolingualAdapters(LANGUAGES, d=4, sides="encoder")) == 4 * one


def test_monolingual_adapters__bilingual_ones_have_no_direction_but_their_own():
    model, _ = translating(bilingual=True)
    outputs = []
    for pair in ("de-fr", "fr-de", "de-en"):
        with gw.context(model, pair=pair):
            outputs.append(logits(model))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(outputs, 2))
    with gw.context(model, pair="de-xx"), pytest.raises(gw.GraftError, match="pair 'de-xx'"):
        logits(model)


def test_monolingual_adapters__a_batch_of_two_directions_is_refused():
    model, _ = translating()
    gw.context(model, source="de", target="fr")
    one = logits(model, 3)
    with gw.context(model, source=["de"] * 3, target=torch.tensor([2, 2, 2])):
        assert torch.equal(logits(model, 3), one)
    for how in ({"source": ["de", "de", "en"]}, {"target": ["fr", "it", "fr"]}, {"source": torch.tensor([0, 1, 0])}):
        with gw.context(model, **how), pytest.raises(gw.GraftError, match=r"rows of .* and "):
            logits(model, 3)
    with gw.context(model, source="dee"), pytest.raises(gw.GraftError, match=r"source 'dee'.*\n.*did you mean|'de'"):
        logits(model)
    with gw.context(model, source=None), pytest.raises(gw.GraftError, match=r"gw.context\(model, source"):
        logits(model)


def test_monolingual_adapters__files_and_generation(tmp_path):
    model, _ = translating()
    gw.context(model, source="de", target="fr")
    out = logits(model)
    gw.save(model, "m", tmp_path)
    twin = t5()
    gw.load(twin, tmp_path)
    gw.context(twin, source="de", target="fr")
    assert torch.equal(logits(twin), out)
    given = {"input_ids": ids(), "max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))


def test_monolingual_adapters__any_method_can_be_keyed():
    model, x = bert(), ids()
    adapter = gw.graft(model, gw.Keyed(of=gw.LoRA(r=2), names=("law", "news"), by="domain"), head=False)
    spread(adapter)
    with torch.no_grad():
        outputs = []
        for domain in ("law", "news"):
            gw.context(model, domain=domain)
            outputs.append(model(x).logits)
        assert not torch.allclose(*outputs, atol=1e-4)
        gw.merge(model)  # for the news
        gw.context(model, domain="law")
        torch.testing.assert_close(model(x).logits, outputs[1])


def test_monolingual_adapters__what_makes_no_sense_is_refused():
    with pytest.raises(gw.GraftError, match="one twice"):
        gw.MonolingualAdapters(("de", "de"))
    with pytest.raises(gw.GraftError, match="no such side"):
        gw.MonolingualAdapters(("de", "fr"), sides="middle")
    with pytest.raises(gw.GraftError, match="not a word"):
        gw.Keyed(by="two words")
    with pytest.raises(gw.GraftError, match="of its own"):
        gw.Keyed(of=gw.AdaLoRA())
    with pytest.raises(gw.GraftError, match="tower"):
        gw.graft(bert(), gw.MonolingualAdapters(("de", "fr")), head=False)
