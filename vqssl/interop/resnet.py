"""ResNet key names of torchvision, timm and MONAI, from those of a ResNet cut into an nn.Sequential."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqssl.interop.state_dicts import check_state, listed

__all__ = ["resnet_state_dict"]

# Position to name of the ResNet's children, alike in torchvision, timm and MONAI. Children without state are left out.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
RESNET_NAME = re.compile(r"(conv1|bn1|layer[1-4]|fc)\.")


def resnet_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the state of ``nn.Sequential(*list(resnet.children())[:-1])`` to the ResNet's own names.

    Most of lightly's examples build their encoder in this way. A student that keeps the whole ResNet does not need
    this function: ``resnet.load_state_dict(teacher.backbone_state_dict("encoder"), strict=False)`` works as it is in
    torchvision, timm and MONAI (there with ``conv1_t_stride=2, bias_downsample=False``), and reports at most ``fc`` as
    missing. A state with the ResNet's own names is returned as it is.

    Args:
        state: state dict of the encoder, such as ``teacher.backbone_state_dict("backbone")``.

    Returns:
        The tensors, not copied, under ``conv1``, ``bn1`` and ``layer1`` to ``layer4``.

    Raises:
        TypeError: ``state`` is not a state dict.
        ValueError: a name belongs neither to the nn.Sequential nor to the ResNet.

    >>> import torch
    >>> list(resnet_state_dict({"0.weight": torch.zeros(64, 3, 7, 7), "4.0.conv1.weight": torch.zeros(64, 64, 3, 3)}))
    ['conv1.weight', 'layer1.0.conv1.weight']
    """
    check_state("state", state)
    if all(RESNET_NAME.match(name) for name in state):
        return dict(state)
    unknown = [name for name in state if name.partition(".")[0] not in CHILDREN]
    if unknown:
        raise ValueError(
            "state must have the names of nn.Sequential(*list(resnet.children())[:-1]), '0.weight' to '7.*', or the "
            f"ResNet's own, got {listed(unknown)}: write teacher.backbone_state_dict('name of the encoder')"
        )
    split = {name: name.partition(".") for name in state}
    return {f"{CHILDREN[child]}.{rest}": state[name] for name, (child, _, rest) in split.items()}
