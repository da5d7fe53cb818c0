"""Wang et al. 2021: weights of several adapters at every layer, found for each sentence by the entropy of the prediction."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids
from routing_models import members
from value_models import randomly

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("emea")

LANGUAGES = ["en", "hi", "ar"]
METHODS = [
    pytest.param(gw.Pfeiffer(d=4), id="pfeiffer"),
    pytest.param(gw.LoRA(r=2, at="q, up"), id="lora"),
    pytest.param(gw.Prefix(length=3), id="prefix"),
]


def ensemble(methods=None, names=LANGUAGES, task: bool = True, dtype=torch.float64):
    """A BERT with a sharp head, language adapters, and a task adapter to stand behind them."""
    model = bert().to(dtype)
    model.classifier.weight.data *= 50
    members(model, gw.Pfeiffer(d=4) if methods is None else methods, names)
    if task:
        randomly(model, gw.Bottleneck(d=4, at="mlp"), "ner", 9)
    gw.activate(model, None)
    return model


def batch(rows: int = 2, seed: int = 3):
    return {"input_ids": ids(rows, seed=seed)}


def entropy(model, *, start, **given) -> torch.Tensor:
    """H [batch] for given logits."""
    return gw.emea(model, LANGUAGES, batch(), steps=0, start=start, **given).entropy[-1]


@pytest.mark.parametrize("behind", [None, "ner"])
@pytest.mark.parametrize("methods", METHODS)
def test_emea__no_step_is_the_mean_of_the_adapters_at_every_layer(methods, behind):
    model = ensemble(methods)
    found = gw.emea(model, LANGUAGES, batch(), steps=0, behind=behind)
    mean = f'route({", ".join(LANGUAGES)}, by="uniform")'
    with torch.no_grad(), gw.using(model, mean if behind is None else f"{mean} >> {behind}"):
        torch.testing.assert_close(found.output.logits, model(**batch()).logits)
    with torch.no_grad(), gw.using(model, gw.mean(*LANGUAGES) if behind is None else gw.mean(*LANGUAGES) >> behind):
        torch.testing.assert_close(found.output.logits, model(**batch()).logits)
    assert found.entropy.shape == (1, 2)
    assert all(w.shape == (2, 3) and torch.equal(w, torch.full_like(w, 1 / 3)) for w in found.weights.values())
    assert found.weights.keys() == {site.key for site in gw.adapters(model)["en"].sites}


def test_emea__a_single_adapter_is_itself_after_any_steps():
    model = ensemble()
    found = gw.emea(model, ["en"], batch(), steps=10, behind="ner")
    with torch.no_grad(), gw.using(model, "en >> ner"):
        torch.testing.assert_close(found.output.logits, model(**batch()).logits)
    assert all((w == 1).all() for w in found.weights.values())
    assert (found.entropy == found.entropy[0]).all()


@pytest.mark.parametrize("methods", METHODS)
def test_emea__the_gradient_is_that_of_finite_differences(methods):
    model = ensemble(methods)
    gamma, e = 1e-3, 1e-5
    one = gw.emea(model, LANGUAGES, batch(), steps=0, behind="ner")
    generator = torch.Generator().manual_seed(0)
    start = {key: torch.randn(a.shape, generator=generator, dtype=torch.float64) for key, a in one.logits.items()}
    stepped = gw.emea(model, LANGUAGES, batch(), steps=1, gamma=gamma, behind="ner", start=start)
    largest = 0.0
    for key in start:  # every layer has weights of its own
        for n in range(3):

            def moved(by, key=key, n=n):
                shift = torch.zeros(2, 3, dtype=torch.float64)
                shift[:, n] = by
                return entropy(model, start=start | {key: start[key] + shift}, behind="ner")

            wanted = (moved(e) - moved(-e)) / (2 * e)  # of each row: rows do not depend on each other
            found = (start[key] - stepped.logits[key])[:, n] / gamma
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
            largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-4


def test_emea__a_small_step_does_not_raise_the_entropy():
    model = ensemble()
    h = gw.emea(model, LANGUAGES, batch(8), steps=1, gamma=1e-2).entropy
    assert (h[1] < h[0]).all()
    slopes = [(0.5 - a) / 1e-2 for a in gw.emea(model, LANGUAGES, batch(8), steps=1, gamma=1e-2).logits.values()]
    first_order = -1e-2 * sum(g.square().sum(-1) for g in slopes)
    torch.testing.assert_close(h[1] - h[0], first_order, atol=1e-6, rtol=0.05)
    ten = gw.emea(model, LANGUAGES, batch(8), steps=10, gamma=1e-1).entropy
    assert ten.shape == (11, 8) and (ten[-1] < ten[0]).all()


def test_emea__nothing_changes_and_the_order_of_sentences_does_not_matter():
    model = ensemble(dtype=torch.float32)
    gw.activate(model, "en >> ner")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    sentences = [batch(1, seed=s) for s in range(4)]
    state = torch.random.get_rng_state()

    def predict(order):
        return {i: gw.emea(model, LANGUAGES, sentences[i], steps=3, behind="ner") for i in order}

    forwards, backwards = predict([0, 1, 2, 3]), predict([3, 2, 1, 0])
    assert all(torch.equal(forwards[i].output.logits, backwards[i].output.logits) for i in range(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert set(gw.adapters(model)) == {*LANGUAGES, "ner"} and gw.active(model) == "en >> ner"
    # a batch is its rows, each with weights of its own
    together = gw.emea(
        model, LANGUAGES, {"input_ids": torch.cat([s["input_ids"] for s in sentences])}, steps=3, behind="ner"
    )
    for i in range(4):
        torch.testing.assert_close(together.output.logits[i], forwards[i].output.logits[0], atol=1e-4, rtol=1e-4)
        for key, w in together.weights.items():
            torch.testing.assert_close(w[i], forwards[i].weights[key][0], atol=1e-4, rtol=1e-4)
    assert any((w[0] - w[1]).abs().max() > 1e-2 for w in together.weights.values())
    # kept from one sentence to the next, where that is asked for: the order matters
    kept = gw.emea(model, LANGUAGES, sentences[1], steps=3, behind="ner", start=forwards[0].logits)
    assert not torch.equal(kept.output.logits, forwards[1].output.logits)
    assert torch.equal(
        kept.entropy[0],
        gw.emea(model, LANGUAGES, sentences[1], steps=0, behind="ner", start=forwards[0].logits).entropy[0],
    )


def test_emea__identical_adapters_have_no_gradient():
    model = ensemble()
    for name in ("hi", "ar"):
        for p, q in zip(gw.adapters(model)[name].parameters(), gw.adapters(model)["en"].parameters(), strict=True):
            p.data = q.data.clone()
    found = gw.emea(model, LANGUAGES, batch(), steps=1, gamma=1.0, behind="ner")
    for a in found.logits.values():
        torch.testing.assert_close(a, torch.full_like(a, 0.5), atol=1e-12, rtol=0)


def test_emea__the_entropy_is_a_mean_over_labelled_tokens():
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=60, num_labels=5
    )
    model = BertForTokenClassification(config).eval().double()
    model.classifier.weight.data *= 50
    members(model, gw.Pfeiffer(d=4), LANGUAGES)
    x = ids(2, 7)
    shown = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    for given in ({"attention_mask": shown}, {}):
        for mask in (None, torch.tensor([[0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]])):
            found = gw.emea(model, LANGUAGES, {"input_ids": x, **given}, steps=2, mask=mask)
            p = torch.softmax(found.output.logits, -1)
            h = -(p * p.log()).sum(-1)
            over = mask if mask is not None else given.get("attention_mask", torch.ones_like(shown))
            wanted = torch.stack([h[i][over[i].bool()].mean() for i in range(2)])
            torch.testing.assert_close(found.entropy[-1], wanted)
    # padding changes nothing: a short sentence alone has the weights that it has in a padded batch
    long = gw.emea(model, LANGUAGES, {"input_ids": x, "attention_mask": shown}, steps=2)
    short = gw.emea(model, LANGUAGES, {"input_ids": x[1:, :4]}, steps=2)
    torch.testing.assert_close(long.output.logits[1:, :4], short.output.logits)
    for key, w in short.weights.items():
        torch.testing.assert_close(long.weights[key][1:], w)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"of": ["en", "nobody"]}, "nobody"),
        ({"of": []}, "no adapter"),
        ({"of": ["en", "en"]}, "twice"),
        ({"behind": "nobody"}, "nobody"),
        ({"steps": -1}, "not a number of steps"),
        ({"gamma": float("nan")}, "no finite number"),
        ({"start": {}}, "in one and not in the other"),
        ({"batch": {}}, "no tensor"),
        ({"batch": {"input_ids": torch.full((1, 3), 99)}}, None),
    ],
)
def test_emea__errors_leave_the_model_as_it_was(given, found):
    model = ensemble()
    gw.activate(model, "hi")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    asked = {"of": LANGUAGES, "batch": batch(), **given}
    with pytest.raises(GraftError if found else IndexError, match=found):
        gw.emea(model, asked.pop("of"), asked.pop("batch"), **asked)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert gw.active(model) == "hi" and set(gw.adapters(model)) == {*LANGUAGES, "ner"}
    with pytest.raises(GraftError, match="in training"):
        gw.emea(model.train(), LANGUAGES, batch())
    with pytest.raises(GraftError, match=r"\[5, 3\]"):
        gw.emea(
            model.eval(),
            LANGUAGES,
            batch(),
            start={site.key: torch.zeros(5, 3) for site in gw.adapters(model)["en"].sites},
        )


def test_emea__each_row_has_its_weights_whatever_else_is_in_the_batch():
    model = ensemble()
    positions = {"position_ids": torch.arange(7)[None]}
    one, two = (gw.emea(model, LANGUAGES, more | batch(), behind="ner") for more in ({}, positions))
    torch.testing.assert_close(two.logits, one.logits)
    with pytest.raises(GraftError, match="2 rows, and weights of 3"):
        gw.emea(model, LANGUAGES, batch() | {"labels": torch.zeros(3, dtype=torch.long)})
    assert set(gw.adapters(model)) == {*LANGUAGES, "ner"} and gw.active(model) is None


def test_emea__a_model_without_logits_is_refused():
    model = bert().bert
    members(model, gw.Pfeiffer(d=4), "ab")
    with pytest.raises(GraftError, match="without logits"):
        gw.emea(model, "ab", batch())
    assert set(gw.adapters(model)) == {"a", "b"} and gw.active(model) == "b"
