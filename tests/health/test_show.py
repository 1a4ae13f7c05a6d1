"""Table, picture and command show the reports, and load rich and matplotlib only on use."""

import argparse
import copy
import errno
import functools
import io
import json
import os
import subprocess
import sys
import zipfile
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
    return copy.deepcopy(trained_once()[0])


def collapsed():
    return copy.deepcopy(trained_once()[1])


@functools.cache
def trained_once():
    """Return a healthy model and a collapsed quantiser."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.ModuleDict({"quantizer": quantizer()}), quantizer(lambda: torch.ones(256, 4))


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
def test_short_names_drop_the_common_prefix(names, prefix, short):
    assert short_names(names) == (prefix, dict(zip(names, short, strict=True)))


# ---- table ----


def test_table_holds_the_numbers_and_the_verdict():
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


def test_table_holds_the_advice():
    reports = examine(collapsed())
    text = shown(reports, width=200)
    for report in reports.values():
        for finding in report.findings:
            assert finding.says in text
            assert finding.advice in text
    assert text.rstrip().endswith("verdict: act")


def test_tables_hold_four_codebooks_and_names_are_not_markup():
    reports = examine(MultiScaleQuantizer([4] * 9, codebook_size=8, dim=4))
    text = shown(reports)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("perplexity") == 3
    odd = dict(zip(["a.[bold]", "b.[/]"], reports.values(), strict=False))
    assert "a.[bold]" in shown(odd)
    assert "b.[/]" in shown(odd)
    for prefix in ("[bold]", "[/]"):  # the title holds a prefix of all names
        assert prefix in shown({f"{prefix}.{name}": report for name, report in odd.items()})


# ---- picture ----


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_picture_format_follows_the_ending_and_names_are_not_formulas(tmp_path, ending):
    pytest.importorskip("matplotlib")
    odd = "a$x^^y$"
    reports = dict(zip([f"{odd}.{odd}", f"{odd}._b$x^^y$"], examine(healthy()).values(), strict=True))
    draw(reports, tmp_path / f"health.{ending}", title=odd)
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert (tmp_path / f"health.{ending}").read_bytes().startswith(begins[ending])


def test_picture_draws_the_measures(tmp_path, monkeypatch):
    """Lines of the figure hold the tensors of the reports."""
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
        lambda: examine(EMACodebook(codebook_size=8, dim=4)),
        lambda: examine(EMACodebook(codebook_size=1, dim=1)),
        lambda: examine(collapsed()),
        lambda: examine({"embed": torch.zeros(3, 2), "cluster_size": torch.zeros(3)}),
        lambda: examine({"embed": torch.full((3, 2), torch.nan), "cluster_size": torch.ones(3)}),
        lambda: examine(MultiScaleQuantizer([4] * 12, codebook_size=8, dim=4)),
    ],
    ids=["untrained", "one code", "collapsed", "nothing", "NaN", "twelve"],
)
def test_broken_reports_are_shown(tmp_path, reports):
    pytest.importorskip("matplotlib")
    found = reports()
    assert "verdict: " in shown(found)
    draw(found, tmp_path / "health.png")
    assert (tmp_path / "health.png").stat().st_size > 10_000


def test_unknown_picture_format_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"write health.png, .pdf or .svg"):
        draw(examine(EMACodebook(codebook_size=8, dim=4)), tmp_path / "health.doc")


def test_legend_names_all_codebooks(tmp_path, monkeypatch):
    """Matplotlib hides labels that begin with an underscore, as codebooks of vector-quantize-pytorch do."""
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: seen.append(self))
    draw(dict(zip(["_codebook", "b"], examine(healthy()).values(), strict=True)), tmp_path / "health.png")
    (legend,) = seen[0].subfigs[0].legends
    assert [text.get_text().partition(":")[0] for text in legend.get_texts()] == ["_codebook", "b"]


# ---- command ----


def test_command_prints_the_table(checkpoint, capsys):
    pytest.importorskip("rich")
    assert main([str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert "verdict: ok" in out
    assert err == ""


def test_json_holds_only_the_reports(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([str(checkpoint), "--json", "--since", str(checkpoint), "--decay", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    state = torch.load(checkpoint, weights_only=True)
    expected = {name: report.as_dict() for name, report in examine(state, since=state, decay=0.9).items()}
    assert found == {"level": "look", "codebooks": json.loads(json.dumps(expected))}
    assert all(report["drift"] == 0 for report in found["codebooks"].values())


def test_options_reach_examine(checkpoint, capsys):
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


def test_command_draws_the_picture(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = checkpoint.rename(checkpoint.with_name("a$x^^y$.pt"))  # not a formula, though it is in the title
    assert main([str(path), "--json", "--picture", str(tmp_path / "page.png")]) == 0
    assert (tmp_path / "page.png").exists()


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        ("rich.console", [], "the table needs rich"),
        ("matplotlib.figure", ["--json", "--picture", "x.png"], "the picture needs"),
    ],
)
def test_missing_package_is_named(checkpoint, capsys, monkeypatch, module, options, says):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([str(checkpoint), *options]) == 2
    out, err = capsys.readouterr()
    assert ("verdict" in out, '"level"' in out) == (False, "--json" in options)  # the report comes before the picture
    assert says in err
    assert f"pip install {module.partition('.')[0]}" in err


def test_report_is_printed_if_drawing_fails(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(checkpoint), "--json", "--picture", str(tmp_path / "page.doc")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["level"] == "ok"
    assert "write page.png" in err


def test_picture_on_a_full_disk_is_named_and_leaves_no_half(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "page.png").write_bytes(b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([str(checkpoint), "--picture", str(tmp_path / "page.png")]) == 2
    printed = capsys.readouterr()
    assert "codes × width" in printed.out
    assert f"No space left on device: '{tmp_path}/page.png'" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "page.png"]
    assert (tmp_path / "page.png").read_bytes() == b"before"


def test_ctrl_c_ends_with_the_status_of_shells(checkpoint, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqssl.health.__main__.examine", interrupted)
    assert main([str(checkpoint)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_error_is_one_line(tmp_path, checkpoint, capsys):
    (tmp_path / "text.pt").write_text("lr: 0.1\n")
    content = {"model": EMACodebook(codebook_size=8, dim=4).state_dict(), "config": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "config.pt")
    for name in ("text.pt", "config.pt", "nowhere.pt"):
        for arguments in ([str(tmp_path / name)], [str(checkpoint), "--since", str(tmp_path / name)]):
            assert main(arguments) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.count("\n") == 1
            assert name in err


def test_module_runs_as_a_command(checkpoint):
    pytest.importorskip("rich")
    root = Path(vqssl.__file__).parent.parent
    command = [sys.executable, "-m", "vqssl.health", str(checkpoint)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", env=None)
    assert done.returncode == 0, done.stderr
    assert "verdict: ok" in done.stdout
    assert done.stderr == ""


UNREADABLE = {
    "sparse codes": {"embed": torch.randn(8, 4).to_sparse(), "cluster_size": torch.ones(8)},
    "complex counts": {"embed": torch.randn(8, 4), "cluster_size": torch.ones(8, dtype=torch.complex64)},
    "codes of float8": {"embed": torch.randn(8, 4).to(torch.float8_e4m3fn), "cluster_size": torch.ones(8)},
    "2^40 codes in one number": {
        "embed": torch.zeros(1, 1).expand(2**40, 1),
        "cluster_size": torch.ones(1).expand(2**40),
    },
    "no codes": {"embed": torch.zeros(0, 4), "cluster_size": torch.ones(0)},
}


@pytest.mark.parametrize("state", UNREADABLE.values(), ids=list(UNREADABLE))
def test_states_that_cannot_be_measured_end_with_2_and_one_line(state, tmp_path, capsys):
    torch.save(state, tmp_path / "odd.pt")
    assert main([str(tmp_path / "odd.pt"), "--json", "--strict"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "must" in said.err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: bytes(range(256)) * 9,
        lambda content: content[:300] + bytes(300) + content[600:],
    ],
)
def test_damaged_files_end_with_2(spoil, checkpoint, tmp_path, capsys):
    path = tmp_path / "damaged.pt"
    path.write_bytes(spoil(checkpoint.read_bytes()))
    assert main([str(path), "--json", "--strict"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_compressed_file_is_refused_before_it_is_unpacked(checkpoint, tmp_path, capsys):
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    assert main([str(packed)]) == 2
    assert "without compression" in capsys.readouterr().err


def test_unforeseen_error_does_not_end_with_the_status_of_act(checkpoint, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no\x1b[31m memory")

    monkeypatch.setattr("vqssl.health.__main__.examine", broken)
    assert main([str(checkpoint), "--strict"]) == 2
    assert capsys.readouterr().err.endswith("RuntimeError: no\\x1b[31m memory\n")


def test_names_cannot_command_the_terminal(tmp_path, capsys):
    state = EMACodebook(codebook_size=8, dim=4).state_dict()
    torch.save(
        {"red\x1b[31m\x07\n": state, "b": EMACodebook(codebook_size=8, dim=4).state_dict()}, tmp_path / "names.pt"
    )
    assert main([str(tmp_path / "names.pt"), "--picture", str(tmp_path / "page.png")]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(out)
    assert r"red\x1b" in out


def test_terminal_without_unicode_gets_the_whole_report(checkpoint):
    command = [sys.executable, "-m", "vqssl.health", str(checkpoint)]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"verdict:" in done.stdout
    done.stdout.decode("ascii")


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (
            vqssl.ResidualQuantizer(codebook_size=8, dim=4, num_levels=3),
            ["level 0 of 3", "level 1 of 3", "level 2 of 3"],
        ),
        (vqssl.ProductQuantizer(codebook_size=8, dim=4, num_groups=2), ["group 0 of 2", "group 1 of 2"]),
        (vqssl.ProductQuantizer(codebook_size=8, dim=4, num_groups=2, shared=True), ["all 2 groups"]),
        (MultiScaleQuantizer([4, 4], codebook_size=8, dim=4), ["scale 0 of 2", "scale 1 of 2"]),
        (MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, shared=True), ["all 2 scales"]),
    ],
)
def test_table_names_levels_groups_and_scales(module, parts):
    for source in (module, torch.nn.ModuleDict({"deep": torch.nn.ModuleDict({"er": module})}), {"model": module}):
        reports = examine(source)
        assert [report.part for report in reports.values()] == parts
        assert all(part in shown(reports) for part in parts)
    assert "part" not in shown(examine(module.state_dict()))
    assert "part" not in shown(examine(EMACodebook(codebook_size=8, dim=4)))
