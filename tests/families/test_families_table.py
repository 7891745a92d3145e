"""Every family with every promise, on random tiny models of transformers' own classes.

The truth is the dense model, or an oracle that keeps every token and masks the dropped ones, without a cache, with the
positions and deepstack features that transformers itself makes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import accelerate
import peft
import pytest
import torch
import transformers

from llava.families import family_of, list_families
from llava.pruning import (
    BEFORE_DECODER,
    AutoPrune,
    Dense,
    OptionError,
    UnsupportedError,
    build_method,
    get_method,
    list_methods,
)
from tests.families.models import FAMILIES, IMAGE, VIDEO, Tiny

FILMS = [name for name, tiny in FAMILIES.items() if tiny.film is not None]
AXES = [name for name, tiny in FAMILIES.items() if tiny.axes]
ONE = (4, ("image", 0), 7)
TWO = (3, ("image", 1), 2, ("image", 2), 9)
TEXT = (11,)
EVERYTHING = 10_000

every_family = pytest.mark.parametrize("name", FAMILIES)


@torch.no_grad()
def generated(model, inputs, tokens=5, **kwargs):
    """New tokens ``[B, new]`` and their logits."""
    kwargs = {"do_sample": False, **kwargs}
    output = model.generate(**inputs, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True, **kwargs)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def half(tiny: Tiny, *prompt) -> int:
    ids = tiny.prompt(*prompt)[0]
    return (ids.count(IMAGE) + ids.count(VIDEO)) // 2


def test_every_family_is_in_the_table():
    assert sorted(FAMILIES) == list_families()
    for name, tiny in FAMILIES.items():
        assert family_of(tiny.model()).name == family_of(tiny.model().model).name == name


@every_family
@pytest.mark.parametrize("method", ["autoprune", "fastv", "visionzip", "fastervlm"])
def test_with_every_token_kept_it_is_dense(name, method):
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(ONE, TWO, TEXT)
    tokens, logits = generated(model, dict(inputs))
    assert logits.std() > 0.1
    with get_method(method)(target_tokens=EVERYTHING).attach(model) as run:
        own_tokens, own_logits = generated(model, dict(inputs))
    assert torch.equal(own_tokens, tokens)
    torch.testing.assert_close(own_logits, logits, atol=1e-4, rtol=1e-4)
    counts = [(row == IMAGE).sum().item() for row in inputs["input_ids"]]
    seen = [trace.visual_tokens + trace.structure_tokens for trace in run.traces]
    assert seen == counts and counts[2] == 0


@every_family
def test_every_method(name):
    """All kept is dense; a few kept are fewer, and finite. What has no meaning here is an error with both names."""
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(ONE, TWO, TEXT)
    logits = generated(model, dict(inputs), tokens=2)[1]
    for method in list_methods():
        kind = get_method(method)
        try:
            with kind(target_tokens=EVERYTHING).attach(model):
                own = generated(model, dict(inputs), tokens=2)[1]
        except UnsupportedError as error:
            assert kind.merges_in_tower and f"'{method}'" in str(error) and str(error).endswith(name), method
            continue
        torch.testing.assert_close(own, logits, atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")
        if method == "dense":
            continue
        with kind(target_tokens=6).attach(model) as run:
            pruned = generated(model, dict(inputs), tokens=2)[1]
        assert pruned.isfinite().all() and not torch.allclose(pruned[:2], logits[:2], atol=1e-3), method
        torch.testing.assert_close(pruned[2], logits[2], atol=1e-4, rtol=1e-4)
        assert [trace.tokens_out[-1] < trace.visual_tokens for trace in run.traces] == [True, True, False], method


def test_frames_of_a_video_are_images():
    """InternVL and SmolVLM take a film as images with text between: as many spans as frames."""
    film = (2, ("image", 1), 2, ("image", 2), 2, ("image", 3), 2, ("image", 4), 5)
    for name in ("internvl", "smolvlm"):
        tiny = FAMILIES[name]
        for method in ("autoprune", "hiprune"):
            compare_with_oracle(tiny, film, get_method(method)(target_tokens=half(tiny, *film), **METHODS[method]))


class Watched:
    """What transformers gives its decoder in a dense run: embeddings, positions, deepstack features."""

    def __init__(self, model):
        self.calls = []
        self.hook = model.get_decoder().register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs):
        self.calls.append(kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.hook.remove()

    def positions(self):
        """Positions of the prompt and of every token that was decoded, ``[B, N]`` or ``[axes, B, N]``."""
        own = [call["position_ids"] for call in self.calls]
        return torch.cat([ids if ids.ndim == 2 else ids[-3:] for ids in own], dim=-1)


@torch.no_grad()
def masked(model, watched: Watched, visual, kept, before, new_tokens):
    """Greedy decoding of one sample that recomputes everything and masks the dropped tokens from their layer on."""
    decoder = model.get_decoder()
    first = watched.calls[0]
    sequence, positions = first["inputs_embeds"], watched.positions()
    deep = first.get("deepstack_visual_embeds") or []
    tokens, logits = [], []
    for _ in range(new_tokens):
        length = sequence.shape[1]
        rotary = decoder.rotary_emb(sequence, positions[..., :length])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        hidden, alive = sequence, torch.ones(length, dtype=torch.bool)
        for index, layer in enumerate(decoder.layers):
            survivors = before if index == 0 else kept[index - 1]
            alive = torch.ones(length, dtype=torch.bool)
            alive[visual] = False
            alive[visual[survivors]] = True
            allowed = causal & alive | torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
            if index < len(deep):
                hidden = hidden.clone()
                hidden[0, torch.nonzero(first["visual_pos_masks"][0]).flatten()] += deep[index]
        step = model.lm_head(decoder.norm(hidden)[:, -1])
        logits.append(step[0])
        tokens.append(int(step.argmax()))
        sequence = torch.cat((sequence, decoder.embed_tokens(step.argmax(-1))[:, None]), dim=1)
    return tokens, torch.stack(logits)


def compare_with_oracle(tiny: Tiny, prompt, method):
    model, inputs = tiny.model(), tiny.batch(prompt)
    with Watched(model) as watched:
        generated(model, dict(inputs))
    with method.attach(model) as run:
        tokens, logits = generated(model, dict(inputs))
    (trace,) = run.traces
    visual = torch.nonzero((inputs["input_ids"][0] == IMAGE) | (inputs["input_ids"][0] == VIDEO)).flatten()
    if trace.structure_tokens:  # newlines are no candidates
        with torch.no_grad():
            embeds, newline = watched.calls[0]["inputs_embeds"][0], model.model.image_newline
        visual = visual[(embeds[visual] != newline).any(-1)]
    assert len(visual) == trace.visual_tokens and trace.tokens_out[-1] < len(visual)
    before = torch.arange(len(visual))
    if method.reduces_vision or BEFORE_DECODER in method.stages(4):
        before = trace.kept[0]
    own_tokens, own_logits = masked(model, watched, visual, trace.kept, before, 5)
    assert tokens[0].tolist() == own_tokens
    torch.testing.assert_close(logits[0], own_logits, atol=1e-4, rtol=1e-4)


METHODS = {
    "autoprune": {"recycle_fraction": 0.0, "positions": "original"},
    "fastv": {},
    "entropyprune": {},
    "hiprune": {"positions": "original"},
    "pdrop": {"positions": "original"},
    "transprune": {"positions": "original"},
}


@every_family
@pytest.mark.parametrize("method", METHODS)
def test_half_kept_is_the_masking_oracle(name, method):
    tiny = FAMILIES[name]
    options = METHODS[method]
    compare_with_oracle(tiny, TWO, get_method(method)(target_tokens=half(tiny, *TWO), **options))


@pytest.mark.parametrize("name", FILMS)
def test_a_video_is_the_masking_oracle(name):
    tiny, prompt = FAMILIES[name], (3, ("video", 5), 4, ("image", 1), 6)
    for method in ("autoprune", "hiprune"):
        compare_with_oracle(tiny, prompt, get_method(method)(target_tokens=half(tiny, *prompt), **METHODS[method]))


@every_family
def test_a_row_of_a_batch_is_the_row_alone(name):
    tiny = FAMILIES[name]
    model, prompts = tiny.model(), [ONE, TEXT, TWO]
    for method in ("autoprune", "visionzip"):
        with get_method(method)(target_tokens=half(tiny, *ONE)).attach(model) as run:
            tokens, logits = generated(model, tiny.batch(*prompts))
            together = list(run.traces)
            for row, prompt in enumerate(prompts):
                own_tokens, own_logits = generated(model, tiny.batch(prompt))
                assert torch.equal(tokens[row : row + 1], own_tokens), (method, row)
                torch.testing.assert_close(logits[row : row + 1], own_logits, atol=1e-4, rtol=1e-4)
                assert run.traces[-1].tokens_out == together[row].tokens_out


@every_family
def test_a_loop_reads_every_prompt_anew(name):
    """Images at different places, a text-only prompt between: each as in a context of its own."""
    tiny = FAMILIES[name]
    model, method = tiny.model(), AutoPrune(target_tokens=8)
    prompts = [ONE, TEXT, TWO, (9, ("image", 2), 3), TEXT]
    alone = []
    for prompt in prompts:
        with method.attach(model):
            alone.append(generated(model, tiny.batch(prompt))[1])
    with method.attach(model) as run:
        for prompt, expected in zip(prompts, alone, strict=True):
            assert torch.equal(generated(model, tiny.batch(prompt))[1], expected)
    assert [trace.visual_tokens > 0 for trace in run.traces] == [True, False, True, True, False]
    assert torch.equal(alone[1], generated(model, tiny.batch(TEXT))[1])


@every_family
def test_beams_and_samples(name):
    tiny = FAMILIES[name]
    model, method = tiny.model(), AutoPrune(target_tokens=8)
    single, both = tiny.batch(TWO), tiny.batch(ONE, TWO)
    with method.attach(model) as run, torch.no_grad():
        beams = model.generate(**both, max_new_tokens=5, num_beams=3, do_sample=False)
        assert len(run.traces) == 2
        alone = model.generate(**single, max_new_tokens=5, num_beams=3, do_sample=False)
        assert torch.equal(beams[1, -5:], alone[0, -5:])
        torch.manual_seed(3)
        several = model.generate(**single, max_new_tokens=5, num_return_sequences=2, do_sample=True)
        torch.manual_seed(3)
        again = model.generate(**single, max_new_tokens=5, num_return_sequences=2, do_sample=True)
        assert torch.equal(several, again) and len(several) == 2


@every_family
def test_assisted_decoding_is_greedy_decoding(name):
    """Guesses looked up in the prompt, and guesses of a model beside, which has not seen what was pruned."""
    tiny = FAMILIES[name]
    model, inputs, beside = tiny.model(), tiny.batch(TWO), copy.deepcopy(tiny.model())
    for method in (AutoPrune(target_tokens=8), get_method("visionzip")(target_tokens=8)):
        with method.attach(model):
            greedy, _ = generated(model, dict(inputs), tokens=8)
            for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": beside}):
                guessed, _ = generated(model, dict(inputs), tokens=8, **how)
                assert torch.equal(greedy, guessed), (method.name, how)


@every_family
def test_a_model_inside_another(name):
    """PEFT's adapters (which do nothing at first), torch.compile and data parallelism hide the family's class."""
    tiny = FAMILIES[name]
    model, inputs, method = tiny.model(), tiny.batch(ONE, TWO), AutoPrune(target_tokens=8)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 80, -100)
    with method.attach(model), torch.no_grad():
        tokens, logits = generated(model, dict(inputs))
        loss = model(**inputs, labels=labels).loss
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(copy.deepcopy(tiny.model()), adapters).eval()
    compiled = torch.compile(copy.deepcopy(tiny.model()), backend="eager")
    for wrapped in (adapted, compiled, torch.nn.DataParallel(model)):
        assert family_of(wrapped).name == name
        if isinstance(wrapped, torch.nn.DataParallel):
            continue  # needs a GPU to run
        # Compiling takes a minute and changes nothing here.
        with torch.compiler.set_stance("force_eager"), method.attach(wrapped) as run, torch.no_grad():
            own_tokens, own_logits = generated(wrapped, dict(inputs))
            own_loss = wrapped(**inputs, labels=labels).loss
        assert torch.equal(own_tokens, tokens) and len(run.traces) == 4
        torch.testing.assert_close(own_logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own_loss, loss)


@every_family
@pytest.mark.parametrize("method", ["autoprune", "visionzip"])
def test_a_model_that_accelerate_has_dispatched(name, method):
    """As `device_map="auto"` does over several devices: hooks copy what goes from one module to the next."""
    tiny = FAMILIES[name]
    inputs, method = tiny.batch(ONE, TWO, TEXT), get_method(method)(target_tokens=8)
    with method.attach(tiny.model()):
        expected = generated(tiny.model(), dict(inputs))[1]
    dispatched = accelerate.dispatch_model(copy.deepcopy(tiny.model()), {"": "cpu"}, force_hooks=True)
    with method.attach(dispatched) as run:
        torch.testing.assert_close(generated(dispatched, dict(inputs))[1], expected)
    assert len(run.traces) == 3


@every_family
def test_a_prompt_as_embeddings(name):
    """Placeholders are found by their embedding, as transformers finds them; without pixels nothing can be known."""
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(ONE, TWO)
    embeds = {key: value for key, value in inputs.items() if key != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def logits():
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(**embeds, **options).logits, 1)

    dense = logits()
    with AutoPrune(target_tokens=EVERYTHING).attach(model):
        torch.testing.assert_close(logits(), dense, atol=1e-4, rtol=1e-4)
    with AutoPrune(target_tokens=8).attach(model) as run:
        assert not torch.allclose(logits(), dense, atol=1e-3)
        assert [trace.visual_tokens + trace.structure_tokens for trace in run.traces] == [
            (row == IMAGE).sum().item() for row in inputs["input_ids"]
        ]
        alone = {"inputs_embeds": embeds["inputs_embeds"], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(RuntimeError, match=f"{name} says so by input_ids"):
            model(**alone)


@every_family
def test_afterwards_the_model_is_as_before(name):
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(ONE, TWO)
    before = generated(model, dict(inputs))[1]
    attributes = {key: dict(module.__dict__) for key, module in model.named_modules()}
    with Dense().attach(model):
        assert torch.equal(generated(model, dict(inputs))[1], before)
    with AutoPrune(target_tokens=8).attach(model):
        assert not torch.equal(generated(model, dict(inputs))[1], before)
    assert torch.equal(generated(model, dict(inputs))[1], before)
    for key, module in model.named_modules():
        assert module.__dict__.keys() - {"rope_deltas"} == attributes[key].keys() - {"rope_deltas"}, key


@every_family
def test_forward_without_generate(name):
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(TWO)
    with torch.no_grad(), AutoPrune(target_tokens=8).attach(model) as run:
        logits = model(**inputs).logits
        first = generated(model, dict(inputs))[1][:, 0]
    torch.testing.assert_close(logits[:, -1], first, atol=1e-4, rtol=1e-4)
    assert logits.shape[1] == run.traces[0].text_tokens + run.traces[0].tokens_out[-1]


@every_family
@pytest.mark.parametrize("method", ["autoprune", "visionzip"])
def test_labels(name, method):
    """The loss is that of the logits over the text tokens, each predicted from what stands before it now."""
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(TWO)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (ids == VIDEO), -100)
    with torch.no_grad():
        dense = model(**inputs, labels=labels).loss
        with get_method(method)(target_tokens=EVERYTHING).attach(model):
            torch.testing.assert_close(model(**inputs, labels=labels).loss, dense)
        with get_method(method)(target_tokens=9).attach(model) as run:
            output = model(**inputs, labels=labels)
    trace = run.traces[0]
    text = ids[0][(ids[0] != IMAGE) & (ids[0] != VIDEO)]
    # Text behind the images: as many logits as tokens at the end.
    tail = len(tiny.prompt(9)[0]) + 1
    expected = torch.nn.functional.cross_entropy(output.logits[0, -tail - 1 : -1], text[-tail:])
    only_tail = labels.clone()
    only_tail[:, :-tail] = -100
    with torch.no_grad(), get_method(method)(target_tokens=9).attach(model):
        torch.testing.assert_close(model(**inputs, labels=only_tail).loss, expected)
    assert output.logits.shape[1] < ids.shape[1] and trace.tokens_out[-1] < trace.visual_tokens
    assert not torch.isclose(output.loss, dense)


@every_family
@pytest.mark.parametrize("method", ["autoprune", "visionzip"])
def test_a_later_turn_on_the_pruned_cache(name, method):
    """The next turn's text: as if it had been generated, so as one step after another on the same cache."""
    tiny = FAMILIES[name]
    model, inputs = tiny.model(), tiny.batch(TWO)
    more = torch.randint(3, 80, (1, 6), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), get_method(method)(target_tokens=8).attach(model):
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        whole = torch.cat((first.sequences, more), dim=1)
        ids = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        second = model.generate(
            **ids, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        # The same tokens one by one.
        cache = model(**inputs, use_cache=True).past_key_values
        for token in whole[0, inputs["input_ids"].shape[1] :]:
            logits = model(input_ids=token[None, None], past_key_values=cache).logits
    torch.testing.assert_close(second.logits[0], logits[:, -1], atol=1e-4, rtol=1e-4)


@every_family
def test_an_image_on_a_pruned_cache_is_refused(name):
    tiny = FAMILIES[name]
    model = tiny.model()
    with torch.no_grad(), AutoPrune(target_tokens=8).attach(model):
        cache = model(**tiny.batch(ONE), use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match=f"{name}.*later turn"):
            model(**tiny.batch(ONE), past_key_values=cache)


@every_family
def test_what_a_family_cannot_do_is_refused_by_name(name):
    tiny = FAMILIES[name]
    model = tiny.model()
    with pytest.raises(UnsupportedError, match=f"'tome'.*{name}"), get_method("tome")(target_tokens=8).attach(model):
        pass
    with AutoPrune(target_tokens=8).attach(model), pytest.raises(UnsupportedError, match="output_attentions"):
        model(**tiny.batch(ONE), output_attentions=True)
    computed = []
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: computed.append(1))
    chunks = transformers.GenerationConfig(max_new_tokens=2, prefill_chunk_size=8)
    static = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    with get_method("fastv")(target_tokens=8).attach(model):
        for how, message in (
            ({"prefill_chunk_size": 8}, "prefill_chunk_size.*cannot be pruned"),
            ({"generation_config": chunks}, "prefill_chunk_size.*cannot be pruned"),
            ({"past_key_values": static}, "StaticCache"),
            *(
                ({"cache_implementation": kind}, f"cache_implementation='{kind}' cannot be used with pruning")
                for kind in ("static", "offloaded_static", "offloaded", "quantized")
            ),
        ):
            with pytest.raises(ValueError, match=message):
                model.generate(**tiny.batch(ONE), **how)
    hook.remove()
    assert not computed
    features = tiny.batch(ONE)
    outside = generated_features(model, features)
    if outside is not None:
        with AutoPrune(target_tokens=8).attach(model), pytest.raises(UnsupportedError, match=f"outside.*{name}"):
            model(input_ids=features["input_ids"], mm_encoder_outputs={"image": outside})


