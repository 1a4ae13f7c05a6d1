"""What people see: table, picture and command, and that they cost nothing until asked for."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqssl
from vqssl import EMACodebook, MultiScaleQuantizer
from vqssl.health import draw, examine, show
from vqssl.health.__main__ import main
from vqssl.health.sources import short_names


def quantizer(tokens=lambda: torch.randn(256, 4), scales=2, **options):
    model = MultiScaleQuantizer([4] * scales, codebook_size=16, dim=4, channels_last=True, decay=0.9, **options)
    for _ in range(40):
        model([tokens() for _ in range(scales)])
    return model


def healthy():
    return torch.nn.ModuleDict({"quantizer": quantizer()})


def collapsed():
    return quantizer(lambda: torch.ones(256, 4))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": healthy().state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture
def bad_checkpoint(tmp_path):
    path = tmp_path / "bad.pt"
    torch.save(collapsed().state_dict(), path)
    return path


def shown(reports, width=80):
    pytest.importorskip("rich")
    file = io.StringIO()
    show(reports, file=file, width=width)
    return file.getvalue()


def row(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split("  ")


# ---- names ----


@pytest.mark.parametrize(
    ("names", "prefix", "short"),
    [
        (["q.codebooks.0", "q.codebooks.1"], "q.codebooks", ["0", "1"]),
        (["a.x", "b.x"], "", ["a.x", "b.x"]),
        (["q.a", "q.a.b"], "q", ["a", "a.b"]),
        (["codebook"], "", ["codebook"]),
        (["q.codebook"], "q", ["codebook"]),
    ],
)
def test_names_lose_what_they_share(names, prefix, short):
    assert short_names(names) == (prefix, dict(zip(names, short, strict=True)))


# ---- table ----


def test_the_table_holds_the_numbers_and_the_verdict():
    model = healthy()
    reports = examine(model)
    text = shown(reports)
    assert "quantizer.codebooks" in text
    assert max(map(len, text.splitlines())) <= 80
    cells = [cell for cell in row(text, "perplexity") if cell]
    for cell, report in zip(cells, reports.values(), strict=True):
        assert cell.strip() == f"{report.perplexity:.4g} ({100 * report.perplexity / 16:.0f}%)"
    assert [cell.strip() for cell in row(text, "tokens a step") if cell] == ["256", "256"]
    assert "drift" not in text
    for report in reports.values():
        assert report.findings[0].says in text
    assert text.rstrip().endswith("verdict: ok")
    assert "drift" in shown(examine(model, since=model))


def test_the_table_says_what_to_do():
    reports = examine(collapsed())
    text = shown(reports, width=200)
    for report in reports.values():
        for finding in report.findings:
            assert finding.says in text
            assert finding.advice in text
    assert text.rstrip().endswith("verdict: act")


def test_many_codebooks_stand_below_each_other_and_names_are_no_markup():
    reports = examine(MultiScaleQuantizer([4] * 9, codebook_size=8, dim=4))
    text = shown(reports)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("perplexity") == 3
    odd = dict(zip(["a.[bold]", "b.[/]"], reports.values(), strict=False))
    assert "a.[bold]" in shown(odd)
    assert "b.[/]" in shown(odd)
    for prefix in ("[bold]", "[/]"):  # and so in front of all names, where the title has it
        assert prefix in shown({f"{prefix}.{name}": report for name, report in odd.items()})


# ---- picture ----


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_is_a_file_of_its_ending(tmp_path, ending):
    pytest.importorskip("matplotlib")
    draw(examine(healthy()), tmp_path / f"health.{ending}")
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert (tmp_path / f"health.{ending}").read_bytes().startswith(begins[ending])


def test_the_picture_draws_what_was_measured(tmp_path, monkeypatch):
    """The lines of the figure are the tensors of the reports."""
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: seen.append(self))
    reports = examine(healthy())
    draw(reports, tmp_path / "health.png")
    use, nearest, spectrum = seen[0].axes
    for number, report in enumerate(reports.values()):
        line = use.lines[number]
        assert list(line.get_ydata()) == report.shares.sort(descending=True).values.tolist()
        values, edges, _ = nearest.patches[number].get_data()
        assert sum(values) == pytest.approx(1)
        counted = ((report.nearest >= edges[3]) & (report.nearest < edges[30])).double().mean().item()
        assert sum(values[3:30]) == pytest.approx(counted, abs=0.01)
        shares = list(spectrum.lines[2 * number].get_ydata())
        assert shares == pytest.approx((report.eigenvalues / report.eigenvalues.sum()).tolist(), abs=2e-5)
        assert spectrum.lines[2 * number + 1].get_xdata()[0] == report.effective_dimension
    texts = [text.get_text() for part in seen[0].subfigs for text in part.texts]
    assert "verdict: ok" in texts


@pytest.mark.parametrize(
    "reports",
    [
        lambda: examine(EMACodebook(8, 4)),
        lambda: examine(EMACodebook(1, 1)),
        lambda: examine(collapsed()),
        lambda: examine({"embed": torch.zeros(3, 2), "cluster_size": torch.zeros(3)}),
        lambda: examine({"embed": torch.full((3, 2), torch.nan), "cluster_size": torch.ones(3)}),
        lambda: examine(MultiScaleQuantizer([4] * 12, codebook_size=8, dim=4)),
    ],
    ids=["untrained", "one code", "collapsed", "nothing", "NaN", "twelve"],
)
def test_nothing_is_too_broken_to_be_shown(tmp_path, reports):
    pytest.importorskip("matplotlib")
    found = reports()
    assert "verdict: " in shown(found)
    draw(found, tmp_path / "health.png")
    assert (tmp_path / "health.png").stat().st_size > 10_000


def test_a_picture_of_unknown_format_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"write health.png, .pdf or .svg"):
        draw(examine(EMACodebook(8, 4)), tmp_path / "health.doc")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_names_are_no_formulas(tmp_path, ending, checkpoint, capsys):
    pytest.importorskip("matplotlib")
    odd = "a$x^^y$"
    reports = dict(zip([f"{odd}.{odd}", f"{odd}._b$x^^y$"], examine(healthy()).values(), strict=True))
    draw(reports, tmp_path / f"page.{ending}", title=odd)
    path = checkpoint.rename(checkpoint.with_name(f"{odd}.pt"))
    assert main([str(path), "--json", "--picture", str(tmp_path / f"other.{ending}")]) == 0
    assert (tmp_path / f"other.{ending}").exists()


def test_the_legend_names_all_codebooks(tmp_path, monkeypatch):
    """Matplotlib hides what begins with an underscore, as codebooks of vector-quantize-pytorch do."""
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: seen.append(self))
    draw(dict(zip(["_codebook", "b"], examine(healthy()).values(), strict=True)), tmp_path / "health.png")
    (legend,) = seen[0].subfigs[0].legends
    assert [text.get_text().partition(":")[0] for text in legend.get_texts()] == ["_codebook", "b"]


# ---- command ----


def test_the_command_prints_the_table(checkpoint, capsys):
    pytest.importorskip("rich")
    assert main([str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert "verdict: ok" in out
    assert err == ""


def test_json_is_the_reports_and_nothing_else(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([str(checkpoint), "--json", "--since", str(checkpoint), "--decay", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    state = torch.load(checkpoint, weights_only=True)
    expected = {name: report.as_dict() for name, report in examine(state, since=state, decay=0.9).items()}
    assert found == {"level": "look", "codebooks": json.loads(json.dumps(expected))}
    assert all(report["drift"] == 0 for report in found["codebooks"].values())


def test_options_reach_the_examination(checkpoint, capsys):
    assert main([str(checkpoint), "--json", "--dead-below", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)["codebooks"]["quantizer.codebooks.0"]
    assert (found["dead_below"], found["decay"]) == (0.9, 0.99)
    assert found["dead"] > 0


@pytest.mark.parametrize(("strict", "good", "bad"), [([], 0, 0), (["--strict"], 0, 1)])
def test_exit_codes(checkpoint, bad_checkpoint, strict, good, bad, capsys):
    assert main([str(checkpoint), "--json", *strict]) == good
    assert main([str(bad_checkpoint), "--json", *strict]) == bad
    assert main([str(checkpoint.with_name("nowhere.pt")), "--json", *strict]) == 2
    assert "must be a file" in capsys.readouterr().err


def test_the_command_draws(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(checkpoint), "--json", "--picture", str(tmp_path / "page.png")]) == 0
    assert (tmp_path / "page.png").exists()


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        ("rich.console", [], "the table needs rich"),
        ("matplotlib.figure", ["--json", "--picture", "x.png"], "the picture needs"),
    ],
)
def test_what_is_not_installed_is_named(checkpoint, capsys, monkeypatch, module, options, says):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([str(checkpoint), *options]) == 2
    out, err = capsys.readouterr()
    assert ("verdict" in out, '"level"' in out) == (False, "--json" in options)  # the report comes before the picture
    assert says in err
    assert f"pip install {module.partition('.')[0]}" in err


def test_a_drawing_that_fails_loses_no_report(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(checkpoint), "--json", "--picture", str(tmp_path / "page.doc")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["level"] == "ok"
    assert "write page.png" in err


def test_an_error_is_one_line(tmp_path, checkpoint, capsys):
    (tmp_path / "text.pt").write_text("lr: 0.1\n")
    torch.save({"model": EMACodebook(8, 4).state_dict(), "config": argparse.Namespace(lr=0.1)}, tmp_path / "config.pt")
    for name in ("text.pt", "config.pt", "nowhere.pt"):
        for arguments in ([str(tmp_path / name)], [str(checkpoint), "--since", str(tmp_path / name)]):
            assert main(arguments) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.count("\n") == 1
            assert name in err


def test_python_m_works(checkpoint):
    pytest.importorskip("rich")
    root = Path(vqssl.__file__).parent.parent
    command = [sys.executable, "-m", "vqssl.health", str(checkpoint)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", env=None)
    assert done.returncode == 0, done.stderr
    assert "verdict: ok" in done.stdout
    assert done.stderr == ""


def test_importing_health_imports_neither_rich_nor_matplotlib_nor_lightning():
    code = "import sys, torch; before = set(sys.modules); import vqssl.health; print(*set(sys.modules) - before)"
    root = Path(vqssl.__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    new = {name.partition(".")[0] for name in printed.split()}
    assert "vqssl" in new
    assert not new & {"rich", "matplotlib", "lightning", "pytorch_lightning", "tensorboard", "safetensors"}
