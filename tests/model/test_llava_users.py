"""The calls that VLMEvalKit's and lmms-eval's LLaVA classes make, in their order and with their arguments.

Both use LLaVA as a library and know nothing of this package; what they import, pass and read must keep working.
Written from the interfaces that the two use; on CPU where they say `.cuda()`.
"""

from __future__ import annotations

import abc
import copy

import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.multimodal import VisualTokens, splice
from tests.model.tiny import tiny_model, write_original, write_tokenizer

VOCABULARY = 400
KIT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users") / "llava-v1.5-tiny"
    write_original(folder, tiny_model(text={"vocab_size": VOCABULARY}), vocab_size=VOCABULARY)
    return write_tokenizer(folder)


@pytest.fixture
def pictures(tmp_path):
    noise = np.random.default_rng(0)
    paths = []
    for i, (width, height) in enumerate([(40, 30), (30, 50), (64, 64)]):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


# --- VLMEvalKit: one prompt written by hand, float16 pixels, a stopping criterion ---------------------------


class KitLLaVA:
    """How VLMEvalKit loads LLaVA and asks it about interleaved texts and images."""

    def __init__(self, model_path, **kwargs):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        self.stop_str = "</s>"
        self.tokenizer, self.model, self.image_processor, self.context_len = load_pretrained_model(
            model_path=model_path,
            model_base=None,
            model_name=get_model_name_from_path(model_path),
            device_map="cpu",
        )
        self.kwargs = dict(do_sample=False, temperature=0, max_new_tokens=8, top_p=None, num_beams=1, use_cache=True)
        self.kwargs.update(kwargs)

    def generate(self, message, turns=None):
        from llava.constants import IMAGE_TOKEN_INDEX
        from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token

        content, images = "", []
        for kind, value in message:
            if kind == "image":
                images.append(value)
                value = " <image> "
            content += value
        images = [Image.open(path).convert("RGB") for path in images]
        args = abc.abstractproperty()  # the kit's stand-in for a config
        args.image_aspect_ratio = "pad"
        pixels = None
        if images:
            pixels = process_images(images, self.image_processor, args).to("cpu", dtype=torch.float16)
        prompt = KIT_SYSTEM + "USER: " + content + " ASSISTANT: "
        ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        stopping = KeywordsStoppingCriteria([self.stop_str], self.tokenizer, ids)
        with torch.inference_mode():
            output = self.model.generate(ids, images=pixels, stopping_criteria=[stopping], **self.kwargs)
        return output, self.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()


def independent_ids(model, tokenizer, ids, pixels, sizes, new_tokens):
    """Greedy decoding by a loop of plain forward calls on the whole sequence; no cache, no generate."""
    ids = ids.clone()
    start = ids.shape[1]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, images=pixels, image_sizes=sizes).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


def test_vlmevalkit(checkpoint, pictures):
    from llava.mm_utils import process_images, tokenizer_image_token

    kit = KitLLaVA(str(checkpoint))
    message = [("image", pictures[0]), ("text", "What is the color?"), ("image", pictures[1]), ("text", "And this?")]
    output, text = kit.generate(message)
    assert isinstance(text, str) and 1 <= output.shape[1] <= 8
    prompt = f"{KIT_SYSTEM}USER:  <image> What is the color? <image> And this? ASSISTANT: "
    ids = tokenizer_image_token(prompt, kit.tokenizer, return_tensors="pt")[None]
    images = [Image.open(path) for path in pictures[:2]]
    pixels = process_images(images, kit.image_processor, kit.model.config).half().to(kit.model.dtype)
    sizes = [image.size for image in images]
    with torch.inference_mode():
        assert output[0].tolist() == independent_ids(kit.model, kit.tokenizer, ids, pixels, sizes, 8)


def test_vlmevalkit_without_images_and_with_its_own_options(checkpoint):
    output, text = KitLLaVA(str(checkpoint), max_new_tokens=3).generate([("text", "What is the color?")])
    assert output.shape[0] == 1 and output.shape[1] <= 3 and isinstance(text, str)


def test_a_kit_can_be_pruned_from_outside(checkpoint, pictures):
    from llava.pruning import AutoPrune

    kit = KitLLaVA(str(checkpoint))
    message = [("image", pictures[0]), ("text", "What is the color?")]
    dense = kit.generate(message)[0].tolist()
    with AutoPrune(target_tokens=4).attach(kit.model) as run:
        kit.generate(message)
    assert run.traces[-1].visual_tokens == 16 and run.traces[-1].mean_tokens("nominal") < 6
    assert kit.generate(message)[0].tolist() == dense


# --- lmms-eval: templates, padded batches, sizes, likelihoods -----------------------------------------------


