"""Methods inside the decoder against recordings of their authors' code (`../shared/golden/peers`)."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from llava.mm_utils import padding_share
from llava.pruning import VisualLayout, get_method
from llava.pruning.engine.view import LayerView
from llava.pruning.methods.adaptinfer import text_guided_score
from llava.pruning.methods.entropyprune import head_entropy
from llava.pruning.methods.sparsevlm_v2 import corrected_score, rotary_bias
from llava.pruning.methods.transprune import transition
from llava.pruning.scores import text_raters
from llava.pruning.selection import top_k
from tests.pruning.test_peer_recordings import PEERS, recording


def cases(name):
    """Cases of a recording, or one skipped case where it is missing."""
    if not (PEERS / f"{name}.json").is_file():
        return [pytest.param("", marks=pytest.mark.skip(reason=f"{PEERS} has no recording of {name}"))]
    return list(recording(name)[0])


def parted(name, prefix):
    """Cases of a recording whose names begin so, and the others."""
    every = [case for case in cases(name) if isinstance(case, str)]
    return [c for c in every if c.startswith(prefix)], [c for c in every if not c.startswith(prefix)]


def inputs(name, case, *arrays):
    """Parameters of a case, and its arrays as float32; some cases share those of another one."""
    content, values = recording(name)
    parameters = content[case]["params"]
    source = parameters.get("inputs_of_case", case)
    if any(f"{source}/{array}" not in values for array in arrays):
        pytest.skip("its inputs are those of a case that is not here")
    return parameters, *(torch.from_numpy(values[f"{source}/{array}"]).float() for array in arrays)


def output(name, case, array):
    return torch.from_numpy(recording(name)[1][f"{case}/out_{array}"])


@cache
def tiny_llama():
    """The decoder of the end-to-end cases."""
    content, weights = json.loads((PEERS / "tiny_llama.json").read_text(encoding="utf-8")), recording("tiny_llama")[1]
    torch.manual_seed(0)
    config = {key: value for key, value in content["config"].items() if key != "rope_theta"}
    model = LlamaModel(LlamaConfig(**config, attn_implementation="sdpa")).eval()
    missing, unexpected = model.load_state_dict(
        {k: torch.from_numpy(v).float() for k, v in weights.items()}, strict=False
    )
    assert missing == ["embed_tokens.weight"] and not unexpected
    return model


@torch.no_grad()
def end_to_end(method, name, case, facts=()):
    """Final hidden states and trace of a method on the recorded prompt; ``facts`` of the tower are all the same."""
    parameters, embeds = inputs(name, case, "inputs_embeds")
    span = (parameters["pre"], parameters["pre"] + parameters["N"])
    with method.attach(tiny_llama()) as run:
        run.set_visual(
            VisualLayout.from_spans([[span]]), facts={fact: [torch.zeros(parameters["N"])] for fact in facts}
        )
        hidden = tiny_llama()(inputs_embeds=embeds).last_hidden_state
    return hidden, run.traces[0]


def check_end_to_end(name, case, hidden, trace, layers, key="r"):
    """Kept tokens behind each cut, tokens of each layer and the final hidden states."""
    for layer in layers:
        after = layer - 1 if key == "r" else layer
        assert trace.kept[after].tolist() == output(name, case, f"kept_{key}{layer}").tolist()
    torch.testing.assert_close(hidden, output(name, case, "last_hidden"), atol=1e-5, rtol=1e-5)


def noted_scores(monkeypatch):
    """What a method will rank its tokens by, in a list that fills."""
    scores, best = [], LayerView.best

    def noted(self, values, keep):
        scores.append(values[0])
        return best(self, values, keep)

    monkeypatch.setattr(LayerView, "best", noted)
    return scores


@pytest.mark.parametrize("case", cases("entropyprune"))
def test_entropyprune(case):
    parameters, states = inputs("entropyprune", case, "states")
    first, count, keep = (parameters[key] for key in ("image_token_start_index", "N", "save_num"))
    entropy = head_entropy(states[:, :, first : first + count])
    torch.testing.assert_close(entropy[0].float(), output("entropyprune", case, "entropy"), atol=1e-5, rtol=1e-5)
    assert top_k(entropy, [count], [keep])[0].tolist() == output("entropyprune", case, "kept").tolist()


@pytest.mark.parametrize("case", parted("transprune", "fn_")[0])
def test_transition(case):
    _, before, after = inputs("transprune", case, "before", "after")
    torch.testing.assert_close(transition(before, after), output("transprune", case, "weight"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", parted("transprune", "fn_")[1])
def test_transprune(case, monkeypatch):
    parameters, _ = inputs("transprune", case, "inputs_embeds")
    scores = noted_scores(monkeypatch)
    cuts = parameters["pruning_layer_list"]
    method = get_method("transprune")(
        layers="/".join(map(str, cuts)),
        accumulate="/".join(map(str, parameters["accmulating_layer_list"])),
        shares="/".join(map(str, parameters["image_token_ratio_list"][1:])),
    )
    hidden, trace = end_to_end(method, "transprune", case)
    check_end_to_end("transprune", case, hidden, trace, cuts)
    assert trace.tokens_in == output("transprune", case, "counts").tolist()
    for cut, score in zip(cuts, scores, strict=True):
        torch.testing.assert_close(score, output("transprune", case, f"score_r{cut}"), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", parted("vscan", "e2e_")[0])
def test_vscan(case, monkeypatch):
    """Nothing is reduced in front of the decoder there."""
    parameters, _ = inputs("vscan", case, "inputs_embeds")
    scores = noted_scores(monkeypatch)
    cuts = parameters["layer_list"]
    method = get_method("vscan")(
        layers="/".join(map(str, cuts)), tokens="/".join(map(str, parameters["image_token_list"]))
    )
    hidden, trace = end_to_end(method, "vscan", case, facts=("local", "cls_attention"))
    check_end_to_end("vscan", case, hidden, trace, cuts)
    assert trace.tokens_in == output("vscan", case, "counts").tolist()
    for cut, score in zip(cuts, scores, strict=True):
        torch.testing.assert_close(score, output("vscan", case, f"score_r{cut}"), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", cases("adaptinfer"))
def test_adaptinfer(case):
    parameters, rows = inputs("adaptinfer", case, "attn_text")
    first, count = parameters["v_token_start"], parameters["N"]
    text = parameters["text_len"]
    score = text_guided_score(rows[..., -text:], rows[..., first : first + count], text, parameters["lb"])
    torch.testing.assert_close(score, output("adaptinfer", case, "score"), atol=1e-6, rtol=1e-5)
    kept = output("adaptinfer", case, "kept").tolist()
    stage = {1: 0, 10: 1, 20: 2}[parameters["layer_idx"]]
    # One less than there are, at most: the one deviation in numbers, see the method.
    assert len(kept) == min(parameters["table"][stage], count - 1)
    assert top_k(score, [count], [len(kept)])[0].tolist()[: len(kept)] == kept


@pytest.mark.parametrize("case", parted("sparsevlm_v2", "e2e_")[1])
def test_sparsevlm_v2_function(case):
    """Rotary tables of the case in float64, as the positions of the recording are."""
    parameters, attention, positions, visual, text = inputs(
        "sparsevlm_v2", case, "attn_text", "position_ids", "v_t", "t_t"
    )
    first, count, rows = (parameters[key] for key in ("v_token_start", "v_token_num", "text_len"))
    raters = text_raters(visual, (count,), text, (rows,))
    assert raters[0].nonzero().flatten().tolist() == output("sparsevlm_v2", case, "raters").tolist()
    width = parameters["head_dim"]
    angles = positions[:, None].double() / 10000 ** (torch.arange(0, width, 2) / width)
    tables = tuple(torch.cat((values, values), dim=1)[None] for values in (angles.cos(), angles.sin()))
    bias = rotary_bias(
        tuple(table[:, -rows:] for table in tables), tuple(table[:, first : first + count] for table in tables)
    )
    score = corrected_score(attention[None, :, -rows:, first : first + count], bias, raters, 14)
    torch.testing.assert_close(score[0], output("sparsevlm_v2", case, "score"), atol=1e-5, rtol=1e-4)
    kept = output("sparsevlm_v2", case, "kept").tolist()
    assert top_k(score, [count], [len(kept)])[0].tolist() == kept


@pytest.mark.parametrize("case", parted("sparsevlm_v2", "e2e_")[0])
def test_sparsevlm_v2(case, monkeypatch):
    parameters, _ = inputs("sparsevlm_v2", case, "inputs_embeds")
    scores = noted_scores(monkeypatch)
    cuts, table = parameters["pruning_loc"], tuple(parameters["table"])
    method = get_method("sparsevlm_v2")
    published = dataclasses.replace(
        method.published, layers=tuple(cuts), depth=6, tokens=parameters["N"], lists={1: table}
    )
    monkeypatch.setattr(method, "published", published)
    hidden, trace = end_to_end(method(target_tokens=1), "sparsevlm_v2", case)
    check_end_to_end("sparsevlm_v2", case, hidden, trace, cuts, key="l")
    assert trace.tokens_in == output("sparsevlm_v2", case, "counts").tolist()
    for cut, score in zip(cuts, scores, strict=True):
        torch.testing.assert_close(score, output("sparsevlm_v2", case, f"score_l{cut}"), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", parted("attention_debias", "mask_")[0])
def test_padding_of_debiasing(case):
    """All three hosts: SparseVLM's own mask is scaled with a filter, which comes to a half of the patch."""
    parameters, *_ = inputs("attention_debias", case)
    share = padding_share((parameters["width"], parameters["height"]), 24).flatten()
    for array, most in (("pad_fastv05", 0.5), ("pad_default03", 0.3), ("pad_pdrop001", 0.01), ("pad_sparse", 0.5)):
        assert (share <= most).int().tolist() == output("attention_debias", case, array).tolist(), array


