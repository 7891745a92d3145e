"""A pruning run attached to the model: recorded runs of the published code, pixels to tokens, through `generate`."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.pruning import AutoPrune, Dense, get_method
from llava.utils import UserError
from tests.conftest import GOLDEN
from tests.model.tiny import PATCHES, tiny_images, tiny_model

I = IMAGE_TOKEN_INDEX  # noqa: E741
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=7)


@pytest.mark.parametrize("name", ["e2e01", "e2e02_mask", "e2e05", "e2e07_anyres_2x2", "e2e09_anyres_3x1"])
def test_recorded_runs_from_pixels_to_tokens(golden, name):
    cases, arrays = golden("e2e_cases")
    case = cases[name]
    model = load_pretrained_model(str(GOLDEN / case["checkpoint"]), None, "golden", device="cpu")[1]
    method = AutoPrune(target_tokens=case["target_token_num"], x0=case["x0"], k0=case["k0"], gamma=case["gamma"])
    with method.attach(model) as run:
        ids = model.generate(
            torch.from_numpy(arrays[f"{name}/input_ids"]),
            images=torch.from_numpy(arrays[f"{name}/pixel_values"]),
            image_sizes=[case["image_size_wh"]] if case["image_size_wh"] else None,
            image_masks=[torch.from_numpy(arrays[f"{name}/mask"])] if case["has_mask"] else None,
            max_new_tokens=8,
            **GREEDY,
        )
    assert ids[0].tolist() == case["decode_ids"]
    (trace,) = run.traces
    assert trace.visual_tokens == case["v_num"]
    assert trace.tokens_out == [layer["v_token_num"] for layer in case["layers"]]
    for kept, layer in zip(trace.kept, case["layers"], strict=True):
        assert kept.tolist() == [max(i, -1) for i in layer["ids"]]
    assert trace.slope == pytest.approx(case["dynamic_k"], abs=1e-5)


@torch.no_grad()
def test_forward_and_generate_agree_on_the_first_token(model):
    ids, images = torch.tensor([[1, 5, I, 7, 8, 9]]), tiny_images(1)
    with AutoPrune(target_tokens=4).attach(model) as run:
        logits = model(ids, images=images).logits
        tokens = model.generate(ids, images=images, max_new_tokens=1, **GREEDY)
    assert logits[:, -1].argmax(-1).tolist() == tokens[:, 0].tolist()
    assert run.traces[0].tokens_out == run.traces[1].tokens_out and run.traces[0].tokens_out[-1] < PATCHES


@torch.no_grad()
def test_dense_run_changes_nothing(model):
    ids, images = torch.tensor([[1, 5, I, 7], [1, I, 9, 8]]), tiny_images(2)
    expected = model(ids, images=images).logits
    tokens = model.generate(ids, images=images, max_new_tokens=5, **GREEDY)
    with Dense().attach(model) as run:
        assert torch.equal(model(ids, images=images).logits, expected)
        assert torch.equal(model.generate(ids, images=images, max_new_tokens=5, **GREEDY), tokens)
    assert [trace.visual_tokens for trace in run.traces] == [PATCHES] * 4
    assert torch.equal(model(ids, images=images).logits, expected) and model.pruning_run is None


def test_rows_of_a_pruned_batch_equal_single_samples(model):
    rows = [[1, 5, I, 6, I, 7], [1, 4, 3], [1, 9, 12, I, 13, 14, 15, 16, 17]]
    images = tiny_images(3, seed=3)
    sizes = [(28, 28), (90, 30), (28, 60)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with AutoPrune(target_tokens=5).attach(model) as run:
        together = model.generate(
            ids, images=images, image_sizes=sizes, attention_mask=mask, max_new_tokens=6, **GREEDY
        )
        batch = list(run.traces)
        run.traces.clear()
        first = 0
        for row, expected in zip(rows, together, strict=True):
            n = row.count(I)
            alone = model.generate(
                torch.tensor([row]),
                images=images[first : first + n] if n else None,
                image_sizes=sizes[first : first + n] if n else None,
                max_new_tokens=6,
                **GREEDY,
            )
            first += n
            assert torch.equal(alone[0], expected)
    assert [t.visual_tokens for t in batch] == [2 * PATCHES, 0, PATCHES]
    for one, other in zip(batch, run.traces, strict=True):
        assert one.tokens_out == other.tokens_out
        assert [k.tolist() for k in one.kept] == [k.tolist() for k in other.kept]


def test_beams_and_sampling_run_pruned(model):
    ids, images = torch.tensor([[1, 5, I, 7], [1, I, 9, 8]]), tiny_images(2)
    with AutoPrune(target_tokens=5).attach(model) as run:
        beams = model.generate(ids, images=images, num_beams=3, max_new_tokens=4, **GREEDY)
        torch.manual_seed(0)
        sampled = model.generate(
            ids,
            images=images,
            do_sample=True,
            num_return_sequences=2,
            max_new_tokens=4,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert beams.shape == (2, 4) and sampled.shape == (4, 4)
    assert len(run.traces) == 4  # one per sample and prefill, whatever the number of beams


def test_cls_attention_is_computed_only_for_methods_that_need_it(model):
    rows = []
    layer = model.model.vision_tower.encoder.layers[-2]
    handle = layer.self_attn.q_proj.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    ids, images = torch.tensor([[1, I, 5]]), tiny_images(1)
    try:
        with Dense().attach(model):
            model.generate(ids, images=images, max_new_tokens=1, **GREEDY)
        assert rows == [PATCHES + 1]
        rows.clear()
        with AutoPrune(target_tokens=4).attach(model):
            model.generate(ids, images=images, max_new_tokens=1, **GREEDY)
        assert rows == [1, PATCHES + 1]
    finally:
        handle.remove()


@torch.no_grad()
def test_a_text_only_prompt_forgets_the_previous_image(model):
    text = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]])
    expected = model(text).logits
    tokens = model.generate(text, max_new_tokens=3, **GREEDY)
    with AutoPrune(target_tokens=4).attach(model) as run:
        model.generate(torch.tensor([[1, I, 5]]), images=tiny_images(1), max_new_tokens=1, **GREEDY)
        torch.testing.assert_close(model(text).logits, expected)
        assert torch.equal(model.generate(text, max_new_tokens=3, **GREEDY), tokens)
    assert [trace.visual_tokens for trace in run.traces] == [PATCHES, 0, 0]


def test_what_cannot_work_with_pruning_is_refused(model):
    ids, images = torch.tensor([[1, I, 5]]), tiny_images(1)
    filled = DynamicCache()
    with torch.no_grad():
        model(ids, images=images, past_key_values=filled)
    with AutoPrune(target_tokens=4).attach(model):
        for implementation in ("static", "offloaded_static", "offloaded", "quantized"):
            with pytest.raises(UserError, match=f"cache_implementation='{implementation}' cannot be used with pruning"):
                model.generate(ids, images=images, cache_implementation=implementation)
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
        with pytest.raises(UserError, match="StaticCache cannot be used with pruning"):
            model.generate(ids, images=images, past_key_values=static)
        with pytest.raises(UserError, match="whole conversation as one prompt"):
            model.generate(ids, images=images, past_key_values=filled)
        with pytest.raises(UserError, match="instead of pixel_values"):
            model(input_ids=ids, pixel_values=images)
        with pytest.raises(UserError, match="assistant_model= is not supported"):
            model.generate(ids, images=images, assistant_model=model)


def test_streaming_and_output_objects_work(model):
    ids, images = torch.tensor([[1, I, 5]]), tiny_images(1)

    class Collect:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            pass

    streamer = Collect()
    with AutoPrune(target_tokens=4).attach(model):
        out = model.generate(
            ids,
            images=images,
            max_new_tokens=4,
            streamer=streamer,
            return_dict_in_generate=True,
            output_scores=True,
            **GREEDY,
        )
    assert streamer.ids == out.sequences[0].tolist() and len(out.scores) == 4


@pytest.mark.parametrize("name", ["autoprune", "tome", "visionzip", "pdrop"])
def test_threads_answer_what_one_thread_answers(model, name):
    """The methods look into the tower, in front of the projector and into the decoder; threads take turns there."""
    prompts = [(torch.tensor([[1, 5, I, 7, 8, 9]]), 1), (torch.tensor([[1, I, 4, I, 6]]), 2)]
    images = tiny_images(3)

    def answers(found, ids, count):
        for _ in range(5):
            output = model.generate(
                ids, images=images[:count], max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **GREEDY
            )
            found.append(torch.stack(output.logits))

    with get_method(name)(target_tokens=4).attach(model):
        alone, together = ([], []), ([], [])
        for found, prompt in zip(alone, prompts, strict=True):
            answers(found, *prompt)
        pairs = zip(together, prompts, strict=True)
        threads = [threading.Thread(target=answers, args=(found, *prompt)) for found, prompt in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(alone, together, strict=True):
        assert len(other) == 5 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_labels_follow_the_tokens_that_are_left(model):
    ids = torch.tensor([[1, 5, I, 7, 8, 9]])
    text = ids.clamp_min(3)
    expected = model(text, labels=text).loss
    with AutoPrune(target_tokens=4).attach(model):
        assert torch.equal(model(text, labels=text).loss, expected)
        output = model(ids, images=tiny_images(1), labels=ids)
        # Behind the image stand 7, 8, 9; what precedes it is one token and its label.
        logits = torch.cat((output.logits[0, :1], output.logits[0, -4:-1]))
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor([5, 7, 8, 9]))
        torch.testing.assert_close(output.loss, expected)
