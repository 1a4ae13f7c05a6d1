"""The package as a whole: what it imports, and its docstrings."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vqssl.interop

ROOT = str(Path(vqssl.__file__).parent.parent)


LIBRARIES = {"vector_quantize_pytorch", "encodec", "transformers", "lightly", "torchvision", "timm", "monai"}


def test_vqssl_does_not_import_interop_and_interop_imports_no_other_library():
    code = "import sys, vqssl; print(*sys.modules); import vqssl.interop; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    without, with_interop = (set(line.split()) for line in printed.splitlines())
    assert "vqssl" in without
    assert "vqssl.interop" not in without
    assert "vqssl.interop" in with_interop
    assert not {name.partition(".")[0] for name in with_interop} & LIBRARIES


@pytest.mark.parametrize("name", vqssl.interop.__all__)
def test_docstring_has_arguments_errors_and_example(name):
    function = getattr(vqssl.interop, name)
    doc = inspect.getdoc(function)
    assert doc
    assert "Args:" in doc
    assert "Raises:" in doc
    assert doctest.DocTestParser().get_examples(doc)
