"""What check_data finds: complete data, missing, misplaced and broken files, truth that does not fit."""

import shutil

import pytest

from llava.eval import check_data
from llava.eval.tasks import data_check as data_check_task
from llava.eval.tasks.registry import TASKS, get_task
from llava.utils import UserError
from tests.eval.helpers import SHARED, TINY_DATA, needs_shared, read_json, read_jsonl, write_json, write_jsonl
from tests.eval.small_data import write_all


@pytest.fixture
def data(tmp_path):
    return write_all(tmp_path / "data of mine")


def problems(name, data, **flags):
    return data_check_task.check_benchmark(get_task(name), data, **flags).problems


@pytest.mark.parametrize("entry", TASKS, ids=lambda entry: entry.name)
def test_complete_data_and_every_single_file_missing(entry, data, tmp_path):
    report = data_check_task.check_benchmark(entry, data)
    assert (report.problems, report.warnings) == ([], []) and len(report.found) >= 1
    folder = data / entry.folder
    for name in filter(None, {entry.question_file, *entry.truth, entry.image_folder}):
        (folder / name).rename(tmp_path / "away")
        (problem, *_) = problems(entry.name, data)
        assert str(folder / name) in problem and "is missing; " in problem
        (tmp_path / "away").rename(folder / name)
    shutil.rmtree(folder)
    (problem,) = problems(entry.name, data)
    assert problem.startswith(f"{folder} is missing; ") and entry.source in problem


def test_misplaced_files_are_found(data):
    (data / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv").rename(data / "mmbench" / "mmbench_dev_cn_20231003.tsv")
    (problem,) = problems("mmbench_cn", data)
    assert f"it is at {data / 'mmbench' / 'mmbench_dev_cn_20231003.tsv'}: move it" in problem
    (data / "textvqa" / "more").mkdir()
    (data / "textvqa" / "train_images").rename(data / "textvqa" / "more" / "train_images")
    (problem,) = problems("textvqa", data)
    assert f"it is at {data / 'textvqa' / 'more' / 'train_images'}: move it" in problem
    # A folder of the same name in another benchmark is not the missing one.
    shutil.rmtree(data / "mm-vet" / "images")
    (problem,) = problems("mmvet", data)
    assert "move it" not in problem


def test_images_sampled_or_all(data, monkeypatch):
    (data / "vqav2" / "test2015" / "1.jpg").unlink()
    report = data_check_task.check_benchmark(get_task("vqav2"), data)
    assert report.problems == [] and "1 of 3 images are missing: 1.jpg" in report.warnings[0]
    monkeypatch.setattr("llava.eval.tasks.data_check.SAMPLED_IMAGES", 1)
    assert data_check_task.check_benchmark(get_task("vqav2"), data).warnings == []
    assert "1 of 3" in data_check_task.check_benchmark(get_task("vqav2"), data, all_images=True).warnings[0]
    for path in (data / "vqav2" / "test2015").iterdir():
        path.unlink()
    (problem,) = problems("vqav2", data)
    assert "1 of 1 images looked for are missing: 0.jpg" in problem


def test_truth_of_another_release_is_refused(data):
    labels = read_jsonl(data / "pope" / "coco" / "coco_pope_random.json")
    write_jsonl(data / "pope" / "coco" / "coco_pope_random.json", [*labels, labels[0]])
    assert "has 3 labels but the question file has 2" in problems("pope", data)[0]
    truth = read_json(data / "gqa" / "data" / "testdev_balanced_questions.json")
    del truth["201"]
    write_json(data / "gqa" / "data" / "testdev_balanced_questions.json", truth)
    assert "does not cover 1 of 3 questions: 201" in problems("gqa", data)[0]
    write_json(data / "scienceqa" / "pid_splits.json", {"test": ["0"]})
    assert "does not cover 2 of 3 questions: 1, 2" in problems("sqa", data)[0]
    (data / "MME" / "MME_Benchmark_release_version" / "color" / "1.txt").write_text("Is it odd?\tYes\n")
    assert "does not cover 2 of 6 questions" in problems("mme", data)[0]
    write_jsonl(data / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 1000, "text": "?"}])
    assert "does not cover 2 of 3 questions" in problems("vqav2", data)[0]


def test_broken_files_are_named_with_the_line(data):
    path = data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(path.read_text()[:-9])
    assert f"{path}:3: malformed JSON" in problems("textvqa", data)[0]
    path = data / "mmbench" / "mmbench_dev_20230712.tsv"
    path.write_text("index\tquestion\n1\tWhich?\n")
    assert str(path) in problems("mmbench", data)[0] and "'A'" in problems("mmbench", data)[0]
    (data / "seed_bench" / "SEED-Bench.json").write_text("[]")
    assert "not SEED-Bench.json" in problems("seed", data)[0]


def test_command_line(data, capsys):
    assert check_data.main(["all", "--data-dir", str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count(": complete") == len(TASKS) and printed.err == ""
    (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    with pytest.raises(SystemExit) as exit_info:
        check_data.main(["GQA", "POPE", "--quiet", "--data-dir", str(data)])
    printed = capsys.readouterr()
    assert exit_info.value.code == 2 and printed.out == ""
    assert len(printed.err.splitlines()) == 1 and printed.err.startswith("error: gqa: ")


def test_names_of_benchmarks():
    assert get_task("MM-Vet") is get_task("mmvet") is get_task("mmvet.sh")
    assert get_task("scienceqa") is get_task("sqa") and get_task("MME").folder == "MME"
    with pytest.raises(UserError, match="known: vqav2, gqa"):
        get_task("nosuch")


def test_miniature_data_are_complete():
    for entry in TASKS:
        if (TINY_DATA / entry.folder).is_dir():
            assert data_check_task.check_benchmark(entry, TINY_DATA).problems == [], entry.name


@needs_shared
def test_published_files_fit_together():
    """The real question files and their truth join; only the images are not there."""
    for name, folder in (("textvqa", "train_images"), ("pope", "val2014"), ("mme", "MME_Benchmark_release_version")):
        report = data_check_task.check_benchmark(get_task(name), SHARED)
        assert len(report.problems) == 1 and folder in report.problems[0], report.problems
        assert len(report.found) == 2
