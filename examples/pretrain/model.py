"""DiSSECT assembled from vqssl's parts: a student, its momentum teacher, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

import vqssl

METHODS = ("byol", "dissect")
STAGES = ("layer1", "layer2", "layer3", "layer4")
PROJECTIONS = {"orthogonal": None, "learned": vqssl.LearnedProjection, "linear": nn.Linear}


@dataclass(frozen=True)
class Model:
    """What is trained. The defaults are the paper's, but for `operator`, `projection` and `refinement`: docs/method."""

    width: int = 64
    """Channels of the encoder's first stage; a ResNet-18 has 64."""
    stem_stride: Literal[1, 2, 4] = 4
    """4 is the usual stem, 7 x 7 with stride 2 and max-pooling; 1 and 2, for small images, are 3 x 3 and no pooling."""
    scales: tuple[str, ...] = ("layer2", "layer3", "layer4")
    """Which stages are quantised."""
    dim: int = 128
    """Width D of embeddings and codes."""
    hidden_dim: int = 2048
    """Hidden width of projector, predictor and SERF MLP."""
    codebook_size: int = 2048
    shared_codebook: bool = False
    metric: Literal["euclidean", "cosine"] = "euclidean"
    ema: Literal["count_weighted", "batch_mean"] = "count_weighted"
    codebook_decay: float = 0.99
    projection: Literal["orthogonal", "learned", "linear"] = "orthogonal"
    """A fixed map and a layer norm, a learned map and a layer norm, or a learned map alone (which shrinks)."""
    quantize: Literal["teacher", "student"] = "teacher"
    """Whose maps."""
    operator: Literal["spatial", "channel", "batch", "pooled", "concat"] = "spatial"
    residual: bool | None = None
    serf_mlp: bool = True
    refinement: Literal["predict", "align", "detached"] = "predict"
    target_weights: tuple[float, float] = (0.5, 0.5)
    commitment_weight: float = 1.0
    teacher_momentum: float = 0.996
    teacher_final_momentum: float = 1.0
    teacher_buffers: Literal["ema", "copy", "own"] = "ema"


class Encoder(nn.Module):
    """MONAI's ResNet-18, which also returns the maps of the stages that are asked for."""

    def __init__(self, channels: int, config: Model) -> None:
        super().__init__()
        usual = config.stem_stride == 4
        self.widths = [config.width * 2**stage for stage in range(4)]
        self.scales = config.scales
        self.resnet = ResNet(
            "basic",
            [2, 2, 2, 2],
            self.widths,
            spatial_dims=2,
            n_input_channels=channels,
            conv1_t_size=7 if usual else 3,
            conv1_t_stride=2 if usual else config.stem_stride,
            no_max_pool=not usual,
            feed_forward=False,
            bias_downsample=False,
        )

    @property
    def dim(self) -> int:
        """Width of the pooled features."""
        return self.widths[-1]

    @property
    def scale_channels(self) -> list[int]:
        return [self.widths[STAGES.index(scale)] for scale in self.scales]

    @property
    def pyramid_channels(self) -> list[int]:
        """Of :meth:`pyramid`."""
        return [*([self.widths[0]] if not self.resnet.no_max_pool else []), *self.widths]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """The maps of all stages, fine to coarse, each half the one before; the usual stem's comes first."""
        net = self.resnet
        x = net.act(net.bn1(net.conv1(images)))
        maps = []
        if not net.no_max_pool:
            maps.append(x)
            x = net.maxpool(x)
        for stage in STAGES:
            x = getattr(net, stage)(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`(B, C, H, W)` -> features `(B, dim)` and the maps of `scales`."""
        maps = self.pyramid(images)[-len(STAGES) :]
        return maps[-1].mean((2, 3)), [maps[STAGES.index(scale)] for scale in self.scales]


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


class Embedder(nn.Module):
    """Encoder and projector: what student and teacher have in common."""

    def __init__(self, channels: int, config: Model) -> None:
        super().__init__()
        self.encoder = Encoder(channels, config)
        self.projector = mlp(self.encoder.dim, config.hidden_dim, config.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, maps = self.encoder(images)
        return self.projector(features), maps


class Step(NamedTuple):
    loss: vqssl.DiSSECTLoss
    targets: Tensor
    """z_c of all views, `(V B, D)`, for the log."""


class SelfSupervised(nn.Module):
    """BYOL, or DiSSECT: BYOL with a quantised target beside the continuous one."""

    def __init__(self, method: str, channels: int, config: Model, total_steps: int, seed: int = 0) -> None:
        super().__init__()
        self.student = Embedder(channels, config)
        self.predictor = mlp(config.dim, config.hidden_dim, config.dim)
        self.teacher = vqssl.MomentumTeacher(
            self.student,
            momentum=config.teacher_momentum,
            final_momentum=config.teacher_final_momentum,
            total_steps=total_steps,
            buffers=config.teacher_buffers,
        )
        self.quantizer: vqssl.MultiScaleQuantizer | None = None
        self.quantize = config.quantize
        if method == "dissect":
            self.quantizer = vqssl.MultiScaleQuantizer(
                self.student.encoder.scale_channels,
                config.codebook_size,
                config.dim,
                shared=config.shared_codebook,
                projection=PROJECTIONS[config.projection],
                metric=config.metric,
                ema=config.ema,
                decay=config.codebook_decay,
                seed=seed,
            )
            self.fusion = vqssl.SERFFusion(
                config.dim,
                num_scales=len(config.scales),
                operator=config.operator,
                residual=config.residual,
                hidden_dim=config.hidden_dim if config.serf_mlp else None,
            )
        self.objective = vqssl.DiSSECTObjective(
            target_weights=config.target_weights,
            commitment_weight=config.commitment_weight,
            refinement=config.refinement,
        )

    def forward(self, views: Sequence[Tensor]) -> Step:
        """The loss of V views `(B, C, H, W)` of the same images."""
        images = torch.cat(list(views))
        embedding, own_maps = self.student(images)
        p = self.predictor(embedding)
        z_c, maps = self.teacher(images)
        if self.quantize == "student":  # other features for the codes, and no other gradient
            maps = [scale.detach() for scale in own_maps]
        z_s, commitment = None, None
        if self.quantizer is not None:
            quantized = self.quantizer(maps)
            z_s = self.fusion(z_c, quantized.quantized).chunk(len(views))
            commitment = quantized.commitment_loss
        loss = self.objective(p.chunk(len(views)), z_c.chunk(len(views)), z_s, commitment)
        return Step(loss, z_c)

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
