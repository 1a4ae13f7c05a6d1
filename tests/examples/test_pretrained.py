"""Files of a finished run: what they hold, and what loads them in one's own code."""

import json

import pytest
import safetensors
import torch

import vqssl
from examples.pretrain.augment import to_float
from examples.pretrain.demonstration import METHOD, PURPOSE, Demonstration, command, main
from examples.pretrain.methods import METHODS
from examples.pretrain.phantoms import make_phantoms
from examples.pretrain.pretrained import KEY, load_encoder
from examples.pretrain.train import Run
from tests.examples.tiny import QUICK, pretraining


def metadata(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    done = Run(make_phantoms(32, 32, seed=0), pretraining("dissect_codes"), tmp_path_factory.mktemp("run"))
    done.train(quiet=True)
    return done


def test_files_give_the_features_and_codes_of_the_run(run):
    images = to_float(run.data.images)
    kept, target = (load_encoder(run.folder / f"{name}.safetensors") for name in ("encoder", "target_encoder"))
    quantizer = vqssl.load(run.folder / "codebooks.safetensors")
    assert not any(part.training for part in (kept, target, quantizer))
    run.method.eval()
    with torch.no_grad():
        features, maps = kept(images)
        codes = quantizer(target(images)[1]).indices
        expected, expected_maps = run.method.encoder(run.normalize(images))
    assert torch.equal(features, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected_maps, strict=True))
    for ours, theirs in zip(codes, run.codes(images).values(), strict=True):
        assert torch.equal(ours, torch.as_tensor(theirs))


def test_metadata_say_how_the_weights_came_about(run):
    (key, encoder), *rest = metadata(run.folder / "encoder.safetensors").items()
    assert (key, rest) == (KEY, [])
    notes = json.loads(metadata(run.folder / "codebooks.safetensors")["vqssl"])["notes"]
    assert notes == json.loads(encoder)["notes"]
    assert (notes["method"], notes["epoch"], notes["trained on"]) == ("dissect_codes", QUICK.epochs, run.devices)
    assert notes["settings"]["optimization"]["lr"] == QUICK.lr


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_an_encoder_that_loads(name, tmp_path):
    run = Run(make_phantoms(32, 32, seed=0), pretraining(name), tmp_path)
    run.export()
    files = {path.name for path in tmp_path.iterdir()}
    assert {"encoder.safetensors"} <= files
    assert ("target_encoder.safetensors" in files) <= ("codebooks.safetensors" in files)
    for file in files - {"codebooks.safetensors"}:
        assert load_encoder(tmp_path / file)(torch.rand(2, 1, 32, 32))[0].shape == (2, 64)
    if "codebooks.safetensors" in files:
        assert isinstance(vqssl.load(tmp_path / "codebooks.safetensors"), vqssl.MultiScaleQuantizer | vqssl.EMACodebook)


def test_codes_of_the_student_need_no_second_encoder(tmp_path):
    Run(make_phantoms(32, 32, seed=0), pretraining("dissect", quantize="student"), tmp_path).export()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codebooks.safetensors", "encoder.safetensors"]


def test_other_files_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give the encoder\.safetensors of a run"):
        load_encoder(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"must be the encoder of a run.*vqssl\.load reads codebooks"):
        load_encoder(run.folder / "codebooks.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="must be the encoder of a run"):
        load_encoder(tmp_path / "text.safetensors")
    # A state of another width under the options of this one.
    other = safetensors.torch.load_file(run.folder / "encoder.safetensors")
    other["resnet.conv1.weight"] = torch.zeros(9, 1, 3, 3)
    safetensors.torch.save_file(other, tmp_path / "wide.safetensors", metadata(run.folder / "encoder.safetensors"))
    with pytest.raises(ValueError, match="must be the encoder of a run"):
        load_encoder(tmp_path / "wide.safetensors")


def test_demonstration_is_made_once_says_what_it_is_and_fits_together(tmp_path, capsys):
    config = Demonstration(out=tmp_path, phantoms=100, epochs=1)
    encoder_file, codebooks_file = main(config)
    first = encoder_file.read_bytes(), codebooks_file.read_bytes()
    assert main(config) == (encoder_file, codebooks_file)  # finished: nothing is trained again
    assert (encoder_file.read_bytes(), codebooks_file.read_bytes()) == first
    assert sum(map(len, first)) < 2e6

    notes = json.loads(metadata(codebooks_file)["vqssl"])["notes"]
    assert notes == json.loads(metadata(encoder_file)[KEY])["notes"]
    assert notes["purpose"] == PURPOSE
    assert notes["command"] == command(config) == "python -m examples.pretrain.demonstration --phantoms 100 --epochs 1"
    assert (notes["method"], notes["epoch"]) == (METHOD, 1)
    assert notes["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(notes)

    quantizer = vqssl.load(codebooks_file)
    _, maps = load_encoder(encoder_file)(torch.rand(2, 1, 32, 32))
    assert [tuple(each.shape) for each in quantizer(maps).indices] == [(2, 8, 8), (2, 4, 4), (2, 2, 2)]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "words"), [({"epochs": 0}, "--epochs"), ({"seed": -1}, "--seed"), ({"phantoms": 0}, "--phantoms")]
)
def test_demonstration_refuses_options_out_of_range(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        main(Demonstration(out=tmp_path / "new", **change))
    assert not (tmp_path / "new").exists()
