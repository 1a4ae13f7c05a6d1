"""Docstrings of the package."""

import doctest
import inspect

import pytest

import vqssl.interop


@pytest.mark.parametrize("name", vqssl.interop.__all__)
def test_docstring_has_arguments_errors_and_example(name):
    function = getattr(vqssl.interop, name)
    doc = inspect.getdoc(function)
    assert doc
    assert "Args:" in doc
    assert "Raises:" in doc
    assert doctest.DocTestParser().get_examples(doc)
