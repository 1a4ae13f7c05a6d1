"""The code in the README runs as it is, and trains every part."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_readme_code_trains_every_part():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names = {}
    for code in blocks:
        exec(compile(code, str(README), "exec"), names)
    assert names["loss"].total.isfinite()
    for part in ("student", "predictor", "prediction"):
        gradients = [parameter.grad for parameter in names[part].parameters()]
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert names["teacher"].step == 1
    assert all(codebook.initialized for codebook in [names["codebook"], *names["quantizer"].codebooks])
