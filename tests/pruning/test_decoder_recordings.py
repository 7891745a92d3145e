"""Methods inside the decoder against recordings of their authors' code (`../shared/golden/peers`)."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from llava.pruning import VisualLayout, get_method
from llava.pruning.methods import transprune
from llava.pruning.methods.adaptinfer import text_guided_score
from llava.pruning.methods.entropyprune import head_entropy
from llava.pruning.methods.transprune import transition
from llava.pruning.selection import top_k
from tests.pruning.test_peer_recordings import PEERS, recording


def cases(name):
    """Cases of a recording, or one skipped case where it is missing."""
    if not (PEERS / f"{name}.json").is_file():
        return [pytest.param("", marks=pytest.mark.skip(reason=f"{PEERS} has no recording of {name}"))]
    return list(recording(name)[0])


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
def end_to_end(method, name, case):
    """Final hidden states and trace of a method on the recorded prompt."""
    parameters, embeds = inputs(name, case, "inputs_embeds")
    span = (parameters["pre"], parameters["pre"] + parameters["N"])
    with method.attach(tiny_llama()) as run:
        run.set_visual(VisualLayout.from_spans([[span]]))
        hidden = tiny_llama()(inputs_embeds=embeds).last_hidden_state
    return hidden, run.traces[0]


def check_end_to_end(name, case, hidden, trace, layers, key="r"):
    """Kept tokens behind each cut, tokens of each layer and the final hidden states."""
    for layer in layers:
        after = layer - 1 if key == "r" else layer
        assert trace.kept[after].tolist() == output(name, case, f"kept_{key}{layer}").tolist()
    torch.testing.assert_close(hidden, output(name, case, "last_hidden"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases("entropyprune"))
def test_entropyprune(case):
    parameters, states = inputs("entropyprune", case, "states")
    first, count, keep = (parameters[key] for key in ("image_token_start_index", "N", "save_num"))
    entropy = head_entropy(states[:, :, first : first + count])
    torch.testing.assert_close(entropy[0].float(), output("entropyprune", case, "entropy"), atol=1e-5, rtol=1e-5)
    assert top_k(entropy, [count], [keep])[0].tolist() == output("entropyprune", case, "kept").tolist()


@pytest.mark.parametrize("case", [case for case in cases("transprune") if str(case).startswith("fn_")])
def test_transition(case):
    _, before, after = inputs("transprune", case, "before", "after")
    torch.testing.assert_close(transition(before, after), output("transprune", case, "weight"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in cases("transprune") if not str(case).startswith("fn_")])
def test_transprune(case, monkeypatch):
    parameters, _ = inputs("transprune", case, "inputs_embeds")
    scores = []

    def noted(values, counts, keep):
        scores.append(values[0])
        return top_k(values, counts, keep)

    monkeypatch.setattr(transprune, "top_k", noted)
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
