"""Wu et al. 2024: edits of hidden states at a few positions, in a low-rank orthonormal subspace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapter_models import bert, closed_form, ids, llama, llama_of, spread, t5

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("loreft")


def one(model=None, layer="0", **hyper):
    """A grafted model, its adapter and its only delta."""
    model = llama() if model is None else model
    adapter = gw.graft(model, gw.LoReFT(**{"r": 4, "at": "block", "layers": layer, **hyper}), head=False)
    spread(adapter)
    return model, adapter, next(adapter.deltas())


def block_output(model, x, layer=0, **given):
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(x, **given)
    handle.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def changed(model, x, **given):
    """[batch, seq], True where the first block's output differs from the backbone's."""
    edited = block_output(model, x, **given)
    with gw.using(model, None):
        plain = block_output(model, x, **given)
    return (edited != plain).any(-1)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_loreft__rows_stay_orthonormal_after_every_optimiser_step(optimiser):
    model, adapter, delta = one()
    edit = delta.edits[0]
    step = optimiser(adapter.parameters(), lr=0.3)
    before = edit.rotation().detach()
    for i in range(6):
        step.zero_grad()
        model(ids(seed=i), labels=ids(seed=i)).loss.backward()
        step.step()
        rotation = edit.rotation().detach()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)
    assert (rotation - before).abs().max() > 1e-3


def test_loreft__coordinates_in_the_subspace_are_replaced_and_the_rest_stays():
    _, _, delta = one(positions="all")
    edit = delta.edits[0]
    h = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, rotation = delta(h, h), edit.rotation()
        torch.testing.assert_close(out @ rotation.T, h @ edit.weight.T + edit.bias, atol=1e-5, rtol=1e-4)
        rest = torch.eye(32) - rotation.T @ rotation
        torch.testing.assert_close(out @ rest, h @ rest, atol=1e-5, rtol=1e-4)


def test_loreft__constant_edit_is_idempotent_and_w_equal_r_is_the_identity():
    model, _, delta = one(positions="all")
    edit = delta.edits[0]
    h = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        edit.weight.zero_()
        once = delta(h, h)
        torch.testing.assert_close(delta(once, once), once, atol=1e-5, rtol=1e-5)
        edit.weight.copy_(edit.rotation())
        edit.bias.zero_()
        assert torch.equal(delta(h, h), h)
    for variant in ("loreft", "noreft", "direft", "lobireft"):
        model = llama()
        with torch.no_grad():
            base = model(ids()).logits
            gw.graft(model, gw.LoReFT(r=4, variant=variant, init="identity"), head=False)
            assert torch.equal(model(ids()).logits, base)
    with pytest.raises(GraftError, match="consreft"):
        gw.LoReFT(variant="consreft", init="identity")


def test_loreft__only_listed_positions_change():
    for positions, expected in {
        "p2+s1": [1, 1, 0, 0, 0, 0, 1],
        "f1": [1, 0, 0, 0, 0, 0, 0],
        "l2": [0, 0, 0, 0, 0, 1, 1],
        "s3": [0, 0, 0, 0, 1, 1, 1],
        "all": [1] * 7,
        "p7+s7": [1] * 7,
    }.items():
        model, _, _ = one(positions=positions)
        where = changed(model, ids())
        assert where.tolist() == [[bool(v) for v in expected]] * 2, positions


def test_loreft__padding_and_prompt_bound_the_positions():
    model, _, _ = one(positions="p2+s1")
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    assert changed(model, ids(), attention_mask=left)[0].tolist()[2:] == [True, True, False, False, True]
    assert changed(model, ids(), attention_mask=left)[1].int().tolist() == [1, 1, 0, 0, 0, 0, 1]
    right = left.flip(1)
    assert changed(model, ids(), attention_mask=right)[0].int().tolist() == [1, 1, 0, 0, 1, 0, 0]
    with gw.context(model, prompt_length=torch.tensor([4, 3])):
        where = changed(model, ids(), attention_mask=torch.ones(2, 7, dtype=torch.long))
    assert where.int().tolist() == [[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]


def test_loreft__a_short_prompt_is_edited_once():
    for tied in (True, False):
        model, _, delta = one(positions="p3+s3", tied=tied)
        assert len(delta.edits) == (1 if tied else 2)
        x = ids(batch=1, seq=4)
        plain = None
        edited = block_output(model, x)
        with gw.using(model, None):
            plain = block_output(model, x)
        with torch.no_grad():
            first = plain + delta.edits[0](plain)
            last = plain + delta.edits[-1](plain)
        # three from the front, and of the last three only the one that is left
        expected = torch.cat([first[:, :3], last[:, 3:]], 1)
        torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)


def test_loreft__decoding_steps_are_not_edited():
    model, _, _ = one(positions="p2+s2", layer=None)
    x = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids(1, 5)], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(x, use_cache=True, **given)
    with gw.context(model, prompt_length=5):
        plain = model.generate(x, use_cache=False, **given)
    assert torch.equal(cached, plain)
    alone = model.generate(x[:, 3:], attention_mask=mask[:, 3:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(cached[:, 8:], alone[:, 5:])
    with gw.using(model, None):
        assert not torch.equal(model.generate(x, **given), cached)


@pytest.mark.parametrize(
    "shape, r, expected", [((4096, 32, 32, 11008), 8, 2_097_408), ((5120, 40, 40, 13824), 8, 3_277_120)]
)
def test_loreft__parameter_oracle(shape, r, expected):
    model = llama_of(*shape)
    methods = (gw.LoReFT(r=r),)
    assert closed_form(model, methods) == expected
    if expected == 2_097_408:
        assert gw.graft(model, methods, head=False).num_parameters == expected
        assert closed_form(model, (gw.LoReFT(r=r, tied=False),)) == 2 * expected


def test_loreft__at_all_positions_it_is_a_merged_linear():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    model, _, delta = one(model, layer=None, at="/^0$/", positions="all")
    edit, base = delta.edits[0], model[0]
    x = torch.randn(4, 7, 6)
    with torch.no_grad():
        rotation = edit.rotation()
        change = torch.eye(12) + rotation.T @ (edit.weight - rotation)
        merged = x @ base.weight.T @ change.T + change @ base.bias + rotation.T @ edit.bias
        torch.testing.assert_close(model(x), model[2](torch.tanh(merged)), atol=1e-5, rtol=1e-5)


def test_loreft__variants_follow_their_equations():
    h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for variant in ("loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"):
        _, adapter, delta = one(positions="all", variant=variant)
        e = delta.edits[0]
        with torch.no_grad():
            r = e.rotation()
            wh = h @ e.weight.T if e.weight is not None else 0
            inner = {
                "loreft": wh + e.bias - h @ r.T, "noreft": wh + e.bias - h @ r.T, "direft": wh + e.bias,
                "direft_orthonormal": wh + e.bias, "consreft": e.bias - h @ r.T, "lobireft": (e.bias + 0 * h[..., :4]),
            }[variant]  # fmt: skip
            torch.testing.assert_close(delta(h, h), h + inner @ r, atol=1e-5, rtol=1e-5)
            assert torch.allclose(r @ r.T, torch.eye(4), atol=1e-5) == (variant not in ("noreft", "direft"))
        assert adapter.num_parameters == adapter.methods[0].count(adapter.sites[0])


def test_loreft__dropout_drops_the_added_term_only():
    _, _, delta = one(positions="all", dropout=0.5)
    h = torch.randn(8, 50, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        term = delta.edits[0](h)
        got = delta.train()(h, h) - h
    zero = got.abs() < 1e-6
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(got[~zero], 2 * term[~zero], atol=1e-4, rtol=1e-4)
    _, _, whole = one(positions="all", dropout=0.5, drop_state=True)
    with torch.no_grad():
        assert 0.4 < (whole.train()(h, h) == 0).float().mean() < 0.6


def test_loreft__copies_pickles_and_files_keep_the_edit(tmp_path):
    model, adapter, delta = one(layer=None, positions="p2+s2")
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    model(ids(), labels=ids()).loss.backward()
    optimiser.step()
    with torch.no_grad():
        expected = model(ids()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids()).logits, expected)
        gw.save(model, "default", tmp_path / "a")
        other = llama()
        loaded = gw.load(other, tmp_path / "a")
        torch.testing.assert_close(other(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    stored = next(loaded.deltas()).edits[0].raw
    torch.testing.assert_close(stored, delta.edits[0].rotation())
    size = (tmp_path / "a" / "adapter.safetensors").stat().st_size
    assert size <= 1.05 * 4 * adapter.num_parameters + 4096


def test_loreft__the_prompt_of_an_encoder_decoder_is_in_its_encoder():
    model = t5()
    adapter = gw.graft(model, gw.LoReFT(r=4, positions="p1+s1"), head=False)
    assert {site.tower for site in adapter.sites} == {"encoder"}
    with pytest.raises(GraftError, match="encoder"):
        gw.graft(model, gw.LoReFT(r=4, at="decoder.block"), "wrong", head=False)
    gw.graft(bert(), gw.LoReFT(r=4, positions="f1"))
