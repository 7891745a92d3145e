"""Fixtures shared by all tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def golden():
    """``golden("pure_functions")`` -> (JSON object, arrays)."""

    def load(name: str):
        return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")

    return load


@pytest.fixture(scope="session")
def shared_benchmarks() -> Path:
    """Real benchmark files beside the checkout; tests that need them are skipped where they are absent."""
    folder = SHARED / "benchmarks"
    if not folder.is_dir():
        pytest.skip("../shared/benchmarks (real benchmark files, not part of the repository) is absent")
    return folder