def generated_features(model, inputs):
    names = inspect.signature(model.model.get_image_features).parameters
    with torch.no_grad():
        return model.model.get_image_features(
            **{key: value for key, value in inputs.items() if key in names}, return_dict=True
        )


@pytest.mark.parametrize("name", AXES)
def test_renumbering_has_no_meaning_with_several_axes(name, caplog):
    """A method whose default it is goes on without; whoever asks for it hears that it cannot be had."""
    model, both = FAMILIES[name].model(), get_method("divprune+autoprune")
    first = {"divprune.target_tokens": 12}
    asked = [
        get_method("fastv")(target_tokens=8, positions="compact"),
        AutoPrune(target_tokens=8, positions="compact"),
        get_method("autoprune").from_options({"positions": "compact"}),
        dataclasses.replace(AutoPrune(), positions="compact"),
        build_method("visionzip", {"positions": "compact"}),
        both.from_options({**first, "positions": "compact"}),
        get_method("0:uniform:0.5").from_options({"positions": "compact"}),
    ]
    for method in asked:
        with pytest.raises(OptionError, match="compact.*M-RoPE"):
            method.attach(model)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(method)))
        with pytest.raises(OptionError, match="compact.*M-RoPE"):
            dataclasses.replace(copied, visual_token_num=9).attach(model)
    for method in (AutoPrune(target_tokens=8), get_method("visionzip")(), both.from_options(first)):
        assert method.positions == "compact" and method.settings()["positions"] == "compact"
        assert type(method.settings()["positions"]) is str
        for own in (method, copy.copy(method), pickle.loads(pickle.dumps(method)), dataclasses.replace(method)):
            assert own == method and own.attach(model).method.positions == "original"


def test_refused_families():
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    gemma = transformers.Gemma3Config(text_config={**text, "vocab_size": 99}, vision_config=tower, image_token_id=9)
    pali = transformers.PaliGemmaConfig(
        text_config={**text, "model_type": "gemma", "vocab_size": 99},
        vision_config={**tower, "model_type": "siglip_vision_model"},
        projection_dim=32,
    )
    for kind, config in (("Gemma3", gemma), ("PaliGemma", pali)):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
        with pytest.raises(UnsupportedError, match=f"{kind.lower()} .*cannot be pruned"):
            AutoPrune(target_tokens=8).attach(model)
