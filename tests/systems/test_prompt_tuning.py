"""Prompt tuning (Lester et al. 2021): the acceptance checks of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from attention_models import batch, decode, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.core.method import from_json

pytestmark = pytest.mark.system("prompt-tuning")
TOKENS = (11, 12, 13)
KINDS = ["bert", "llama", "gpt2", "falcon", "t5", "bart"]


def with_tokens(given: dict[str, Any], behind: int = 0) -> tuple[dict[str, Any], list[int]]:
    """The batch whose rows have TOKENS before (or one behind) their first real token, and where they stand."""
    mask = given["attention_mask"]
    starts = [int(row.argmax()) + behind for row in mask]

    def longer(t: Tensor, new: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.cat([row[:i], torch.tensor(new), row[i:]]) for row, i in zip(t, starts, strict=True)])

    ids, mask = longer(given["input_ids"], TOKENS), longer(mask, (1, 1, 1))
    return given | {"input_ids": ids, "attention_mask": mask}, starts


def without(out: Tensor, starts: list[int]) -> Tensor:
    return torch.stack([torch.cat([row[:i], row[i + 3 :]]) for row, i in zip(out, starts, strict=True)])


def prompted(kind: str, **given: Any) -> tuple[Any, Any]:
    """A model and its prompt, which is the embeddings of TOKENS."""
    model = make(kind)
    adapter = gw.graft(model, gw.Prompt(3, init="tokens", tokens=TOKENS, **given), head=False)
    return model, adapter


@pytest.mark.parametrize("combine", ["prefix", "prefix_after_bos"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_tuning__embeddings_of_tokens_give_the_logits_of_the_tokens(kind: str, side: str, combine: str) -> None:
    """Absolute positions (BERT, GPT-2, BART), rotary ones (Llama, Falcon) and relative ones (T5)."""
    model, _ = prompted(kind, combine=combine)
    given = batch(kind, side=side)
    longer, starts = with_tokens(given, behind=int(combine == "prefix_after_bos"))
    out = run(model, given)
    with gw.using(model, None):
        wanted = run(model, longer)
        plain = run(model, given)
    wanted = wanted if kind in ("t5", "bart") else without(wanted, starts)
    assert out.shape == wanted.shape == plain.shape
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)
    assert (out - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "falcon"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_tuning__generation_is_that_of_the_tokens(kind: str, use_cache: bool) -> None:
    model, _ = prompted(kind)
    given = batch(kind)
    out = decode(model, given, use_cache=use_cache)
    with gw.using(model, None):
        wanted, plain = decode(model, with_tokens(given)[0]), decode(model, given)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    assert (out - plain).abs().max() > 1e-2


@pytest.mark.parametrize("init", ["vocab", "tokens", "random"])
def test_prompt_tuning__trains_the_prompt_and_nothing_else(init: str) -> None:
    model, given = make("llama"), batch("llama")
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    adapter = gw.graft(model, gw.Prompt(5, init=init, tokens=TOKENS if init == "tokens" else ()))
    (p,) = adapter.parameters()
    assert [q for q in model.parameters() if q.requires_grad] == [p] and p.shape == (5, 32)
    run(model, given, grad=True).pow(2).mean().backward()
    assert p.grad.abs().min() > 0
    assert table.grad is None
    with torch.no_grad():
        p.add_(1.0)
    assert torch.equal(table, kept)


def test_prompt_tuning__initial_values() -> None:
    model = make("llama")
    table = model.get_input_embeddings().weight

    def start(**given: Any) -> Tensor:
        (p,) = gw.graft(model, gw.Prompt(6, **given), f"a{len(gw.adapters(model))}").parameters()
        return p.detach()

    def in_table(rows: Tensor, top: int) -> bool:
        return bool((torch.cdist(rows, table[:top].detach()).min(-1).values < 1e-5).all())

    drawn = start(init="random")
    assert drawn.abs().max() <= 0.5 and 0.2 < drawn.std() < 0.36
    assert in_table(start(init="vocab", vocab=10), 10)
    # two labels, of two sub-tokens and of one: the mean of the first; the rest from the vocabulary
    labels = start(init="tokens", tokens=((4, 9), 7), vocab=20)
    torch.testing.assert_close(labels[:2], torch.stack([table[[4, 9]].mean(0), table[7]]).detach())
    assert in_table(labels[2:], 20)


def test_prompt_tuning__text_and_json_give_the_method_back() -> None:
    made = gw.Prompt(6, init="tokens", tokens=((4, 9), 7))
    assert from_json(made.to_json()) == made and hash(from_json(made.to_json())) == hash(made)
    assert gw.parse_methods(str(made)) == (made,)
    with pytest.raises(gw.GraftError, match="token ids"):
        gw.Prompt(tokens=("text",))
    with pytest.raises(gw.GraftError, match="3 tokens for 2 rows"):
        gw.Prompt(2, tokens=(1, 2, 3))


@pytest.mark.parametrize("kind", ["llama", "falcon", "gpt2", "t5", "bert"])
def test_prompt_tuning__a_padded_row_equals_the_row_alone(kind: str) -> None:
    model, _ = prompted(kind)
    given = batch(kind, pad=2)
    alone = {key: value[1:, 2:] if value.shape[1] == 6 else value[1:] for key, value in given.items()}
    if kind in ("gpt2", "bert"):  # absolute positions: those that `generate` makes of a padding mask
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = run(model, given)[1]
    wanted = run(model, alone)[0]
    torch.testing.assert_close(out if kind == "t5" else out[2:], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompt_tuning__a_padded_row_generates_what_it_does_alone(kind: str, use_cache: bool) -> None:
    model, adapter = prompted(kind)
    scatter(adapter, 1.0)
    given = batch(kind, pad=2)
    alone = {key: value[1:, 2:] for key, value in given.items() if key != "decoder_input_ids"}
    torch.testing.assert_close(
        decode(model, given, use_cache=use_cache)[:, 1],
        decode(model, alone, use_cache=use_cache)[:, 0],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompt_tuning__an_ensemble_in_one_batch_equals_separate_passes(kind: str) -> None:
    model = make(kind)
    adapter = gw.graft(model, gw.Prompt(3, ensemble=4))
    scatter(adapter, 1.0)
    (prompts,) = adapter.parameters()
    assert prompts.shape == (4, 3, 32) and adapter.methods[0].count(adapter.sites[0]) == 4 * 3 * 32
    given = {key: value[:1].expand(3, -1) for key, value in batch(kind, pad=0).items()}  # one example, three prompts
    with gw.context(model, prompt_rows=torch.tensor([2, 0, 3])):
        together = run(model, given)
    for row, chosen in enumerate((2, 0, 3)):
        single = make(kind)
        (p,) = gw.graft(single, gw.Prompt(3)).parameters()
        with torch.no_grad():
            p.copy_(prompts[chosen])
        torch.testing.assert_close(
            together[row], run(single, {k: v[:1] for k, v in given.items()})[0], atol=1e-5, rtol=1e-5
        )
    assert (together[0] - together[1]).abs().max() > 1e-2
    with pytest.raises(gw.GraftError, match="prompt_rows"):
        run(model, given)


@pytest.mark.parametrize(("length", "total"), [(5, 20_480), (100, 409_600)])
def test_prompt_tuning__counts_of_t5_xxl(length: int, total: int) -> None:
    with torch.device("meta"):
        model = T.T5ForConditionalGeneration(
            T.T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        )
    adapter = gw.graft(model, gw.Prompt(length))
    assert adapter.num_parameters == total == sum(map(adapter.methods[0].count, adapter.sites))


@pytest.mark.parametrize("kind", ["llama", "bert-classifier", "t5"])
def test_prompt_tuning__what_is_above_sees_the_length_of_the_input(kind: str) -> None:
    """The loss needs no other labels, and a classifier reads its [CLS], not the prompt."""
    model, given = make(kind), batch(kind.split("-")[0], side="right")
    scatter(gw.graft(model, gw.Prompt(3), head=False), 1.0)
    labels = {
        "llama": given["input_ids"],
        "bert-classifier": torch.tensor([0, 1]),
        "t5": given.get("decoder_input_ids"),
    }[kind]
    out = model(**given, labels=labels, output_hidden_states=True)
    assert torch.isfinite(out.loss)
    if kind != "t5":
        assert all(h.shape[1] == 6 for h in out.hidden_states)
    if kind == "bert-classifier":
        wanted = model.classifier(model.bert.pooler(model.bert(**given).last_hidden_state))
        torch.testing.assert_close(out.logits, wanted)
        tuples = model(**given, return_dict=False)
        assert torch.equal(tuples[0], out.logits)
    if kind == "t5":
        assert model.get_encoder()(input_ids=given["input_ids"]).last_hidden_state.shape[1] == 9


def test_prompt_tuning__embeddings_as_input() -> None:
    model, adapter = prompted("llama")
    scatter(adapter, 1.0)
    given = batch("llama")
    wanted = run(model, given)
    embedded = model.get_input_embeddings()(given["input_ids"])
    torch.testing.assert_close(
        run(model, {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]}), wanted
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompt_tuning__file_holds_the_prompt(kind: str, tmp_path: Path) -> None:
    model, given = make(kind), batch(kind)
    scatter(gw.graft(model, gw.Prompt(3), "p"), 1.0)
    gw.save(model, "p", tmp_path)
    fresh = make(kind)
    gw.load(fresh, tmp_path)
    assert torch.equal(run(fresh, given), run(model, given))


def test_prompt_tuning__encoder_without_its_decoder_is_refused() -> None:
    with pytest.raises(gw.GraftError, match="the encoder without the decoder"):
        gw.graft(make("t5"), gw.Prompt(3, at="encoder.entry"))
    with pytest.raises(gw.GraftError, match="only the decoder"):
        gw.graft(make("t5"), gw.Prompt(3, at="decoder.entry"))
    with pytest.raises(gw.GraftError):
        gw.graft(make("vit"), gw.Prompt(3))


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_prompt_tuning__compiles_without_a_break(kind: str) -> None:
    model, _ = prompted(kind)
    given = batch(kind)
    wanted = run(model, given)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="eager"), given), wanted)


def test_prompt_tuning__a_prompt_longer_than_the_models_positions_says_so() -> None:
    model = make("bert")
    gw.graft(model, gw.Prompt(model.config.max_position_embeddings), head=False)
    with pytest.raises(gw.GraftError, match="the backbone has 512 positions"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    gw.activate(model, None)
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
