"""VQA accuracy of VQAv2 and VizWiz answers, and reviews of LLaVA-Bench, by hand."""

import pytest

from llava.eval import eval_vqa, summarize_gpt_review
from llava.eval.tasks import vqa as vqa_task
from tests.eval.helpers import answer, fails_with_one_line, read_json, write_json, write_jsonl


def answers(*words):
    return [{"answer": word, "answer_confidence": "yes"} for word in words]


VQA = {
    "annotations": [
        {"question_id": 7, "answer_type": "number", "answers": answers(*["2"] * 3, *["3"] * 7)},
        {"question_id": 8, "answer_type": "yes/no", "answers": answers(*["yes"] * 10)},
        {"question_id": 9, "answer_type": "number", "answers": answers(*["a dog"] * 2, *["cat"] * 8)},
    ]
}


def test_vqav2_answers_and_upload(tmp_path, capsys):
    """Three of ten say 2: leaving one of them out leaves 2/3, one of the others 1; (3 * 2/3 + 7) / 10 = 0.9.

    Two of ten say dog: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    """
    truth = write_json(tmp_path / "v2.json", VQA)
    given = [answer("7", "Two."), answer(9, "The dog"), answer(9, "a cat."), answer(9, "dog"), answer(5, "x")]
    result = write_jsonl(tmp_path / "a.jsonl", given)
    out = tmp_path / "s.json"
    eval_vqa.main(["--annotation-file", str(truth), "--result-file", str(result), "--json", str(out)])
    printed = capsys.readouterr()
    assert printed.out == "Samples: 2\nAccuracy: 75.00%\n  number: 75.00% (2 questions)\n"
    assert "1 of 3 questions have no answer" in printed.err and "2 answers repeat" in printed.err
    scores = read_json(out)
    assert scores["accuracy"] == pytest.approx(75.0) and scores["type_number"] == pytest.approx(75.0)
    assert (scores["missing"], scores["duplicate"], scores["unmatched"]) == (1, 2, 1)
    upload = [{"question_id": 7, "answer": "2"}, {"question_id": 9, "answer": "dog"}]
    again = vqa_task.score_files(str(truth), str(write_json(tmp_path / "u.json", upload)))
    assert again["accuracy"] == pytest.approx(75.0)


def test_vizwiz_by_image(tmp_path):
    truth = write_json(tmp_path / "val.json", [{"image": "a.jpg", "question": "?", "answers": answers("yes", "no")}])
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question_id": "a", "image": "a.jpg", "text": "?"}])
    result = write_jsonl(tmp_path / "a.jsonl", [answer("a", "yes")])
    # Two people: leaving the agreeing one out gives 0, the other 1/3.
    scores = vqa_task.score_files(str(truth), str(result), str(questions))
    assert scores["accuracy"] == pytest.approx(100 / 6)
    upload = write_json(tmp_path / "u.json", [{"image": "a.jpg", "answer": "yes"}])
    assert vqa_task.score_files(str(truth), str(upload))["accuracy"] == pytest.approx(100 / 6)


def test_bad_vqa_files(tmp_path, capsys):
    result = write_jsonl(tmp_path / "a.jsonl", [answer(1, "x")])
    truth = tmp_path / "t.json"
    argv = ["--annotation-file", truth, "--result-file", result]
    for content, part in (
        ({"annotations": []}, "neither VQAv2"),
        ([{"image": "a.jpg"}], "entry 0: key 'answers' is missing"),
        ({"annotations": [{"question_id": 1, "answers": ["x"]}]}, "annotations[0].answers[0] must be an object"),
        ({"annotations": [VQA["annotations"][0]] * 2}, "occurs twice"),
        (VQA, "no answer belongs"),
    ):
        write_json(truth, content)
        fails_with_one_line(eval_vqa.main, argv, capsys, part)
    argv[-1] = write_json(tmp_path / "u.json", [{"question_id": 7}])
    fails_with_one_line(eval_vqa.main, argv, capsys, "u.json: entry 0: key 'answer' is missing")


def test_reviews_without_ignored_questions(tmp_path, capsys):
    """The figures of LLaVA's tool for this file: grades 8 8, 8 4 and 9 9 are left."""
    grades = {1: [8, 8], 2: [8, 4], 3: [10, 1], 13: [9, 9]}
    records = [{"question_id": key, "category": f"c{key}", "tuple": pair} for key, pair in grades.items()]
    path = write_jsonl(tmp_path / "gpt4_text_7b.jsonl", records)
    summarize_gpt_review.main(["-d", str(tmp_path), "-f", path.name, "--ignore", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["7b", "all 84.0 83.3 70.0"] and len(lines) == 6, "13 is not 3"
    # Without categories there is only the total; older reviews call the grades `score`.
    write_jsonl(path, [{"question_id": 1, "score": [8, 4]}, {"question_id": "2", "tuple": [8, 8]}])
    summarize_gpt_review.main(["-f", str(path), "-i", "5", "-v", "0314"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:-1] == ["7b", "all 75.0 80.0 60.0"]
    assert "question 5" in printed.err
    fails_with_one_line(summarize_gpt_review.main, ["-f", path, "-i", "1", "2"], capsys, "besides those ignored")


def test_reviews(tmp_path, capsys):
    """Means over reviews, ratio of the means; 3 of 4 reviews carry grades."""
    records = [
        {"category": "llava_bench_conv", "tuple": [8, 4]},
        {"category": "llava_bench_conv", "tuple": [9.5, 7]},
        {"category": "llava_bench_detail", "tuple": [7, 7.5]},
        {"category": "llava_bench_detail", "tuple": [-1, -1]},
    ]
    path = write_jsonl(tmp_path / "llava-v1.5-7b.jsonl", records)
    summarize_gpt_review.main(["--dir", str(tmp_path), "--json", str(tmp_path / "s.json")])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "llava-v1.5-7b",
        "all 75.5 81.7 61.7",
        "llava_bench_conv 62.9 87.5 55.0",
        "llava_bench_detail 107.1 70.0 75.0",
        "=================================",
    ]
    assert "1 reviews" in printed.err
    assert read_json(tmp_path / "s.json")["all"] == 75.5
    fails_with_one_line(summarize_gpt_review.main, ["-f", path, "-s", "13b"], capsys, "no review file")
    write_jsonl(path, [{"tuple": [1, "x"]}])
    fails_with_one_line(summarize_gpt_review.main, ["-f", path], capsys, "7b.jsonl:1", "two grades")
