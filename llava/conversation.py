"""Prompt templates: how system prompt, roles, turns and separators become one string. LLaVA's names,
strings and separators.

Of images there is only the placeholder, `<image>`. The templates keep their messages in tuples, so that only a
`copy()` can be written to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.utils import UserError


class SeparatorStyle(Enum):
    """How turns are joined: one separator, two alternating ones, chat-markup, none (pretraining),
    Llama-2 instruction tags; in LLaVA-NeXT also chat-markup with line breaks, Llama-3's headers, or Gemma's turns.
    """

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    CHATML = auto()
    LLAMA_3 = auto()
    GEMMA = auto()


def _text(message: Any) -> str:
    # A message may be LLaVA's (text, image, image_process_mode) tuple.
    return message[0] if isinstance(message, tuple) else message


@dataclasses.dataclass
class Conversation:
    """A conversation: `messages` is a list of `[role, text]`; a text of None marks the turn the model has
    to fill in.
    """

    system: str
    roles: Sequence[str]
    messages: Sequence[Sequence[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn. Works on a `copy()` of a template; the templates themselves are read-only."""
        if not isinstance(self.messages, list):
            raise TypeError("this conversation is a shared template: call .copy() before appending messages")
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent conversation with the same turns."""
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages], skip_next=False)

    def __deepcopy__(self, memo: Any) -> Conversation:
        # `copy.deepcopy(conv_templates[name])` is common in LLaVA's users; it has to give something writable too.
        return self.copy()

    def dict(self) -> dict[str, Any]:
        """JSON-able view; images inside messages are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def _turns(self) -> list[tuple[str, str | None]]:
        turns = [(role, message) for role, message in self.messages]
        if turns and isinstance(turns[0][1], tuple):
            # The image always opens the first turn, wherever the user put the placeholder.
            role, message = turns[0]
            text = message[0].replace("<image>", "").strip()
            if "mmtag" in self.version:
                received = [(self.roles[0], "<Image><image></Image>"), (self.roles[1], "Received.")]
                turns = [*received, (role, text), *turns[1:]]
            else:
                turns[0] = (role, "<image>\n" + text)
        return [(role, _text(message)) for role, message in turns]

    def get_prompt(self) -> str:
        """The conversation as one string, ending with the bare role of an unanswered turn."""
        turns = self._turns()
        if self.sep_style is SeparatorStyle.LLAMA_2:
            return self._llama_2_prompt(turns)
        separators = (self.sep, self.sep if self.sep2 is None else self.sep2)
        if self.sep_style is SeparatorStyle.SINGLE:
            head, colon, separators = self.system + self.sep, ": ", (self.sep, self.sep)
        elif self.sep_style is SeparatorStyle.TWO:
            head, colon = self.system + self.sep, ": "
        elif self.sep_style is SeparatorStyle.MPT:
            head, colon, separators = self.system + self.sep, "", (self.sep, self.sep)
        elif self.sep_style is SeparatorStyle.CHATML:
            head, colon = f"{self.system}{self.sep}\n" if self.system else "", "\n"
            separators = (f"{self.sep}\n", f"{self.sep}\n")
        elif self.sep_style is SeparatorStyle.GEMMA:
            head, colon, separators = "", "", (self.sep, self.sep)
        elif self.sep_style is SeparatorStyle.LLAMA_3:
            return self._llama_3_prompt(turns)
        elif self.sep_style is SeparatorStyle.PLAIN:
            return self.system + "".join(text + separators[i % 2] for i, (_, text) in enumerate(turns) if text)
        else:
            raise ValueError(f"unknown separator style {self.sep_style!r}")
        prompt = head
        for i, (role, text) in enumerate(turns):
            prompt += role + colon + text + separators[i % 2] if text else role + colon.rstrip(" ")
        return prompt

    def _llama_2_prompt(self, turns: list[tuple[str, str | None]]) -> str:
        prompt = ""
        for i, (role, text) in enumerate(turns):
            if i == 0:
                if not text:
                    raise UserError("the first message of this template must not be empty")
                if role != self.roles[0]:
                    raise ValueError(f"the first message of this template must come from {self.roles[0]!r}")
                if self.system:
                    text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            if not text:
                continue
            prompt += f"{self.sep}[INST] {text} [/INST]" if i % 2 == 0 else f" {text} {self.sep2}"
        # The tokenizer writes the first BOS itself.
        return prompt.removeprefix(self.sep)

    def _llama_3_prompt(self, turns: list[tuple[str, str | None]]) -> str:
        # As Llama 3's own chat template writes it: texts are stripped, and the model's turn is opened in any case.
        said = [("system", self.system), *((role, text) for role, text in turns if text)]
        written = [f"{_HEADER.format(role)}{(text or '').strip()}{self.sep}" for role, text in said]
        return "".join(["<|begin_of_text|>", *written, _HEADER.format(self.roles[1])])


