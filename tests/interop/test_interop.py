"""The package as a whole: light, named, documented."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vqssl.interop

ROOT = str(Path(vqssl.__file__).parent.parent)


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_vqssl_leaves_it_out():
    assert "vqssl.interop" not in modules_after("import vqssl").split()


def test_it_brings_in_none_of_the_libraries_it_reads():
    loaded = {name.partition(".")[0] for name in modules_after("import vqssl.interop").split()}
    assert "vqssl" in loaded
    assert not loaded & {
        "vector_quantize_pytorch",
        "encodec",
        "transformers",
        "lightly",
        "torchvision",
        "timm",
        "monai",
    }


@pytest.mark.parametrize("name", vqssl.interop.__all__)
def test_every_function_says_what_comes_raises_and_shows_it(name):
    function = getattr(vqssl.interop, name)
    doc = inspect.getdoc(function)
    assert doc
    assert "Args:" in doc
    assert "Raises:" in doc
    assert doctest.DocTestParser().get_examples(doc)
