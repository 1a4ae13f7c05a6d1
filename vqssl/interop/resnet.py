"""The names of ResNets: torchvision's, which timm and MONAI share, from those of a ResNet cut into a Sequential."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqssl.interop.state_dicts import check_state, listed

__all__ = ["resnet_state_dict"]

# The children of torchvision's, timm's and MONAI's ResNet in their order; those between have no state.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
OWN = re.compile(r"(conv1|bn1|layer[1-4]|fc)\.")


def resnet_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of an encoder that was ``nn.Sequential(*list(resnet.children())[:-1])``, under the ResNet's own names.

    So is the encoder of most of lightly's examples. A student that kept the ResNet whole needs none of this:
    ``resnet.load_state_dict(teacher.backbone_state_dict("encoder"), strict=False)`` works as it is in torchvision,
    timm and MONAI (there with ``conv1_t_stride=2, bias_downsample=False``), and the answer names ``fc`` at most. A
    state that has the ResNet's own names already comes back as it is.

    Args:
        state: of the encoder, such as ``teacher.backbone_state_dict("backbone")``.

    Returns:
        The tensors, not copied, under ``conv1``, ``bn1`` and ``layer1`` to ``layer4``.

    Raises:
        TypeError: ``state`` is no state dict.
        ValueError: a name belongs to neither.

    >>> import torch
    >>> list(resnet_state_dict({"0.weight": torch.zeros(64, 3, 7, 7), "4.0.conv1.weight": torch.zeros(64, 64, 3, 3)}))
    ['conv1.weight', 'layer1.0.conv1.weight']
    """
    check_state("state", state)
    if all(OWN.match(name) for name in state):
        return dict(state)
    unknown = [name for name in state if name.partition(".")[0] not in CHILDREN]
    if unknown:
        raise ValueError(
            "state must have the names of nn.Sequential(*list(resnet.children())[:-1]), '0.weight' to '7.*', or the "
            f"ResNet's own, got {listed(unknown)}: write teacher.backbone_state_dict('name of the encoder')"
        )
    split = {name: name.partition(".") for name in state}
    return {f"{CHILDREN[child]}.{rest}": state[name] for name, (child, _, rest) in split.items()}
