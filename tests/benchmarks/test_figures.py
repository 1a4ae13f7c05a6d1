"""Text in every picture of records can be read, and none is cropped."""

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.text import Text

from benchmarks import records, report
from examples.pretrain.data import ImageSet
from examples.pretrain.reports import differences, evaluation, pictures, sweep
from tests.reliability import report as reliability

SMALLEST = 9
"""Points. Pages show no picture below 72 pixels an inch, where this is 9 pixels."""
WIDEST = 8.6
"""Inches: on a desktop, a wider picture scrolls."""


def draw_sweep(path):
    differences.draw(sweep.by_variant(records.load("sweep-kermany-32")), path, choosing=sweep.FIRST)


def draw_shares(path):
    evaluation.draw_shares(records.load("evaluation-phantoms"), path)


def draw_search(path):
    report.draw_search(records.load("search")[0], path)


def draw_usage(path):
    report.draw_codebook_usage(records.load("codebook_usage")[0], path)


def draw_long_run(path):
    reliability.draw(reliability.load("long_run"), path)


def draw_curves(path):
    rows = [{"epoch": epoch, "loss": 1 / epoch, "knn_auc": 0.5, "perplexity_layer2": 3.0} for epoch in (1, 2, 3)]
    pictures.curves({"byol": rows, "dissect_codes": rows}, path)


def draw_code_maps(path):
    images = np.zeros((6, 16, 16), np.uint8)
    data = ImageSet(images, np.arange(6) % 2, None, np.eye(16, dtype=np.uint8)[None].repeat(6, 0), None, ["a", "b"])
    indices = {"layer2": np.arange(6 * 16).reshape(6, 4, 4) % 5}
    pictures.code_maps(data, indices, path, codes={"layer2": np.random.default_rng(0).standard_normal((5, 8))})


@pytest.mark.parametrize(
    "draw", [draw_sweep, draw_shares, draw_search, draw_usage, draw_long_run, draw_curves, draw_code_maps]
)
def test_text_is_large_enough_and_not_cropped(draw, tmp_path, monkeypatch):
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    draw(tmp_path / "figure.png")
    (figure,) = saved
    assert figure.get_figwidth() <= WIDEST
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert texts
    assert [text.get_text() for text in texts if text.get_fontsize() < SMALLEST] == []
    assert [text.get_text() for text in texts if "$" in text.get_text()] == []
    figure.draw_without_rendering()
    sheet = figure.bbox
    shown = [text for text in texts if not text.get_clip_on()]
    cropped = [text.get_text() for text in shown if _sticks_out(text.get_window_extent(), sheet)]
    assert cropped == []


def _sticks_out(box, sheet):
    return box.x0 < sheet.x0 - 1 or box.y0 < sheet.y0 - 1 or box.x1 > sheet.x1 + 1 or box.y1 > sheet.y1 + 1
