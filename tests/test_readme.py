"""The README's screen of code runs as it stands there, and trains what it says."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_drop_in_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["loss"].total.isfinite()
    for part in ("student", "predictor", "fusion"):
        gradients = [parameter.grad for parameter in names[part].parameters()]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert names["teacher"].step == 1
    assert all(codebook.initialized for codebook in [names["codebook"], *names["quantizer"].codebooks])
