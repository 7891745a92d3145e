"""Paths and small builders for the evaluation tests."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "benchmarks" / "playground" / "data" / "eval"
TINY_DATA = ROOT / "playground" / "tiny" / "data" / "eval"
TINY_MODEL = ROOT / "playground" / "tiny" / "models" / "tiny-llava-v1.5"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published answer files (../shared) are not here")


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def read_jsonl(path: Path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def answer(question_id, text, prompt=""):
    return {"question_id": question_id, "prompt": prompt, "text": text}


def fails_with_one_line(main, argv, capsys, *parts):
    """Runs a `main` in this process; it must exit with 2 and print one `error:` line that holds `parts`."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in argv])
    assert exit_info.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for part in parts:
        assert str(part) in lines[0], (part, lines[0])
    return lines[0]
