"""Scalars, writers and the Lightning callback, with stand-ins for writers and Lightning."""

import pickle
import posixpath
import re
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from vqssl import EMACodebook, MultiScaleQuantizer
from vqssl.health import draw, examine, lightning_callback, log_health, scalars, show


class Writer:
    def __init__(self):
        self.rows = {}

    def add_scalar(self, tag, scalar_value, global_step):
        assert type(scalar_value) is float
        self.rows.setdefault(tag, []).append((global_step, scalar_value))


def model():
    return nn.ModuleDict({"q": MultiScaleQuantizer([4, 4], codebook_size=8, dim=4, channels_last=True)})


def step(module):
    module["q"]([torch.randn(32, 4), torch.randn(32, 4)])


def test_log_health_writes_the_numbers_of_the_report():
    module, writer = model(), Writer()
    step(module)
    reports = log_health(writer, module, 5)
    assert list(reports) == list(examine(module))
    for name, report in reports.items():
        for measure in (
            "perplexity",
            "usage",
            "dead",
            "dying",
            "effective_dimension",
            "nearest_median",
            "tokens_per_step",
        ):
            assert writer.rows[f"codebook/{name}/{measure}"] == [(5, getattr(report, measure))]
        assert writer.rows[f"codebook/{name}/level"] == [(5, ["ok", "look", "act"].index(report.level))]
    assert not any(tag.endswith("drift") for tag in writer.rows)


def test_drift_is_measured_since_the_given_report():
    module, writer = model(), Writer()
    step(module)
    before = log_health(writer, module, 1)
    step(module)
    expected = examine(module, since=before)
    log_health(writer, module, 2, since=before, tag="vq")
    for name, report in expected.items():
        assert report.drift > 0
        assert writer.rows[f"vq/{name}/drift"] == [(2, report.drift)]


def test_measures_that_are_none_are_left_out():
    writer = Writer()
    log_health(writer, EMACodebook(codebook_size=1, dim=4), 0)
    assert "codebook/codebook/perplexity" in writer.rows
    assert "codebook/codebook/nearest_median" not in writer.rows


def test_scalars_are_floats_under_the_tag():
    module = model()
    step(module)
    found = scalars(examine(module), tag="vq")
    assert all(type(value) is float for value in found.values())
    assert {name.rpartition("/")[0] for name in found} == {"vq/q.codebooks.0", "vq/q.codebooks.1"}


def test_names_of_scalars_are_accepted_by_mlflow():
    """MLflow takes letters, digits and ``_-. /`` in a name, which must also be a normal path of at most 250 letters."""
    names = list(scalars(examine(model())))
    # docs/health.md says how to log a name that MLflow refuses.
    names += [re.sub(r"\W", "_", name) for name in scalars(examine(nn.ModuleDict({"a#$": model()})))]
    for name in names:
        assert re.fullmatch(r"[/\w.\- ]*", name)
        assert posixpath.normpath(name) == name
        assert len(name) <= 250


def test_writer_without_add_scalar_is_refused():
    with pytest.raises(TypeError, match=r"writer must have add_scalar.*SummaryWriter"):
        log_health(print, EMACodebook(codebook_size=8, dim=4), 0)
    with pytest.raises(ValueError, match="must hold a codebook"):
        log_health(Writer(), nn.Linear(2, 2), 0)


# ---- Lightning ----


PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def stand_in(name):
    """Return a package with a Callback that has hooks, as Lightning's has."""

    class Callback:
        def on_train_epoch_end(self, trainer, pl_module):
            raise AssertionError("HealthCallback must override this hook")

        def on_train_start(self, trainer, pl_module):
            pass

    package = types.ModuleType(name)
    package.Callback = Callback
    return package


@pytest.fixture
def packages(monkeypatch):
    """Hide Lightning, except for the stand-ins that a test imports with `packages(name, ...)`."""
    for name in ("lightning", *PACKAGES):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(*names):
        found = []
        for name in names:
            parent = name.partition(".")[0]
            if parent != name:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            monkeypatch.setitem(sys.modules, name, stand_in(name))
            found.append(sys.modules[name])
        return found

    return imported