_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_POLITE_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_POLITE_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TAGS = "The visual content will be provided with the following format: <Image>visual content</Image>."
_TAGGED_IMAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with "
    "a variety of tasks using natural language."
) + _TAGS
_ABOUT_CONTENT = "Answer the questions about the visual content that the user provides."
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\n"
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
# One worked example precedes the user's first turn in the oldest template.
_V0_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_V0_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
    "have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)


def _template(system: str, roles: tuple[str, str], style: SeparatorStyle, sep: str, **fields: Any) -> Conversation:
    return Conversation(system, roles, fields.pop("messages", ()), fields.pop("offset", 0), style, sep, **fields)


_HUMAN = ("Human", "Assistant")
_USER = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_QWEN = ("<|im_start|>user", "<|im_start|>assistant")
_EOS = "</s>"

conv_vicuna_v0 = _template(
    _POLITE_HUMAN,
    _HUMAN,
    SeparatorStyle.SINGLE,
    "###",
    messages=(("Human", _V0_QUESTION), ("Assistant", _V0_ANSWER)),
    offset=2,
)
conv_vicuna_v1 = _template(_POLITE_USER, _USER, SeparatorStyle.TWO, " ", sep2=_EOS, version="v1")
conv_llama_2 = _template(_LLAMA_2_SYSTEM, _USER, SeparatorStyle.LLAMA_2, "<s>", sep2=_EOS, version="llama_v2")
conv_llava_llama_2 = _template(
    _LLAVA_LLAMA_2_SYSTEM, _USER, SeparatorStyle.LLAMA_2, "<s>", sep2=_EOS, version="llama_v2"
)
conv_mistral_instruct = _template("", _USER, SeparatorStyle.LLAMA_2, "", sep2=_EOS, version="llama_v2")
conv_mpt = _template(_MPT_SYSTEM, _CHATML, SeparatorStyle.MPT, "<|im_end|>", version="mpt")
conv_chatml_direct = _template(
    "<|im_start|>system\nAnswer the questions.", _CHATML, SeparatorStyle.MPT, "<|im_end|>", version="mpt"
)
conv_mistral_orca = _template(
    "<|im_start|>system\nYou are MistralOrca, a large language model trained by Alignment Lab AI. "
    "Write out your reasoning step-by-step to be sure you get the right answers!",
    _CHATML,
    SeparatorStyle.MPT,
    "<|im_end|>",
    version="mpt",
)
conv_mistral_zephyr = _template(
    "<|system|>\nYou are a helpful AI assistant.",
    ("<|user|>\n", "<|assistant|>\n"),
    SeparatorStyle.MPT,
    _EOS,
    version="mpt",
)
conv_llava_llama_2_simple = _template(
    _ABOUT_CONTENT, _USER, SeparatorStyle.LLAMA_2, "<s>", sep2=_EOS, version="llama_v2"
)
conv_llava_llama_2_mmtag = _template(
    _ABOUT_CONTENT + _TAGS, _USER, SeparatorStyle.LLAMA_2, "<s>", sep2=_EOS, version="llama_v2_mmtag"
)
conv_llava_llama_3 = _template(
    _LLAVA_LLAMA_2_SYSTEM, ("user", "assistant"), SeparatorStyle.LLAMA_3, "<|eot_id|>", version="llama_v3"
)
conv_qwen = _template(
    "<|im_start|>system\nYou are a helpful assistant.", _QWEN, SeparatorStyle.CHATML, "<|im_end|>", version="qwen"
)
conv_qwen_2_5 = dataclasses.replace(
    conv_qwen, system="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
)
conv_gemma_instruct = _template(
    "", ("<start_of_turn>user\n", "<start_of_turn>model\n"), SeparatorStyle.GEMMA, "<end_of_turn>\n", version="gemma"
)
conv_llava_plain = _template("", ("", ""), SeparatorStyle.PLAIN, "\n")
conv_llava_v0 = _template(_POLITE_HUMAN, _HUMAN, SeparatorStyle.SINGLE, "###")
conv_llava_v0_mmtag = _template(_TAGGED_IMAGE, _HUMAN, SeparatorStyle.SINGLE, "###", version="v0_mmtag")
# Same separators as vicuna_v1, but the system prompt speaks of a "human": LLaVA's training template.
conv_llava_v1 = _template(_POLITE_HUMAN, _USER, SeparatorStyle.TWO, " ", sep2=_EOS, version="v1")
conv_llava_v1_mmtag = _template(_TAGGED_IMAGE, _USER, SeparatorStyle.TWO, " ", sep2=_EOS, version="v1_mmtag")

