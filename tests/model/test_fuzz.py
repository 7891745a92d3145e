"""Seeded mutations of every small file of a checkpoint: refused in one line, or loaded and usable."""

import warnings

import pytest

from tests.fuzzing import Figures, fuzz
from tests.model.fuzz_targets import TARGETS

MUTATIONS, SEED = 300, 0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_checkpoint_files(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures = Figures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(target, tmp_path, round(MUTATIONS * target.weight / sum(t.weight for t in TARGETS)), SEED, figures)
    assert figures.refused > 5, "mutations that nothing notices test nothing"
