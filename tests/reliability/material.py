"""A small DiSSECT network made of the five modules, its images and its gradients."""

import torch
from torch import Tensor, nn

import vqssl


class Student(nn.Module):
    """Encoder of two stages that returns an embedding and the feature map of each stage."""

    def __init__(self, norm: str = "batch") -> None:
        super().__init__()

        def stage(channels: int, width: int) -> nn.Sequential:
            made = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
            return nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), made, nn.ReLU())

        self.stages = nn.ModuleList([stage(1, 8), stage(8, 12)])
        self.projector = nn.Linear(12, 8)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the embedding and the feature maps."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return self.projector(images.mean((2, 3))), maps


class Net(nn.Module):
    """Student, teacher, quantiser, fusion and objective: two views of images in, the loss out."""

    def __init__(self, norm: str = "batch", seed: int = 0, **quantizer) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.student = Student(norm)
        self.predictor = nn.Linear(8, 8)
        self.teacher = vqssl.MomentumTeacher(self.student, momentum=0.9, total_steps=1000)
        options = {"decay": 0.9, "revival": vqssl.BatchRevival(0.3), **quantizer}
        self.quantizer = vqssl.MultiScaleQuantizer([8, 12], codebook_size=16, dim=8, **options)
        # Without BatchNorm in encoder and head, samples do not depend on one another.
        self.fusion = vqssl.SERFFusion(8, num_scales=2, hidden_dim=16 if norm == "batch" else None)
        self.objective = vqssl.DiSSECTObjective()

    def forward(self, views: Tensor) -> Tensor:
        """Return the scalar loss of views ``(2, B, 1, H, W)``, or ``(R, 2, B, 1, H, W)`` as R ranks hold them."""
        images = views.flatten(0, -4)
        p = self.predictor(self.student(images)[0])
        z_c, maps = self.teacher(images)
        out = self.quantizer(maps)
        z_s = self.fusion(z_c, out.quantized)
        p, z_c, z_s = (z.unflatten(0, views.shape[:-3]).movedim(-3, 0).flatten(1, -2).unbind() for z in (p, z_c, z_s))
        return self.objective(p, z_c, z_s, out.commitment_loss).total

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that get a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def images(step: int, count: int, rank: int = 0) -> Tensor:
    """Return two views ``(2, count, 1, 16, 16)`` of images whose brightness drifts with the step."""
    generator = torch.Generator().manual_seed(1_000_003 * rank + step)
    base = torch.rand(1, count, 1, 16, 16, generator=generator)
    tilt = torch.linspace(0, 1 + (step % 50) / 25, 16)
    return base * tilt + 0.1 * torch.randn(2, count, 1, 16, 16, generator=generator)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient, by name."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in net.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