class Logger:
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Trainer:
    """A trainer that runs epochs and calls the hooks as Lightning's does."""

    def __init__(self, callback, rank=0):
        self.callback, self.loggers = callback, [Logger(), Logger()]
        self.is_global_zero = rank == 0
        self.current_epoch = self.global_step = 0

    def fit(self, module, epochs):
        self.callback.on_fit_start(self, module)
        self.callback.on_train_start(self, module)
        for self.current_epoch in range(epochs):
            for _ in range(3):
                step(module)
                self.global_step += 1
            self.callback.on_train_epoch_end(self, module)


@pytest.mark.parametrize(
    "names", [PACKAGES[:1], PACKAGES[1:], PACKAGES], ids=["lightning", "pytorch_lightning", "both"]
)
def test_callback_subclasses_every_imported_package(packages, names):
    found = packages(*names)
    callback = lightning_callback(every_n_epochs=2)
    for package in found:
        assert isinstance(callback, package.Callback)
    trainer, module = Trainer(callback), model()
    trainer.fit(module, epochs=4)
    for logger in trainer.loggers:
        assert [at for at, _ in logger.rows] == [3, 9]  # steps after epochs 0 and 2
        (_, first), (_, last) = logger.rows
        assert "codebook/q.codebooks.1/perplexity" in first
        assert "codebook/q.codebooks.1/drift" not in first
        assert last["codebook/q.codebooks.1/drift"] > 0
    assert list(callback.reports) == ["q.codebooks.0", "q.codebooks.1"]
    assert callback.reports["q.codebooks.0"].updates == 9
    # Another fit is another model, so it is not compared.
    other = Trainer(callback)
    other.fit(model(), epochs=1)
    assert "codebook/q.codebooks.1/drift" not in other.loggers[0].rows[0][1]


def test_only_rank_0_logs(packages):
    packages(PACKAGES[0])
    trainer = Trainer(lightning_callback(), rank=1)
    trainer.fit(model(), epochs=2)
    assert [logger.rows for logger in trainer.loggers] == [[], []]


def test_model_without_codebooks_is_refused_before_training(packages):
    packages(PACKAGES[0])
    with pytest.raises(ValueError, match="must hold a codebook"):
        lightning_callback().on_fit_start(None, nn.Linear(2, 2))


def test_callback_survives_pickle(packages):
    packages(PACKAGES[1])
    callback = pickle.loads(pickle.dumps(lightning_callback(3, tag="vq")))
    assert (callback.every_n_epochs, callback.tag) == (3, "vq")
    assert isinstance(callback, sys.modules[PACKAGES[1]].Callback)


def test_missing_lightning_raises_and_names_log_health(packages, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install lightning, or call log_health\(writer, module, step\)"):
        lightning_callback()


def test_installed_package_is_imported(packages, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pytorch_lightning" or None)
    package = stand_in("pytorch_lightning")
    monkeypatch.setattr("importlib.import_module", lambda name: {"pytorch_lightning": package}[name])
    assert isinstance(lightning_callback(), package.Callback)


@pytest.mark.parametrize(("error", "value"), [(ValueError, 0), (TypeError, 1.5), (TypeError, True)])
def test_every_n_epochs_must_be_a_positive_int(error, value):
    with pytest.raises(error, match="every_n_epochs must be"):
        lightning_callback(value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (EMACodebook(codebook_size=8, dim=4), r"got EMACodebook: write examine\(it\) in its place"),
        (EMACodebook(codebook_size=8, dim=4).state_dict(), r"got OrderedDict: write examine\(it\) in its place"),
        (
            examine(EMACodebook(codebook_size=8, dim=4))["codebook"],
            r'got CodebookHealth: write \{"codebook": report\} for a single report',
        ),
        ([1.0], r"got list: write examine\(module\)"),
    ],
)
@pytest.mark.parametrize("use", [scalars, show, partial(draw, path="health.png")])
def test_what_is_no_report_is_refused(use, wrong, words):
    with pytest.raises(TypeError, match="reports must be the result of vqssl.health.examine, " + words):
        use(wrong)
