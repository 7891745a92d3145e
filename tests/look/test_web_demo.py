"""The web demo without a browser: both answers are the tools' own, mistakes are told, drawings show what survives."""

import argparse
import sys

import numpy as np
import pytest
from PIL import Image

from llava.eval import run_llava
from llava.eval.reports.look.traces import read_line
from llava.serve import drawing, gradio_app, web
from llava.utils import UserError
from tests.eval.helpers import TINY_MODEL, fails_with_one_line
from tests.families.models import FAMILIES
from tests.families.processors import chat_template, picture, processor, save
from tests.look.runs import trace

QUESTION = "What color is the star?\nAnswer the question using a single word or phrase."


def flags(*more) -> argparse.Namespace:
    return web.build_parser().parse_args([str(flag) for flag in ("--device", "cpu", *more)])


@pytest.fixture(scope="module")
def tiny():
    from llava.serve.side_by_side import SideBySide

    return SideBySide(flags("--model-path", TINY_MODEL))


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    """A wide picture with one red star, so that it is padded."""
    image = Image.new("RGB", (300, 200), "white")
    image.paste((200, 30, 30), (120, 60, 180, 120))
    path = tmp_path_factory.mktemp("picture") / "star.png"
    image.save(path)
    return path


def last(halves):
    return list(halves)[-1]


def test_answers_are_those_of_the_tools(tiny, star, capsys):
    dense, pruned = last(tiny.answer(tiny.read_picture(star), QUESTION, tiny.method("autoprune", "64")))
    texts = []
    for method in ("dense", "autoprune"):
        argv = ["--model-path", str(TINY_MODEL), "--image-file", str(star), "--query", QUESTION, "--method", method]
        texts.append(run_llava.eval_model(run_llava.build_parser().parse_args([*argv, "--device", "cpu"])))
    capsys.readouterr()
    assert [dense.text, pruned.text] == texts
    assert dense.looked.counts == (576,) * 12 and pruned.looked.visual == 576
    assert pruned.costs["nominal"] == pytest.approx(64, abs=1) and pruned.looked.target == 64
    assert pruned.looked.rasters[0]["box"] == [0.0, -0.25, 1.0, 1.25] and pruned.looked.groups
    for half in (dense, pruned):
        assert half.done and 0 < half.prefill <= half.seconds and 0 < half.first <= half.seconds


def test_answers_come_piece_by_piece_and_dense_first(tiny, star):
    seen = [
        (a.text, a.done, b.text) for a, b in tiny.answer(tiny.read_picture(star), QUESTION, tiny.method("fastv", "0.2"))
    ]
    assert len(seen) >= 4 and not seen[0][1]
    assert all(not pruned for _, done, pruned in seen if not done), "the second answer waits for the first"


def test_who_leaves_early_leaves_a_free_model(tiny, star):
    for _ in range(2):
        halves = tiny.answer(tiny.read_picture(star), QUESTION, tiny.method("autoprune", "64"))
        next(halves)
        halves.close()
    assert last(tiny.answer(tiny.read_picture(star), QUESTION, tiny.method("autoprune", "64")))[1].done


@pytest.mark.parametrize(
    ("method", "budget", "options", "complaint"),
    [
        ("nosuch", "64", "", "nosuch"),
        ("autoprune", "many", "", "many"),
        ("autoprune", "", "", "budget"),
        ("autoprune", "64,32", "", "one number"),
        ("autoprune", "9999", "", "576"),
        ("autoprune", "64", "gamma", "key=value"),
        ("autoprune", "64", "nosuch=1", "nosuch"),
    ],
)
def test_wrong_controls_are_told(tiny, method, budget, options, complaint):
    with pytest.raises(UserError, match=complaint):
        tiny.method(method, budget, options)


def test_compositions_and_shares_are_methods_too(tiny):
    assert tiny.method("divprune+autoprune", "0.11", "divprune.target_tokens=288").target_ratio == 0.11
    assert tiny.method("2:fastv:0.5;6:random:0.5", "whatever").name


def test_wrong_questions_and_pictures_are_told(tiny, star, tmp_path):
    image, method = tiny.read_picture(star), tiny.method("autoprune", "64")
    for question, complaint in (("  ", "ask something"), ("a" * 5000, "5000 characters"), ("<image> <image>", "image")):
        with pytest.raises(UserError, match=complaint):
            list(tiny.answer(image, question, method))
    assert last(tiny.answer(image, QUESTION, method))[1].done, "the model is free again"
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>")
    for name in ("notes.png", "drawing.svg"):
        with pytest.raises(UserError, match="cannot be read"):
            tiny.read_picture(tmp_path / name)
    with pytest.raises(UserError, match="upload it again"):
        tiny.read_picture(tmp_path / "gone.png")


def test_pictures_of_too_many_pixels_are_refused(tiny, star, monkeypatch):
    monkeypatch.setattr(tiny, "max_image_pixels", 100)
    with pytest.raises(UserError, match="300 x 200 pixels are more than"):
        tiny.read_picture(star)


