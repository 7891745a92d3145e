"""The random LLaVA checkpoint of the evaluation tests."""

from tests.eval.conftest import checkpoint as checkpoint
