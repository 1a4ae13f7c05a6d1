"""`backbone_state_dict()` into ResNets: MONAI's here, torchvision's and timm's in foreign.py."""

import pytest
import torch
from monai.networks.nets.resnet import resnet18
from torch import nn

from tests.interop.foreign import trained_teacher
from tests.laws import assert_same_bits
from vqssl.interop import resnet_state_dict


def resnet(**options):
    return resnet18(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, bias_downsample=False, **options)


class Student(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(512, 8)

    def forward(self, x):
        return self.head(self.encoder(x).flatten(1))


def test_whole_resnet_needs_no_renaming():
    teacher = trained_teacher(Student(resnet(feed_forward=False)), torch.randn(4, 1, 32, 32))
    fresh = resnet(feed_forward=False).eval()
    fresh.load_state_dict(teacher.backbone_state_dict("encoder"))  # strict
    x = torch.randn(2, 1, 32, 32)
    assert fresh(x).equal(teacher.module.encoder(x))


def test_only_the_classifier_is_missing_in_a_resnet_that_has_one():
    teacher = trained_teacher(Student(resnet(feed_forward=False)), torch.randn(4, 1, 32, 32))
    answer = resnet(num_classes=3).load_state_dict(teacher.backbone_state_dict("encoder"), strict=False)
    assert answer.missing_keys == ["fc.weight", "fc.bias"]
    assert answer.unexpected_keys == []


def test_resnet_cut_into_a_sequential_is_renamed():
    teacher = trained_teacher(
        Student(nn.Sequential(*list(resnet(feed_forward=False).children())[:-1])), torch.randn(4, 1, 32, 32)
    )
    fresh = resnet(feed_forward=False).eval()
    fresh.load_state_dict(resnet_state_dict(teacher.backbone_state_dict("encoder")))  # strict
    x = torch.randn(2, 1, 32, 32)
    assert fresh(x).flatten(1).equal(teacher.module.encoder(x).flatten(1))


def test_resnet_names_stay():
    state = resnet(num_classes=3).state_dict()
    assert_same_bits(resnet_state_dict(state), dict(state))


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        (resnet, TypeError, "state dict"),
        ({"encoder.0.weight": torch.ones(1)}, ValueError, "got 'encoder.0.weight': write teacher.backbone_state_dict"),
        ({"0.weight": torch.ones(1), "fc.weight": torch.ones(1)}, ValueError, "got 'fc.weight'"),
        ({"3.weight": torch.ones(1)}, ValueError, "got '3.weight'"),
    ],
)
def test_unknown_names_are_refused(state, error, words):
    with pytest.raises(error, match=words):
        resnet_state_dict(state)
