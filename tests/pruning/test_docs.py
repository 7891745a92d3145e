"""The method in the guide is a working one."""

from __future__ import annotations

import re
import runpy

from tests.conftest import ROOT
from tests.pruning.models import Batch, generate, random_llama


def test_method_of_the_guide_runs(tmp_path):
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "last_token.py"
    file.write_text(code)
    scope = runpy.run_path(str(file))
    model = random_llama()
    _, _, traces = generate(model, scope["LastToken"](target_tokens=11), Batch(model).together([0, 1]))
    for trace in traces:
        assert trace.tokens_out[0] == trace.visual_tokens and trace.tokens_out[1:] == [11] * 5