class Said(SimpleNamespace):
    """A view that says what it is told to."""

    views = None
    best, shared_out = LayerView.best, LayerView.shared_out


def debiased(case, tmp_path):
    """Options of a recorded case, and a view of its scores."""
    parameters, attention = inputs("attention_debias", case, "attn")
    share = padding_share(tuple(parameters["size"]), 24).flatten()[None]
    view = Said(
        counts=(576,),
        prompt_counts=(576,),
        num_layers=32,
        device=torch.device("cpu"),
        relevance_BV=attention[None],
        attention_BHTV=attention[None, None, None],
        origins_BV=torch.arange(576)[None],
        vision_fact=lambda name: {"padding": share}[name],
    )
    options = {}
    if parameters["curve"] is not None:
        options["debias_curve"] = str(tmp_path / "curve.npy")
        np.save(options["debias_curve"], recording("attention_debias")[1][parameters["curve"]])
    return parameters, view, options


@pytest.mark.parametrize("case", parted("attention_debias", "fastv_")[0])
def test_debiased_fastv(case, tmp_path):
    parameters, view, options = debiased(case, tmp_path)
    if parameters["tag"] == "before":
        pytest.skip("no debiasing: the authors' baseline, with the budget of the padding mask")
    if parameters["tag"] != "after":
        options = {}
    else:
        options["debias_padding"] = 0.5
    method = get_method("fastv")(**options)
    selection = method.choose(view, method.without_padding(view, (parameters["budget"],)))
    assert selection.keep_BK[0].tolist() == output("attention_debias", case, "kept").tolist()
    scores = method.debiased(view, view.relevance_BV)[0]
    torch.testing.assert_close(scores, output("attention_debias", case, "score"), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("case", parted("attention_debias", "pdrop_")[0])
def test_debiased_pdrop(case, tmp_path):
    parameters, view, options = debiased(case, tmp_path)
    if parameters["tag"] == "before":
        pytest.skip("no debiasing: the authors' baseline, with the mask of the padding")
    memory = SimpleNamespace(plans=[{4: parameters["budget"]}])
    if parameters["cur_num"]:
        memory.has_dropped = True
    view.layer = 3
    selection = get_method("pdrop")(**options, debias_padding=0.01).select(view, memory)
    assert selection.keep_BK[0].tolist() == output("attention_debias", case, "kept").tolist()


@pytest.mark.parametrize("case", parted("attention_debias", "sparse_")[0])
def test_debiased_sparsevlm(case, tmp_path):
    parameters, view, options = debiased(case, tmp_path)
    method = get_method("sparsevlm")(
        **options, debias_padding=0.5 if parameters["pad_mask"] else None, recycle_fraction=0.0
    )
    memory = SimpleNamespace(raters=torch.ones(1, 1), keep=[(parameters["budget"], 1, 1)], report={})
    view.layer = 2
    assert method.select(view, memory).keep_BK[0].tolist() == output("attention_debias", case, "kept").tolist()
    scores = method.debiased(view, view.relevance_BV)[0]
    torch.testing.assert_close(scores, output("attention_debias", case, "score"), atol=1e-8, rtol=1e-6)
