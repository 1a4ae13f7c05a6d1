"""Encoders from a file: the network of the file, or one line that says what the file should be."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from monai.networks.nets.resnet import resnet18

from examples.pretrain.__main__ import main
from examples.pretrain.encoder import EncoderOptions
from examples.pretrain.untrained import encoder_of_file, random_encoder
from tests.laws import assert_same_bits

OPTIONS = EncoderOptions()


@pytest.fixture(scope="module")
def network():
    """A ResNet-18 as torchvision has it: its names, three colours and 1000 classes, with random weights."""
    torch.manual_seed(0)
    return resnet18(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, num_classes=1000
    ).eval()


def features(network, images):
    """Return the pooled features of the network, without its last layer."""
    cut = torch.nn.Sequential(*list(network.children())[:-1])
    return cut(images).flatten(1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_encoder_is_the_network_of_the_file(network, suffix, tmp_path):
    path = tmp_path / f"resnet18{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(network.state_dict(), path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder_of_file(path, 3, OPTIONS).eval()(images)[0], features(network, images))
        grey = images[:, :1]
        found = encoder_of_file(path, 1, OPTIONS).eval()(grey)[0]
        torch.testing.assert_close(found, features(network, grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_names_of_a_sequential_and_missing_counters_are_accepted(network, tmp_path):
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    cut = torch.nn.Sequential(*list(network.children())[:-1]).state_dict()
    torch.save(cut, tmp_path / "cut.pth")
    found = [encoder_of_file(tmp_path / name, 3, OPTIONS).state_dict() for name in ("old.pth", "cut.pth")]
    for state in found:
        assert_same_bits(
            {name: value for name, value in state.items() if "num_batches" not in name},
            {
                f"resnet.{name}": value
                for name, value in network.state_dict().items()
                if "num_batches" not in name and not name.startswith("fc")
            },
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "conv1.weight": torch.zeros(32, 3, 7, 7)}, r"conv1\.weight must be .* got \(32, 3, 7"),
        (lambda state: {k: v for k, v in state.items() if "layer4" not in k}, "entries are missing, such as layer4"),
        (lambda state: {**state, "layer3.7.conv1.weight": torch.zeros(1)}, "another network, such as layer3"),
        (lambda state: {"encoder.weight": torch.zeros(1)}, "names"),
        (lambda state: [1, 2], "state dict"),
    ],
    ids=["width", "missing", "deeper", "names", "list"],
)
def test_other_files_are_refused(network, change, message, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(change(network.state_dict()), path)
    with pytest.raises(ValueError, match=rf"other\.pth: --weights must be .*{message}"):
        encoder_of_file(path, 3, OPTIONS)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(ValueError, match="cannot be read"):
            encoder_of_file(tmp_path / name, 3, OPTIONS)
    with pytest.raises(FileNotFoundError, match="no file at"):
        encoder_of_file(tmp_path / "nothing.pth", 3, OPTIONS)


def test_encoder_of_another_shape_is_refused_before_anything_is_written(tmp_path):
    arguments = ["small", "--weights", str(tmp_path / "x.pth"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"error: --weights needs .*--encoder\.width 64.*got width 12 and stem"):
        main(arguments)
    assert not (tmp_path / "out").exists()


def test_random_encoder_repeats_with_its_seed():
    options = replace(OPTIONS, width=8)
    states = [random_encoder(1, options, seed).state_dict() for seed in (0, 0, 1)]
    assert_same_bits(*states[:2])
    assert not torch.equal(states[0]["resnet.conv1.weight"], states[2]["resnet.conv1.weight"])