def test_what_the_page_gets(tiny, star):
    pytest.importorskip("pandas", reason="pandas, which comes with Gradio, is not installed")
    steps = list(web.answers(tiny, str(star), QUESTION, "autoprune", "64", "", 3))
    problem, dense, pruned, _, costs, first, second, curve, state = steps[-1]
    assert problem == "" and dense and pruned and state is not None
    assert "<td>FLOPs, of dense</td>" in costs and "slope" in costs and "time: prefill" in costs
    assert "576 patches after layer 3" in first and "merged after layer 3" in second and "data:image/png" in second
    assert set(curve["run"]) == {"dense", "autoprune", "budget"} and curve["layer"].min() == -1
    assert curve[(curve["run"] == "autoprune") & (curve["layer"] == -1)]["visual tokens"].item() == 576
    assert web.drawn(state, -1, 1).count("<img") == 1 and web.drawn(None, 0, 0) == ""
    assert steps[0][-1] is None


def test_the_page_shows_mistakes_as_text(tiny, star):
    (only,) = web.answers(tiny, str(star), QUESTION, "<script>alert(1)</script>", "64", "", 0)
    assert "&lt;script&gt;" in only[0] and "<script>" not in only[0] and 'role="alert"' in only[0]
    (only,) = web.answers(tiny, None, QUESTION, "autoprune", "64", "", 0)
    assert "choose a picture" in only[0]


def test_any_family_answers(tmp_path):
    from llava.serve.side_by_side import SideBySide

    name, place = "qwen2_vl", tmp_path / "model"
    made = processor(name, tmp_path)
    made.chat_template = chat_template(name)
    FAMILIES[name].model().save_pretrained(place)
    save(made, place)
    picture(1, 40, 30).save(tmp_path / "picture.png")
    side_by_side = SideBySide(flags("--model-path", place, "--max-new-tokens", 4))
    side_by_side.warm_up(side_by_side.method("autoprune", "0.5"))
    image = side_by_side.read_picture(tmp_path / "picture.png")
    dense, pruned = last(side_by_side.answer(image, "what is shown here ?", side_by_side.method("autoprune", "0.5")))
    assert dense.done and pruned.done and pruned.looked.counts[-1] < dense.looked.counts[-1]
    grid = pruned.looked.rasters[0]["grid"]
    assert grid[0] * grid[1] == pruned.looked.visual and len(drawing.survivors(image, pruned.looked, 1)) == 1


def test_drawings_show_survivors_padding_and_merged_tokens():
    """`tests.look.runs`: a red picture in the two middle rows of 4 x 4 tokens, padding above and below."""
    looked = read_line({**trace(0, True)}, "t")
    red = Image.new("RGB", (80, 40), "red")
    (before,), (after,) = drawing.survivors(red, looked, -1), drawing.survivors(red, looked, 1)
    assert before.size == after.size == (480, 480)

    def cell(image, column, row):
        return np.asarray(image)[row * 120 + 40 : row * 120 + 80, column * 120 + 40 : column * 120 + 80].reshape(-1, 3)

    assert (cell(before, 3, 1) == (255, 0, 0)).all() and (cell(after, 1, 1) == (255, 0, 0)).all()
    assert cell(after, 3, 1).min() > 200, "token 7 is gone"
    padding = cell(before, 1, 0).astype(int)
    assert (padding.max(1) - padding.min(1) < 20).all() and padding.std() > 5, "gray, and hatched"
    pixels = np.asarray(after).astype(int)
    colored = (pixels.max(2) - pixels.min(2) > 90) & ~((pixels == (255, 0, 0)).all(2))
    assert colored[60, 238:243].any() and not colored[60, 358:363].any(), "left of 2, but not between 2 and 3"
    assert drawing.words(looked, 1) == "3 patches + 1 merged after layer 1"
    assert drawing.words(looked, -1) == "all 16 visual tokens"


def test_tokens_without_places_are_drawn_in_their_order():
    line = {key: value for key, value in trace(0, True).items() if key != "rasters"}
    (shown,) = drawing.survivors(Image.new("RGB", (30, 60), "red"), read_line(line, "t"), 0)
    assert (np.asarray(shown)[:, :, 0] > 200).any() and not (np.asarray(shown) == (255, 0, 0)).all(2).any()
    assert "&lt;b&gt;" in drawing.as_html([], "<b>")


def test_it_listens_on_the_loopback_address_unless_told_otherwise():
    assert flags().host == "127.0.0.1"
    assert flags("--host", "0.0.0.0").host == "0.0.0.0"


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    fails_with_one_line(gradio_app.main, [], capsys, "needs Gradio", "autoprune-llava[serve]")


def test_mistakes_in_the_flags_are_one_line(capsys, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    for argv, part in (
        (["--port", "99999"], "--port"),
        (["--max-upload-mb", "0"], "--max-upload-mb"),
        (["--method", "nosuch", "--device", "cpu"], "nosuch"),
        (["--budget", "x", "--device", "cpu"], "x"),
        (["--model-path", tmp_path / "llava-v1.5-none"], "llava-v1.5-none"),
    ):
        fails_with_one_line(gradio_app.main, argv, capsys, part)
