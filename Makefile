# Shortcuts; every line is the command itself.
.PHONY: demo test lint build docs bench

demo:
	python3 examples

test:
	python3 tests

lint:
	.ci/run lint

build:
	.ci/run package

docs:
	python3 .ci/environment.py docs -m sphinx -W --keep-going -b html docs docs/_build/html

bench:
	python3 .ci/environment.py bench -m benchmarks
