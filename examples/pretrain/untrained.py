"""Encoders that are not pretrained here: random weights, and those of an ImageNet ResNet-18 in a file."""

from __future__ import annotations

import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from examples.pretrain.encoder import Encoder, EncoderOptions
from vqssl.interop import resnet_state_dict

WIDTH, STEM_STRIDE = 64, 4
"""Of a ResNet-18 as torchvision and timm have it."""


def random_encoder(channels: int, options: EncoderOptions, seed: int) -> Encoder:
    """Return the untrained encoder that every method of a seed starts from."""
    torch.manual_seed(seed)
    return Encoder(channels, options)


def encoder_of_file(path: Path, channels: int, options: EncoderOptions) -> Encoder:
    """Return an encoder with the weights of an ImageNet ResNet-18; grey images get the sum over its three colours.

    Args:
        path: a state dict with torchvision's names, `.pth`, `.pt` or `.safetensors`; `fc` is left out.
        channels: of the images, 1 or 3.
        options: of the encoder; its width must be 64 and its stem the usual one.

    Raises:
        ValueError: the file cannot be read, lacks an entry or has another shape, or the encoder has another width or
            stem.
        FileNotFoundError: there is no such file.
    """
    if (options.width, options.stem_stride) != (WIDTH, STEM_STRIDE):
        raise ValueError(
            f"--weights needs an encoder of the file's shape, --encoder.width {WIDTH} --encoder.stem-stride "
            f"{STEM_STRIDE}, got width {options.width} and stem stride {options.stem_stride}"
        )
    state = read_weights(path)
    encoder = Encoder(channels, options)
    ours = encoder.resnet.state_dict()
    conv1 = state.get("conv1.weight")
    if channels == 1 and conv1 is not None and conv1.ndim == 4 and conv1.shape[1] == 3:
        state["conv1.weight"] = conv1.sum(1, keepdim=True)  # what a grey image gives in three equal colours
    # Files of torch before 0.4.1 do not count batches.
    missing = [name for name in ours if name not in state and not name.endswith("num_batches_tracked")]
    if missing:
        raise refusal(path, f"{len(missing)} entries are missing, such as {missing[0]}")
    for name, value in ours.items():
        if name in state and state[name].shape != value.shape:
            raise refusal(path, f"{name} must be {tuple(value.shape)}, got {tuple(state[name].shape)}")
    deeper = [name for name in state if name not in ours and not name.startswith("fc.")]
    if deeper:
        raise refusal(path, f"{len(deeper)} entries belong to another network, such as {deeper[0]}")
    encoder.resnet.load_state_dict({**ours, **{name: state[name] for name in ours if name in state}})
    return encoder


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state file, without executing anything in it.

    Raises:
        ValueError: it holds something else.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give the state file of a ResNet-18 as --weights")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise refusal(path, f"it cannot be read: {str(error).splitlines()[0]:.80}") from error
    try:
        return resnet_state_dict(state)
    except (TypeError, ValueError) as error:
        raise refusal(path, str(error)) from error


def refusal(path: Path, why: str) -> ValueError:
    """Return the error that says what the file should be."""
    return ValueError(f"{path}: --weights must be the state dict of a ResNet-18 with torchvision's names: {why}")
