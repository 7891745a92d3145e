"""What the engine refuses, and in which words."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

from llava.pruning import AutoPrune, Dense, UnsupportedError, VisualLayout, get_method, missed_budgets
from tests.pruning.models import Batch, random_llama

METHOD = AutoPrune(target_tokens=8, x0=3.0)


def test_right_padding_and_holes_are_refused():
    model = random_llama()
    batch = Batch(model)
    inputs = batch.together([0, 2])
    with METHOD.attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        with pytest.raises(ValueError, match="left padding only"):
            model(inputs_embeds=inputs["embeds"], attention_mask=inputs["mask"].flip(1))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m, b: m(inputs_embeds=b.embeds[0][None]), "set_visual"),
        (lambda m, b: visual(m, b, 2) or m(inputs_embeds=b.embeds[0][None].expand(3, -1, -1)), "layout has 2 rows"),
        (lambda m, b: visual(m, b) or m(inputs_embeds=b.embeds[0][None, :20]), "one piece"),
        (lambda m, b: visual(m, b) or m(inputs_embeds=b.embeds[0][None], output_attentions=True), "output_attentions"),
        (lambda m, b: visual(m, b) or m.train()(inputs_embeds=b.embeds[0][None]), "inference"),
        (
            lambda m, b: (
                visual(m, b)
                or m.generate(inputs_embeds=b.embeds[0][None], max_new_tokens=2, cache_implementation="static")
            ),
            "DynamicCache",
        ),
        (lambda m, b: m.model.pruning_run.set_visual(VisualLayout.from_spans([[(4, 52)]])), "cls_attention"),
        (lambda m, b: m.model.pruning_run.set_visual(VisualLayout.from_spans([[(4, 52)]]), torch.rand(7)), "7"),
        (lambda m, b: METHOD.attach(m).__enter__(), "already attached"),
    ],
)
def test_what_cannot_work_is_refused(misuse, message):
    model = random_llama()
    with pytest.raises((ValueError, RuntimeError), match=message), METHOD.attach(model):
        misuse(model, Batch(model))


def visual(model, batch, rows: int = 1) -> None:
    inputs = batch.alone(0)
    layout = inputs["layout"].expand(rows)
    model.model.pruning_run.set_visual(layout, inputs["cls"] * rows)


def test_chunked_prefill_is_refused():
    model = random_llama()
    model.generation_config.prefill_chunk_size = 16
    with pytest.raises(ValueError, match="prefill_chunk_size"), METHOD.attach(model):
        pass
    with Dense().attach(model):
        pass


def test_a_decoder_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Llama-like"):
        METHOD.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("spans", [[[(3, 3)]], [[(5, 9), (8, 12)]], [[(-1, 4)]], [[(5, 9), (1, 3)]]])
def test_impossible_spans_are_refused(spans):
    with pytest.raises(ValueError, match="row 0"):
        VisualLayout.from_spans(spans)


# --- a layout holds for one prefill ---


@pytest.mark.parametrize("method", [METHOD, Dense(), get_method("visionzip")(target_tokens=8)], ids=lambda m: m.name)
def test_a_second_prompt_without_a_layout_is_refused(method):
    """Its text would be dropped where the first prompt had its image."""
    model, batch = random_llama(), None
    batch = Batch(model)
    inputs = batch.alone(0)
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
        model.generate(inputs_embeds=inputs["embeds"], max_new_tokens=4, do_sample=False)  # decoding needs no other
        text = batch.embeds[4][None].repeat(1, 6, 1)
        with pytest.raises(RuntimeError, match="a layout holds for one prefill"):
            model(inputs_embeds=text)
        run.set_visual(VisualLayout.from_spans([[]]))
        pruned = model(inputs_embeds=text).logits
    assert torch.equal(pruned, model(inputs_embeds=text).logits)


def test_a_layout_is_used_up_by_a_prefill_that_fails():
    model = random_llama()
    batch = Batch(model)
    with METHOD.attach(model) as run:
        run.set_visual(batch.alone(0)["layout"], batch.alone(0)["cls"])
        with pytest.raises(ValueError, match="one piece"):
            model(inputs_embeds=batch.embeds[0][None, :20])
        with pytest.raises(RuntimeError, match="one prefill"):
            model(inputs_embeds=batch.embeds[0][None])


# --- forms and arguments that would be swallowed ---


@pytest.mark.parametrize(
    "method",
    [METHOD, *(get_method(name)(target_tokens=8) for name in ("visionzip", "prumerge_plus", "hiprune", "fastv"))],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda n: {"position_ids": torch.arange(n).expand(3, 1, -1)}, r"position_ids .*one axis"),
        (lambda n: {"position_ids": torch.arange(n)}, "position_ids must be"),
        (lambda n: {"attention_mask": {"full_attention": None}}, "attention_mask is a dictionary"),
        (lambda n: {"attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool).tril()}, "attention_mask must be"),
        (lambda n: {"attention_mask": torch.ones(1, n + 1)}, "attention_mask must be"),
        (lambda n: {"visual_pos_masks": torch.ones(1, n, dtype=torch.bool)}, "visual_pos_masks"),
        (lambda n: {"deepstack_visual_embeds": [torch.zeros(48, 64)]}, "deepstack_visual_embeds"),
        (lambda n: {"cu_seq_lens_q": torch.tensor([0, n])}, "cu_seq_lens_q"),
        (lambda n: {"is_causal": False}, "is_causal"),
        (lambda n: {"output_hidden_states": [0, -1]}, "output_hidden_states"),
        (lambda n: {"output_attentions": True}, "output_attentions"),
    ],
)
@pytest.mark.parametrize("tell_lengths", [False, True])
def test_unknown_forms_and_arguments_are_refused_by_name(method, given, message, tell_lengths):
    model = random_llama()
    inputs = Batch(model).together([0], tell_lengths)
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with method.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
        with pytest.raises(UnsupportedError, match=message):
            model.model(inputs_embeds=inputs["embeds"], **given(inputs["embeds"].shape[1]))
    assert not ran  # nothing was computed


def test_arguments_of_a_pruned_cache_are_refused_too():
    model = random_llama()
    inputs = Batch(model).alone(0)
    with METHOD.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"])
        cache = model.model(inputs_embeds=inputs["embeds"], use_cache=True).past_key_values
        for name, value in (
            ("visual_pos_masks", torch.ones(1, 1)),
            ("position_ids", torch.zeros(3, 1, 1, dtype=torch.long)),
            ("attention_mask", {"full_attention": None}),
            ("attention_mask", torch.ones(1, 1, 1, 60)),
        ):
            with pytest.raises(UnsupportedError, match=name):
                model.model(input_ids=torch.tensor([[5]]), past_key_values=cache, **{name: value})
        model.model(input_ids=torch.tensor([[5]]), past_key_values=cache, visual_pos_masks=None)


def test_a_mask_that_contradicts_the_layout_is_refused():
    model = random_llama()
    inputs = Batch(model).together([0, 2], tell_lengths=True)
    with METHOD.attach(model) as run:
        run.set_visual(inputs["layout"], inputs["cls"])
        with pytest.raises(ValueError, match="the visual layout of"):
            model(inputs_embeds=inputs["embeds"], attention_mask=torch.ones_like(inputs["mask"]))


def test_dense_takes_masks_of_every_form():
    model = random_llama()
    inputs = Batch(model).together([0, 2])
    width = inputs["embeds"].shape[1]
    full = torch.ones(width, width, dtype=torch.bool).tril() & inputs["mask"].bool()[:, None, None, :]
    full |= torch.eye(width, dtype=torch.bool)  # padding sees itself, or it would become NaN
    with torch.no_grad():
        for mask in (inputs["mask"], full, torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float).min)):
            expected = model(inputs_embeds=inputs["embeds"], attention_mask=mask).logits
            with Dense().attach(model) as run:
                run.set_visual(inputs["layout"])
                assert torch.equal(model(inputs_embeds=inputs["embeds"], attention_mask=mask).logits, expected)
            assert [trace.text_tokens for trace in run.traces] == [11, 18]


def test_labels_follow_the_tokens_that_are_left():
    model = random_llama()
    batch = Batch(model)
    inputs, text = batch.alone(0), torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=text, labels=text).loss
        for method in (METHOD, Dense()):
            with method.attach(model) as run:
                run.set_visual(VisualLayout.from_spans([[]]))
                assert torch.equal(model(input_ids=text, labels=text).loss, expected)  # nothing to drop
                for call in ({"labels": torch.tensor([[7] * 4 + [1] * 48 + [7] * 7])}, {}):
                    run.set_visual(inputs["layout"], inputs["cls"])
                    output = model(inputs_embeds=inputs["embeds"], **call)
                    if call and method is METHOD:
                        ((start, end),) = batch.spans[0]
                        kept = run.traces[-1].kept[-1]
                        labels = [7] * start + [1 if i >= 0 else -100 for i in kept.tolist()] + [7] * (59 - end)
                        expected_loss = torch.nn.functional.cross_entropy(
                            output.logits[0, :-1], torch.tensor(labels[1:])
                        )
                        torch.testing.assert_close(output.loss, expected_loss)
                        assert output.logits.shape[1] == len(labels) < 59
    assert not model._forward_pre_hooks


# --- threads and copies ---


def test_two_threads_share_a_run():
    """Each gets for its prompts what it would get alone, however they meet."""
    model = random_llama()
    batch = Batch(model)

    def answers(run, row, found):
        inputs = batch.alone(row)
        for _ in range(6):
            run.set_visual(inputs["layout"], inputs["cls"], facts=inputs["facts"])
            output = model.generate(
                inputs_embeds=inputs["embeds"], max_new_tokens=4, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            found.append(torch.stack(output.logits, 1))

    for name in ("autoprune", "fastv", "visionzip"):
        with get_method(name)(target_tokens=12).attach(model) as run:
            alone, found = {}, {row: [] for row in (0, 1, 3)}
            for row in found:
                alone[row] = []
                answers(run, row, alone[row])
            run.traces.clear()
            threads = [threading.Thread(target=answers, args=(run, row, found[row])) for row in found]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for row in found:
            assert len(found[row]) == 6 and all(torch.equal(a, b) for a, b in zip(alone[row], found[row], strict=True))
        assert sorted(trace.visual_tokens for trace in run.traces) == [25] * 6 + [48] * 6 + [50] * 6


def test_a_layout_belongs_to_the_thread_that_gave_it():
    model = random_llama()
    inputs = Batch(model).alone(0)
    errors = []

    def forward():
        try:
            model(inputs_embeds=inputs["embeds"])
        except RuntimeError as error:
            errors.append(str(error))

    with METHOD.attach(model) as run, torch.no_grad():
        run.set_visual(inputs["layout"], inputs["cls"])
        other = threading.Thread(target=forward)
        other.start()
        other.join()
        model(inputs_embeds=inputs["embeds"])
    assert len(errors) == 1 and "in this thread" in errors[0] and len(run.traces) == 1


def test_numbered_samples_are_refused_in_several_threads_at_once():
    model = random_llama()
    inputs = Batch(model).alone(0)

    def forward(run, **kwargs):
        run.set_visual(inputs["layout"], **kwargs)
        model(inputs_embeds=inputs["embeds"])

    with get_method("random")(target_tokens=8).attach(model) as run, torch.no_grad():
        for _ in range(2):  # one after the other is fine: a thread per answer, as streaming does
            thread = threading.Thread(target=forward, args=(run,))
            thread.start()
            thread.join()
        forward(run)
        release = threading.Event()
        failed = []

        def second():
            try:
                forward(run)
            except UnsupportedError as error:
                failed.append(str(error))
            forward(run, sample_ids=[7])
            release.wait(30)

        thread = threading.Thread(target=second)
        thread.start()
        while len(run.traces) < 4 and thread.is_alive():
            pass
        with pytest.raises(UnsupportedError, match="several threads"):
            forward(run)
        release.set()
        thread.join()
        forward(run)
    assert len(failed) == 1 and "sample_ids" in failed[0]


def test_an_attached_model_is_neither_copied_nor_pickled():
    model = random_llama()
    inputs = Batch(model).alone(0)
    embeds = {"inputs_embeds": inputs["embeds"]}
    with torch.no_grad():
        expected = model(**embeds).logits
        with METHOD.attach(model) as run:
            for part in (model, model.model, run, [model]):
                for attempt in (
                    copy.deepcopy, copy.copy, pickle.dumps, lambda m: torch.save(m, io.BytesIO()),
                ):  # fmt: skip
                    if attempt is copy.copy and isinstance(part, list):
                        continue
                    with pytest.raises(RuntimeError, match="leave its context before"):
                        attempt(part)
            run.set_visual(inputs["layout"], inputs["cls"])
            assert model(**embeds).logits.shape[1] < expected.shape[1]  # still attached, still pruning
        assert torch.equal(model(**embeds).logits, expected)
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            assert torch.equal(same(**embeds).logits, expected)


# --- budgets that were missed ---


def test_missed_budgets_are_counted_and_said_once_at_the_end(caplog):
    """AutoPrune at a target of 1: one token kept and one merged are two."""
    model = random_llama()
    batch = Batch(model)

    def prefill(run, row):
        run.set_visual(batch.alone(row)["layout"], batch.alone(row)["cls"])
        model(inputs_embeds=batch.embeds[row][None])

    with torch.no_grad():
        with AutoPrune(target_tokens=1).attach(model) as run:
            for row in (0, 4, 1):  # 4 has no image
                prefill(run, row)
            assert not caplog.records
        (record,) = caplog.records
        assert record.message.startswith("autoprune: for 2 of 2 samples these options cannot meet 1 visual tokens")
        caplog.clear()
        with missed_budgets():
            for row in (0, 1):
                for method in (AutoPrune(target_tokens=2), AutoPrune(target_tokens=12), Dense()):
                    with method.attach(model) as run:
                        prefill(run, row)
            assert not caplog.records
    (record,) = caplog.records
    assert "for 2 of 2 samples these options cannot meet 2 visual tokens" in record.message
