"""What a network makes of each patch of a sound, for those who put something else than its output layer behind it."""

import torch
from torch import Tensor

from ced.model.vit import CED
from ced.sound.features import PATCH


def grid(network: CED, mel: Tensor) -> Tensor:
    """Return the tokens of each patch after the last LayerNorm, without any class token.

    A picture longer than `target_length` is encoded in pieces of whole patches, so that columns stay evenly spaced;
    the frames behind the last whole patch are left out.

    Args:
        network: how patches are encoded.
        mel: (b, f, n) dB, n >= 16.

    Returns:
        (b, f // 16, n // 16, d)
    """
    rows, longest = network.config.n_mels // PATCH, network.config.target_length // PATCH
    pieces = network.normed(mel[..., : mel.shape[-1] // PATCH * PATCH]).split(longest * PATCH, dim=-1)
    return torch.cat([_encoded(network, piece, rows) for piece in pieces], dim=2)


def _encoded(network: CED, piece: Tensor, rows: int) -> Tensor:
    """Encode a normalised piece (b, f, n) of whole patches -> (b, rows, columns, d)."""
    columns = piece.shape[-1] // PATCH
    tokens = network.relate(network.embed(piece))
    patches: Tensor = tokens[:, -rows * columns :].unflatten(1, (rows, columns))
    return patches