default_conversation = conv_vicuna_v1

conv_templates: dict[str, Conversation] = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "senna": conv_vicuna_v1,  # as it was trained; its published evaluation takes llava_v1
    "mpt": conv_mpt,
    # Of LLaVA-NeXT.
    "mistral_orca": conv_mistral_orca,
    "mistral_zephyr": conv_mistral_zephyr,
    "llava_v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2_simple": conv_llava_llama_2_simple,
    "llava_llama_2_mmtag": conv_llava_llama_2_mmtag,
    "llava_llama_3": conv_llava_llama_3,
    "llava_mistral_instruct": conv_mistral_instruct,
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
    "qwen_2_5": conv_qwen_2_5,
    "gemma_instruct": conv_gemma_instruct,
}


def infer_conv_mode(model_name: str) -> str:
    """The template that suits a checkpoint of that name, as LLaVA's own tools choose it.

    The rules are LLaVA's, in its order; a version without the letter v (`llava-1.5-7b-hf`) is understood as well.
    Senna's is the one it was trained with. A name that says nothing gives `llava_v0`, as in LLaVA.
    """
    name = model_name.lower()
    if "senna" in name:
        return "senna"
    if "llama-2" in name:
        return "llava_llama_2"
    if "mistral" in name:
        return "mistral_instruct"
    if "1.6-34b" in name:
        return "chatml_direct"
    if "v1" in name or "llava-1." in name:
        return "llava_v1"
    return "mpt" if "mpt" in name else "llava_v0"


def with_image_tokens(text: str, images: int, start_end: bool = False) -> str:
    """The message with one placeholder per image.

    `<image-placeholder>` or `<image>` in the text say where the images belong; without them each gets a line in
    front. start_end: the checkpoint wants start and end tokens around an image.

    Raises:
        UserError: placeholders were written, but not one per image.
    """
    token = DEFAULT_IMAGE_TOKEN
    if start_end:
        token = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    text = text.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    written = text.count(DEFAULT_IMAGE_TOKEN)
    if written == 0:
        return f"{token}\n" * images + text
    if written != images:
        raise UserError(
            f"the text has {written} image placeholder(s) ({DEFAULT_IMAGE_TOKEN} or {IMAGE_PLACEHOLDER}) for {images} "
            "image(s): write one per image, or none"
        )
    return text.replace(DEFAULT_IMAGE_TOKEN, token)


def build_prompt(text: str, images: int, conv_mode: str, mm_use_im_start_end: bool = False) -> str:
    """The full prompt of a question about `images` images in the template `conv_mode`.

    Where the images belong and what is an error: see `with_image_tokens`. Some templates take no empty message.
    """
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], with_image_tokens(text, images, mm_use_im_start_end))
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    if not prompt:
        raise UserError("the question is empty and the template adds nothing to it: there is nothing to ask")
    return prompt
