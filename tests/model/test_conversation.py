"""Prompts are exact strings: one character more or less changes token ids and answers."""

from __future__ import annotations

import copy

import pytest

from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation, infer_conv_mode

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def prompt(name: str, *turns: str | None) -> str:
    conv = conv_templates[name].copy()
    for i, turn in enumerate(turns):
        conv.append_message(conv.roles[i % 2], turn)
    return conv.get_prompt()


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        ("vicuna_v1", ("<image>\nHi?", None), f"{USER} USER: <image>\nHi? ASSISTANT:"),
        ("v1", ("<image>\nHi?", None), f"{USER} USER: <image>\nHi? ASSISTANT:"),
        ("llava_v1", ("<image>\nHi?", None), f"{HUMAN} USER: <image>\nHi? ASSISTANT:"),
        (
            "vicuna_v1",
            ("<image>\nHi?", "Hello.", "And?", None),
            f"{USER} USER: <image>\nHi? ASSISTANT: Hello.</s>USER: And? ASSISTANT:",
        ),
        ("llava_v0", ("Hi?", None), f"{HUMAN}###Human: Hi?###Assistant:"),
        ("plain", ("<image>", "A cat."), "<image>\nA cat.\n"),
        ("mistral_instruct", ("<image>\nHi?", None), "[INST] <image>\nHi? [/INST]"),
        (
            "mistral_instruct",
            ("Hi?", "Hello.", "And?", None),
            "[INST] Hi? [/INST] Hello. </s>[INST] And? [/INST]",
        ),
        (
            "llava_llama_2",
            ("Hi?", "Hello.", "And?", None),
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
            "content that the user provides, and assist the user with a variety of tasks using natural language."
            "\n<</SYS>>\n\nHi? [/INST] Hello. </s><s>[INST] And? [/INST]",
        ),
        (
            "chatml_direct",
            ("<image>\nHi?", None),
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nHi?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "mpt",
            ("Hi?", None),
            "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
            "helpful and honest answers.<|im_end|><|im_start|>user\nHi?<|im_end|><|im_start|>assistant\n",
        ),
        (
            "qwen_1_5",
            ("<image>\nHi?", "Hello.", "And?", None),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nHi?<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen_2_5",
            ("Hi?", None),
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llava_llama_3",
            ("<image>\nHi? ", "Hello.", "And?", None),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
            "assistant. You are able to understand the visual content that the user provides, and assist the user with "
            "a variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "<image>\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma_instruct",
            ("<image>\nHi?", "Hello.", "And?", None),
            "<start_of_turn>user\n<image>\nHi?<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "mistral_zephyr",
            ("Hi?", None),
            "<|system|>\nYou are a helpful AI assistant.</s><|user|>\nHi?</s><|assistant|>\n",
        ),
        (
            "mistral_orca",
            ("Hi?", None),
            "<|im_start|>system\nYou are MistralOrca, a large language model trained by Alignment Lab AI. Write out "
            "your reasoning step-by-step to be sure you get the right answers!<|im_end|><|im_start|>user\nHi?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "llava_llama_2_simple",
            ("Hi?", None),
            "[INST] <<SYS>>\nAnswer the questions about the visual content that the user provides.\n<</SYS>>\n\n"
            "Hi? [/INST]",
        ),
        (
            "llava_llama_2_mmtag",
            ("Hi?", None),
            "[INST] <<SYS>>\nAnswer the questions about the visual content that the user provides.The visual content "
            "will be provided with the following format: <Image>visual content</Image>.\n<</SYS>>\n\nHi? [/INST]",
        ),
    ],
)
def test_prompts_are_llavas(name, turns, expected):
    assert prompt(name, *turns) == expected


def test_default_template_opens_with_its_worked_example():
    text = prompt("default", "Hi?", None)
    assert text.startswith(f"{HUMAN}###Human: What are the key differences between renewable and non-renewable")
    assert text.endswith("economic and social instability.\n###Human: Hi?###Assistant:")
    assert conv_templates["default"].offset == 2


def test_names_are_llavas_and_sennas():
    assert set(conv_templates) == {
        "senna",
        *("default", "v0", "v1", "vicuna_v1", "llama_2", "mistral_instruct", "chatml_direct", "mistral_direct"),
        *("plain", "v0_plain", "llava_v0", "v0_mmtag", "llava_v1", "v1_mmtag", "llava_llama_2", "mpt"),
        # LLaVA-NeXT's
        *("mistral_orca", "mistral_zephyr", "llava_v0_mmtag", "llava_v1_mmtag", "llava_llama_2_simple"),
        *("llava_llama_2_mmtag", "llava_llama_3", "llava_mistral_instruct", "qwen_1_5", "qwen_2", "qwen_2_5"),
        "gemma_instruct",
    }
    assert default_conversation is conv_templates["vicuna_v1"]
    assert conv_templates["mistral_direct"] is conv_templates["chatml_direct"]


def test_an_image_tuple_opens_the_first_turn():
    assert prompt("vicuna_v1", ("What <image>is this?", None, "Pad"), None).startswith(
        f"{USER} USER: <image>\nWhat is this? ASSISTANT:"
    )
    tagged = prompt("v1_mmtag", ("What is this?", None, "Pad"), None)
    assert "USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What is this? ASSISTANT:" in tagged


def test_copies_are_independent_and_templates_read_only():
    first, second = conv_templates["vicuna_v1"].copy(), conv_templates["vicuna_v1"].copy()
    first.append_message("USER", "a")
    assert second.messages == []
    with pytest.raises(TypeError, match="copy"):
        conv_templates["vicuna_v1"].append_message("USER", "a")
    third = first.copy()
    third.messages[0][1] = "b"
    assert first.messages[0][1] == "a"


def test_dict_leaves_images_out():
    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message("USER", ("look", object(), "Pad"))
    assert conv.dict()["messages"] == [["USER", "look"]]
    assert set(conv.dict()) == {"system", "roles", "messages", "offset", "sep", "sep2"}


def test_llama_2_needs_a_first_user_message():
    with pytest.raises(ValueError, match="must not be empty"):
        prompt("mistral_instruct", None)
    conv = Conversation("", ("USER", "ASSISTANT"), [["ASSISTANT", "hi"]], 0, SeparatorStyle.LLAMA_2, "", "</s>")
    with pytest.raises(ValueError, match="must come from 'USER'"):
        conv.get_prompt()


def test_deep_copies_are_writable():
    conv = copy.deepcopy(conv_templates["vicuna_v1"])
    conv.append_message(conv.roles[0], "a")
    assert conv.get_prompt() == f"{USER} USER: a "
    assert conv_templates["vicuna_v1"].messages == ()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-v1.5-13b-lora", "llava_v1"),
        ("llava-v1.6-vicuna-7b", "llava_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ("LLaVA-7B-v0", "llava_v0"),
        ("tiny-llava-v1.5", "llava_v1"),
        ("llava-1.5-7b-hf", "llava_v1"),
        ("llava-v1.6-mistral-7b-hf", "mistral_instruct"),
        ("llava-v1.6-vicuna-13b-hf", "llava_v1"),
        ("some-folder", "llava_v0"),
    ],
)
def test_the_template_follows_from_the_name_as_in_llava(name, mode):
    assert infer_conv_mode(name) == mode
