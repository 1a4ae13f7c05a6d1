"""`backbone_state_dict()` straight into ResNets: MONAI's here, torchvision's and timm's in foreign.py."""

import pytest
import torch
from monai.networks.nets.resnet import resnet18
from torch import nn

from tests.laws import assert_same_bits
from vqssl import MomentumTeacher
from vqssl.interop import resnet_state_dict


def resnet(**options):
    return resnet18(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, bias_downsample=False, **options)


def moved(student):
    """A teacher that stands apart from where anything starts, its BatchNorm statistics too."""
    teacher = MomentumTeacher(student, momentum=0.5)
    with torch.no_grad():
        student(torch.randn(4, 1, 32, 32))
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    teacher.update_(student)
    return teacher.eval()


class Student(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(512, 8)

    def forward(self, x):
        return self.head(self.encoder(x).flatten(1))


def test_a_whole_resnet_needs_no_renaming():
    teacher = moved(Student(resnet(feed_forward=False)))
    fresh = resnet(feed_forward=False).eval()
    fresh.load_state_dict(teacher.backbone_state_dict("encoder"))  # strict
    x = torch.randn(2, 1, 32, 32)
    assert fresh(x).equal(teacher.module.encoder(x))


def test_only_the_classifier_is_missing():
    teacher = moved(Student(resnet(feed_forward=False)))
    answer = resnet(num_classes=3).load_state_dict(teacher.backbone_state_dict("encoder"), strict=False)
    assert answer.missing_keys == ["fc.weight", "fc.bias"]
    assert answer.unexpected_keys == []


def test_a_resnet_cut_into_a_sequential():
    teacher = moved(Student(nn.Sequential(*list(resnet(feed_forward=False).children())[:-1])))
    fresh = resnet(feed_forward=False).eval()
    fresh.load_state_dict(resnet_state_dict(teacher.backbone_state_dict("encoder")))  # strict
    x = torch.randn(2, 1, 32, 32)
    assert fresh(x).flatten(1).equal(teacher.module.encoder(x).flatten(1))


def test_its_own_names_stay():
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
def test_other_names_are_refused(state, error, words):
    with pytest.raises(error, match=words):
        resnet_state_dict(state)
