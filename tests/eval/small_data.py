"""A data folder with all benchmarks in upstream's layout and formats: a few questions each, made by hand."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from tests.eval.helpers import write_json, write_jsonl

COLORS = ("red", "green", "blue", "yellow")
INSTRUCTION = "\nAnswer the question using a single word or phrase."


def picture(path: Path, index: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30 + 10 * index, 40), COLORS[index % 4]).save(path)
    return path.name


def picture_text(index: int) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (30 + 10 * index, 40), COLORS[index % 4]).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def ten(word: str, other: str = "no"):
    """Ten human answers, seven of which agree."""
    return [{"answer": word if i < 7 else other, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


def write_all(folder: Path) -> Path:
    for write in (vqav2, gqa, vizwiz, sqa, textvqa, pope, mme, mmvet, seed, llavabench, senna, planning, drivelm):
        write(folder)
    mmbench(folder / "mmbench" / "mmbench_dev_20230712.tsv", ("Which color is it?", "Which shape is it?"))
    mmbench(folder / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv", ("这是什么颜色？", "这是什么形状？"))
    return folder


def vqav2(folder):
    place = folder / "vqav2"
    questions = [
        {"question_id": 1000 + i, "image": picture(place / "test2015" / f"{i}.jpg", i), "text": "Color?" + INSTRUCTION}
        for i in range(4)
    ]
    write_jsonl(place / "llava_vqav2_mscoco_test-dev2015.jsonl", questions[:3])
    write_jsonl(place / "llava_vqav2_mscoco_test2015.jsonl", questions)
    annotations = [
        {"question_id": q["question_id"], "image_id": i, "question_type": "what color", "answer_type": "other",
         "multiple_choice_answer": COLORS[i], "answers": ten(COLORS[i])}
        for i, q in enumerate(questions[:3])
    ]  # fmt: skip
    write_json(place / "v2_mscoco_test-dev2015_annotations.json", {"annotations": annotations})


def gqa(folder):
    place = folder / "gqa"
    questions, truth = [], {}
    for i in range(3):
        image = picture(place / "data" / "images" / f"n{i}.jpg", i)
        questions.append(
            {"question_id": f"20{i}", "image": image, "text": "What color?" + INSTRUCTION, "category": "default"}
        )
        types = {"structural": "query" if i else "verify", "semantic": "attr", "detailed": "color"}
        truth[f"20{i}"] = {"question": "What color?", "answer": COLORS[i], "imageId": f"n{i}", "isBalanced": True,
                           "types": types, "semantic": [], "groups": {}, "entailed": [], "equivalent": []}  # fmt: skip
    write_jsonl(place / "llava_gqa_testdev_balanced.jsonl", questions)
    write_json(place / "data" / "testdev_balanced_questions.json", truth)


def vizwiz(folder):
    place = folder / "vizwiz"
    images = [picture(place / "test" / f"VizWiz_test_{i}.jpg", i) for i in range(3)]
    write_jsonl(
        place / "llava_test.jsonl",
        [{"question_id": Path(name).stem, "image": name, "text": "What is it?" + INSTRUCTION} for name in images],
    )
    entries = [{"image": name, "question": "What is it?", "answers": ten("wall"), "answer_type": "other",
                "answerable": 1} for name in images]  # fmt: skip
    write_json(place / "test.json", entries)


def sqa(folder):
    place = folder / "scienceqa"
    problems, conversations = {}, []
    for i in range(3):
        entry = {"id": str(i), "conversations": [{"from": "human", "value": "Context: N/A\nWhich?\nA. red\nB. blue"}]}
        problems[str(i)] = {"question": "Which?", "choices": ["red", "blue"], "answer": i % 2, "hint": "",
                            "image": None, "split": "test", "subject": "natural science"}  # fmt: skip
        if i:
            picture(place / "images" / "test" / str(i) / "image.png", i)
            entry["image"], problems[str(i)]["image"] = f"{i}/image.png", "image.png"
            entry["conversations"][0]["value"] += "\n<image>"
        conversations.append(entry)
    write_json(place / "llava_test_CQM-A.json", conversations)
    write_json(place / "problems.json", problems)
    write_json(place / "pid_splits.json", {"test": list(problems)})


def textvqa(folder):
    place = folder / "textvqa"
    questions, annotations = [], []
    for i in range(3):
        name = picture(place / "train_images" / f"{i:04x}.jpg", i)
        text = "What does it say?\nReference OCR token: STOP, 5" + INSTRUCTION
        questions.append({"question_id": f"{i:04x}", "image": name, "text": text, "category": "default"})
        annotations.append(
            {"image_id": f"{i:04x}", "question_id": i, "question": "what does it say?", "answers": ["stop"] * 10}
        )
    write_jsonl(place / "llava_textvqa_val_v051_ocr.jsonl", questions)
    write_json(place / "TextVQA_0.5.1_val.json", {"data": annotations})


def pope(folder):
    place = folder / "pope"
    number = 0
    questions = []
    for category in ("adversarial", "popular", "random"):
        labels = []
        for i in range(2):
            number += 1
            name = picture(place / "val2014" / f"COCO_{i}.jpg", i)
            text = "Is there a dog in the image?"
            questions.append({"question_id": number, "image": name, "text": text + INSTRUCTION, "category": category})
            labels.append({"question_id": i + 1, "image": name, "text": text, "label": ("yes", "no")[i]})
        write_jsonl(place / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(place / "llava_pope_test.jsonl", questions)


def mme(folder):
    place = folder / "MME"
    questions = []
    for i, category in enumerate(("existence", "color", "code_reasoning")):
        release = place / "MME_Benchmark_release_version" / category
        name = f"{category}/{picture(release / '1.png', i)}"
        lines = ""
        for text, answer in ((f"Is it {COLORS[i]}?", "Yes"), ("Is it black?", "No")):
            lines += f"{text} Please answer yes or no.\t{answer}\n"
            questions.append({"question_id": name, "image": name, "text": text + INSTRUCTION, "category": category})
        (release / "1.txt").write_text(lines)
    write_jsonl(place / "llava_mme.jsonl", questions)


def mmbench(path, texts):
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
    columns += ["l2-category", "comment", "split"]
    rows = []
    for i, text in enumerate(texts):
        rows.append([i, text, "", "red", "blue", "", "", "A", "color", picture_text(i), "web", "attr", "", "dev"])
        rows.append([1_000_000 + i, text, "", "blue", "red", "", "", "B", "color", str(i), "web", "attr", "", "dev"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])


def mmvet(folder):
    place = folder / "mm-vet"
    names = [picture(place / "images" / f"v1_{i}.png", i) for i in range(2)]
    write_jsonl(
        place / "llava-mm-vet.jsonl",
        [{"question_id": i, "image": name, "text": "What is it?"} for i, name in enumerate(names)],
    )
    truth = {
        f"v1_{i}": {"imagename": name, "question": "What is it?", "answer": COLORS[i], "capability": kinds}
        for i, (name, kinds) in enumerate(zip(names, (["rec"], ["rec", "ocr"]), strict=True))
    }
    write_json(place / "mm-vet.json", truth)


def seed(folder):
    place = folder / "seed_bench"
    questions, entries = [], []
    for i in range(3):
        kind = "video" if i == 2 else "image"
        name = picture(place / f"SEED-Bench-{kind}" / f"{i}.png", i)
        questions.append({"question_id": str(i), "image": f"SEED-Bench-{kind}/{name}", "text": "Which?\nA. a\nB. b"})
        entries.append(
            {"question_id": str(i), "question_type_id": 1 + (i == 2), "answer": "AB"[i % 2], "data_type": kind}
        )
    write_jsonl(place / "llava-seed-bench.jsonl", questions)
    content = {"questions": entries, "question_type": {"Scene Understanding": 1, "Action Recognition": 2}}
    write_json(place / "SEED-Bench.json", content)


def llavabench(folder):
    place = folder / "llava-bench-in-the-wild"
    names = [picture(place / "images" / f"00{i}.jpg", i) for i in range(2)]
    write_jsonl(
        place / "questions.jsonl",
        [{"question_id": i, "image": n, "text": "Describe it.", "category": "detail"} for i, n in enumerate(names)],
    )


CAMERAS = ("FRONT", "FRONT_LEFT", "FRONT_RIGHT", "BACK", "BACK_LEFT", "BACK_RIGHT")


def views(place, index):
    """Six pictures of a moment, by camera."""
    for number, camera in enumerate(CAMERAS):
        picture(place.parent / "nuscenes" / "samples" / f"CAM_{camera}" / f"{index}.png", index + number)
    return [f"samples/CAM_{camera}/{index}.png" for camera in CAMERAS]


def senna(folder):
    place = folder / "senna"
    text = "".join(f"<{camera.replace('_', ' ')} VIEW>:\n<image>\n" for camera in CAMERAS) + "SPEED plan, PATH plan?"
    questions = [{"question_id": f"t{i}", "images": views(place, i), "text": text} for i in range(2)]
    write_jsonl(place / "llava_senna.jsonl", questions)
    labels = [("KEEP", "STRAIGHT"), ("STOP", "LEFT_TURN")]
    truth = [{"question_id": f"t{i}", "speed": speed, "path": path} for i, (speed, path) in enumerate(labels)]
    write_json(place / "senna_truth.json", truth)


def planning(folder):
    place = folder / "nuscenes_planning"
    questions = [{"question_id": f"t{i}", "images": views(place, i), "text": "Where to?"} for i in range(2)]
    write_jsonl(place / "llava_nuscenes_planning.jsonl", questions)
    write_jsonl(
        place / "planning_truth.jsonl",
        [{"token": f"t{i}", "ego": [[0.0, 2.0 * k] for k in range(1, 7)], "agents": []} for i in range(2)],
    )


def drivelm(folder):
    place = folder / "drivelm"
    entries = [{"Q": "What are the important objects?", "A": "A car <c1,CAM_FRONT,412.5,480.0>.", "tag": [2]}]
    frame = {"QA": {"perception": entries, "prediction": [], "planning": [], "behavior": []}}
    write_json(place / "drivelm_truth.json", {"s1": {"key_frames": {"k1": frame}}})
    write_jsonl(
        place / "llava_drivelm.jsonl",
        [{"question_id": "s1_k1_0", "images": views(place, 0), "text": entries[0]["Q"]}],
    )