class LmmsLlava:
    """How lmms-eval loads LLaVA, generates for batches and scores continuations."""

    def __init__(self, pretrained, conv_template="vicuna_v1", device_map="cpu"):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        options = {"multimodal": True, "attn_implementation": "sdpa"}
        name = get_model_name_from_path(pretrained)
        try:
            loaded = load_pretrained_model(pretrained, None, name, device_map=device_map, **options)
        except TypeError:  # what LLaVA versions raise that do not know the option
            options.pop("multimodal")
            loaded = load_pretrained_model(pretrained, None, name, device_map=device_map, **options)
        self.tokenizer, self.model, self.image_processor, self.max_length = loaded
        self.config = self.model.config
        self.model.eval()
        self.model.tie_weights()
        self.conv_template = conv_template

    def pixels(self, images):
        from llava.mm_utils import process_images

        pixels = process_images(images, self.image_processor, self.config)
        if type(pixels) is list:
            return [image.to(dtype=torch.float16, device="cpu") for image in pixels]
        return pixels.to(dtype=torch.float16, device="cpu")

    def pad_sequence(self, ids, batch_first, padding_value):
        if self.tokenizer.padding_side == "left":
            ids = [row.flip(0) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=batch_first, padding_value=padding_value)
        return padded.flip(1) if self.tokenizer.padding_side == "left" else padded

    def generate_until(self, contexts, visuals, **kwargs):
        from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
        from llava.conversation import conv_templates
        from llava.mm_utils import tokenizer_image_token

        flat = [image for row in visuals for image in row]
        if "image_aspect_ratio" in kwargs and "image_aspect_ratio" not in self.config.__dict__:
            self.config.image_aspect_ratio = kwargs.pop("image_aspect_ratio")
        pixels = self.pixels(flat) if flat else None
        prompts = []
        for row, context in zip(visuals, contexts, strict=True):
            if pixels is not None and len(pixels) != 0 and DEFAULT_IMAGE_TOKEN not in context:
                context = " ".join([DEFAULT_IMAGE_TOKEN] * len(row)) + "\n" + context
            conv = conv_templates[self.conv_template].copy()
            conv.append_message(conv.roles[0], context)
            conv.append_message(conv.roles[1], None)
            prompts.append(conv.get_prompt())
        rows = [tokenizer_image_token(p, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for p in prompts]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = self.pad_sequence(rows, batch_first=True, padding_value=pad)
        output = self.model.generate(
            ids,
            attention_mask=ids.ne(pad),
            pad_token_id=pad,
            images=pixels,
            image_sizes=[image.size for image in flat],
            do_sample=False,
            temperature=kwargs.get("temperature", 0),
            top_p=kwargs.get("top_p"),
            num_beams=kwargs.get("num_beams", 1),
            max_new_tokens=kwargs.get("max_new_tokens", 6),
            use_cache=True,
        )
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)

    def loglikelihood(self, context, continuation, images):
        from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
        from llava.conversation import conv_templates
        from llava.mm_utils import tokenizer_image_token

        context = " ".join([DEFAULT_IMAGE_TOKEN] * len(images)) + "\n" + context
        if "llama_3" in self.conv_template:
            conv = copy.deepcopy(conv_templates[self.conv_template])
        else:
            conv = conv_templates[self.conv_template].copy()
        conv.append_message(conv.roles[0], context)
        conv.append_message(conv.roles[1], None)
        asked = tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        conv.messages[1][1] = continuation
        ids = tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        labels = ids.clone()
        labels[0, : asked.shape[1]] = -100
        sizes = [[image.size[0], image.size[1]] for image in images]
        with torch.inference_mode():
            outputs = self.model(
                input_ids=ids, labels=labels, images=self.pixels(images), use_cache=True, image_sizes=sizes
            )
        return outputs["loss"], outputs["logits"], ids, asked.shape[1]


@pytest.fixture(scope="module")
def lmms(checkpoint):
    return LmmsLlava(str(checkpoint))


def test_lmms_eval_batches_give_what_single_samples_give(lmms, pictures):
    images = [Image.open(path) for path in pictures]
    contexts = ["What is the color?", "How many circles are there in the picture? Answer the question.", "Hi"]
    # The grouping of images and the placeholders of the second row: two images in one question.
    visuals = [[images[0]], [images[1], images[2]], [images[0]]]
    together = lmms.generate_until(contexts, visuals, image_aspect_ratio="pad")
    alone = [lmms.generate_until([c], [v])[0] for c, v in zip(contexts, visuals, strict=True)]
    assert together == alone and len(set(together)) == 3


def test_lmms_eval_text_only_beams_and_lengths(lmms):
    assert len(lmms.generate_until(["What is the color?"], [[]], num_beams=2, max_new_tokens=4)) == 1
    assert lmms.max_length == 2048 and lmms.tokenizer.eos_token_id == 2
    assert lmms.tokenizer.encode("Hi", add_special_tokens=False) == lmms.tokenizer.encode("Hi")[1:]
    assert lmms.tokenizer.decode(lmms.tokenizer.eos_token_id) == "</s>"


def test_lmms_eval_loglikelihood(lmms, pictures):
    loss, logits, ids, start = lmms.loglikelihood("What is the color?", "red star", [Image.open(pictures[0])])
    # One placeholder became 16 tokens; the last positions predict the continuation.
    assert logits.shape[1] == ids.shape[1] + 15
    target = ids[0, start:]
    scores = logits[0, -len(target) - 1 : -1].log_softmax(-1)
    assert torch.allclose(loss, -scores[torch.arange(len(target)), target].mean(), atol=1e-5)


# --- names that LLaVA's users import ------------------------------------------------------------------------


def test_names_and_attributes(lmms):
    from llava import LlavaLlamaForCausalLM
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN  # noqa: F401
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import expand2square, load_image_from_base64, process_anyres_image  # noqa: F401
    from llava.utils import disable_torch_init  # noqa: F401

    model = lmms.model
    assert isinstance(model, LlavaLlamaForCausalLM)
    assert model.config.mm_use_im_start_end is False
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    tower = model.get_vision_tower()
    assert tower.is_loaded and tower.image_processor is lmms.image_processor and tower.num_patches == 16
    assert model.get_model().get_input_embeddings().weight.shape[0] == VOCABULARY
    # `stop_str = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2` in many scripts
    conv = conv_templates["vicuna_v1"].copy()
    assert (conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2) == "</s>"


def test_splicing_reads_the_ids_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(tuple(self.shape)) or tolist(self))
    image = VisualTokens(torch.ones(5, 4))
    prompt = splice(lambda ids: torch.zeros(*ids.shape, 4), torch.tensor([[1, -200, 2], [3, 4, 5]]), [image])
    assert reads == [(2, 3)] and prompt.layout.counts == (5, 0)
