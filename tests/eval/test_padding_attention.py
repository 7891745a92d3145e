"""CLS attention on padding: each tool as published, a flag to choose, and runs from before there was one."""

import json

import pytest
from PIL import Image

from llava.eval import model_vqa, model_vqa_loader, model_vqa_mmbench, model_vqa_science
from llava.eval.answering.adapter import LlavaAdapter
from llava.eval.answering.answerer import Answerer
from llava.pruning import get_method
from tests.eval.helpers import fails_with_one_line, read_jsonl, write_json, write_jsonl
from tests.eval.test_model_vqa_tools import ROWS, flags, write_tsv


@pytest.fixture
def masked(monkeypatch, preloaded):
    """For every batch that a run encoded: whether padding was masked."""
    seen = []
    encode = Answerer.encode
    monkeypatch.setattr(
        Answerer,
        "encode",
        lambda self, *args, **kw: (seen.append(self.adapter.masks_padding), encode(self, *args, **kw))[1],
    )
    return seen


@pytest.fixture
def commands(checkpoint, data):
    """Each tool with its question file and its published default."""
    entry = {"id": "7", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhich?"}]}
    science = write_json(data / "s.json", [entry])
    folder = ("--image-folder", data / "images")
    jsonl = write_jsonl(data / "q.jsonl", [{"question_id": 1, "image": "0.png", "text": "What?"}])
    return {
        "loader": (model_vqa_loader.main, flags(checkpoint, data, jsonl, *folder), "zero"),
        "open": (model_vqa.main, flags(checkpoint, data, jsonl, *folder), "keep"),
        "science": (model_vqa_science.main, flags(checkpoint, data, science, *folder), "keep"),
        "mmbench": (model_vqa_mmbench.main, flags(checkpoint, data, write_tsv(data / "t.tsv", ROWS[:1])), "zero"),
    }


def refuses(main, argv, capsys):
    capsys.readouterr()
    fails_with_one_line(main, argv, capsys, "padding_attention", "--overwrite")


TOOLS = ("loader", "open", "science", "mmbench")


@pytest.mark.parametrize("name", TOOLS)
def test_defaults_are_those_of_the_published_tools(commands, data, masked, name, capsys):
    main, argv, default = commands[name]
    assert main(argv) == 0
    assert masked == [default == "zero"]
    other = {"zero": "keep", "keep": "zero"}[default]
    # The run continues with its own value, said or not, and with no other.
    assert main(argv) == 0 and main([*argv, "--padding-attention", default]) == 0
    refuses(main, [*argv, "--padding-attention", other], capsys)
    assert main([*argv, "--padding-attention", other, "--overwrite"]) == 0
    assert masked == [default == "zero", other == "zero"]
    refuses(main, argv, capsys)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"model_vqa_science; default: {default}" in " ".join(capsys.readouterr().out.split())


def forget(data):
    """The answers as earlier versions wrote them, which knew no such option."""
    records = read_jsonl(data / "a.jsonl")
    for record in records:
        record["metadata"].pop("padding_attention", None)
    write_jsonl(data / "a.jsonl", records)
    meta = json.loads((data / "a.meta.json").read_text())
    meta["options"].pop("padding_attention", None)
    meta["arguments"].pop("padding_attention", None)
    write_json(data / "a.meta.json", meta)


@pytest.mark.parametrize("name", TOOLS)
def test_runs_begun_before_continue_as_they_began(commands, data, masked, name, capsys):
    main, argv, default = commands[name]
    main([*argv, "--padding-attention", "zero"])  # what every tool did
    forget(data)
    before = read_jsonl(data / "a.jsonl")
    write_jsonl(data / "a.jsonl", [{**before[0], "question_id": "another"}])  # the question itself is pending again
    capsys.readouterr()
    assert main(argv) == 0
    assert masked == [True, True], "zero, as the answers that are there"
    assert ("begun with --padding-attention zero" in capsys.readouterr().err) == (default == "keep")
    records = read_jsonl(data / "a.jsonl")
    assert records[0] == before[0] and len(records) == 2
    assert main([*argv, "--padding-attention", "zero"]) == 0
    refuses(main, [*argv, "--padding-attention", "keep"], capsys)


def test_what_is_kept_depends_on_it(loaded, data):
    """A wide picture: padding above and below, to which the random tower gives attention like to the rest."""
    tokenizer, model, processor, _ = loaded
    Image.effect_noise((80, 20), 90).convert("RGB").save(data / "images" / "0.png")
    from llava.eval.common.questions import Question

    answerer = Answerer(LlavaAdapter(tokenizer, model, processor), data / "images")
    sample = answerer.prepare(Question(0, "q:1", 1, "What?", "0.png"))
    attention = {}
    with get_method("dense")().attach(model):
        for answerer.adapter.masks_padding in (True, False):
            inputs = answerer.encode([sample], with_cls_attention=True).inputs
            attention[answerer.adapter.masks_padding] = inputs.cls_attention[0]
    zeroed = attention[True] == 0
    assert 0 < zeroed.sum() < 16 and (attention[False] > 0).all()
    assert (attention[True][~zeroed] == attention[False][~zeroed]).all()
