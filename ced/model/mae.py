"""A masked autoencoder: the network encodes a few patches of the features, and a decoder predicts the hidden ones.

After He et al., "Masked autoencoders are scalable vision learners" (arXiv 2111.06377), applied to log-mel features.
"""

import torch
from torch import Tensor, nn

from ced.errors import ConfigError
from ced.model.vit import CED, Block
from ced.sound.features import PATCH

EPSILON = 1e-6  # dB^2, added to a patch's variance, which is 0 for digital silence


def patches(mel: Tensor) -> Tensor:
    """Cut features into patches, frequency slowest: (b, f, n) -> (b, f // 16 * n // 16, 256); a rest is dropped."""
    rows, columns = (size // PATCH for size in mel.shape[1:])
    cut = mel[:, : rows * PATCH, : columns * PATCH].unflatten(2, (columns, PATCH)).unflatten(1, (rows, PATCH))
    out: Tensor = cut.transpose(2, 3).flatten(3).flatten(1, 2)
    return out


def picture(cut: Tensor, rows: int) -> Tensor:
    """Join patches to features, the inverse of `patches`: (b, rows * columns, 256) -> (b, rows * 16, columns * 16)."""
    out: Tensor = cut.unflatten(2, (PATCH, PATCH)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
    return out


def normalised(cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise patches (b, tokens, 256) to mean 0 and variance 1; also return means and deviations, (b, tokens, 1)."""
    variance, mean = torch.var_mean(cut, dim=-1, correction=0, keepdim=True)
    deviation = (variance + EPSILON).sqrt()
    return (cut - mean) / deviation, mean, deviation


def error_of_hidden(errors: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean of the errors (b, tokens) over the hidden patches, bool (b, tokens)."""
    return (errors * hidden).sum() / hidden.sum()


class MaskedAutoencoder(nn.Module):
    """An encoder, which is the network to pre-train, and a decoder, which is discarded afterwards."""

    def __init__(self, encoder: CED, columns: int, *, ratio: float, width: int, heads: int, depth: int) -> None:
        """Add a decoder to an encoder.

        Args:
            encoder: with pooling "token".
            columns: columns of patches of each clip.
            ratio: part of the patches to hide.
            width: of the decoder's tokens.
            heads: of the decoder's attention.
            depth: blocks of the decoder.

        Raises:
            ConfigError: the ratio hides all patches or none, or clips are longer than the encoder's target_length.
        """
        super().__init__()
        if columns > encoder.time_pos_embed.shape[3]:
            raise ConfigError(
                f"{columns} patch columns are more than the {encoder.time_pos_embed.shape[3]} of target_length "
                f"{encoder.config.target_length}; shorten chunk_length or raise model_args.target_length"
            )
        self.encoder, self.rows = encoder, encoder.config.n_mels // PATCH
        self.tokens = self.rows * columns
        self.visible = self.tokens - round(ratio * self.tokens)
        if not 0 < self.visible < self.tokens:
            raise ConfigError(f"mask_ratio {ratio} leaves {self.visible} of {self.tokens} patches visible")
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_time_pos_embed = nn.Parameter(torch.empty(1, columns, width))
        self.decoder_freq_pos_embed = nn.Parameter(torch.empty(self.rows, 1, width))
        self.decoder_embed = nn.Linear(encoder.config.embed_dim, width)
        self.decoder_blocks = nn.ModuleList(Block(width, heads, encoder.config.mlp_ratio) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, PATCH * PATCH)
        self._reset_decoder()

    def _reset_decoder(self) -> None:
        """Initialise the weights like the encoder's: linear layers truncated normal, embeddings normal, biases 0."""
        for embedding in (self.mask_token, self.decoder_time_pos_embed, self.decoder_freq_pos_embed):
            nn.init.normal_(embedding, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def hide(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the hidden patches of `count` clips: bool (count, tokens), the same number in each."""
        order = torch.rand((count, self.tokens), generator=generator).argsort(1)
        return torch.zeros((count, self.tokens), dtype=torch.bool).scatter(1, order[:, self.visible :], True)

    def forward(self, mel: Tensor, hidden: Tensor) -> Tensor:
        """Return the prediction error of each patch.

        Args:
            mel: (b, f, n) dB.
            hidden: bool (b, tokens), with `visible` False in each row.

        Returns:
            float32 (b, tokens): the mean square difference to the patch, which is normalised to mean 0 and variance 1.
        """
        target, _, _ = normalised(patches(mel.float()))
        return (self._predict(mel, hidden).float() - target).square().mean(-1)

    def fill(self, mel: Tensor, hidden: Tensor) -> Tensor:
        """Return features with predicted hidden patches, (b, f, n) -> float32 (b, f // 16 * 16, n // 16 * 16).

        The mean and deviation of a hidden patch, which the decoder does not predict, are those of the patch itself.
        """
        cut = patches(mel.float())
        _, mean, deviation = normalised(cut)
        filled = self._predict(mel, hidden).float() * deviation + mean
        return picture(torch.where(hidden.unsqueeze(-1), filled, cut), self.rows)

    def places(self, hidden: Tensor) -> Tensor:
        """Return the indices of the visible patches, int64 (b, visible), ascending."""
        return hidden.int().argsort(dim=1, stable=True)[:, : self.visible]

    def encode(self, mel: Tensor, places: Tensor) -> Tensor:
        """Return the encoder's tokens of the patches at `places`, (b, 1 + visible, d), the class token first.

        They do not depend on the other patches, except through the batch statistics of the BatchNorm in training.
        """
        tokens = self.encoder.embed_patches(self.encoder.normed(mel))
        return self.encoder.relate(tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[2])))

    def _predict(self, mel: Tensor, hidden: Tensor) -> Tensor:
        """Predict every normalised patch, (b, tokens, 256), from the visible ones."""
        places = self.places(hidden)
        seen = self.decoder_embed(self.encode(mel, places))  # (b, 1 + visible, width)
        batch, _, width = seen.shape
        x = self.mask_token.to(seen.dtype).expand(batch, self.tokens, width)
        x = x.scatter(1, places.unsqueeze(-1).expand(-1, -1, width), seen[:, 1:])
        x = x + (self.decoder_freq_pos_embed + self.decoder_time_pos_embed).flatten(0, 1)
        x = torch.cat([seen[:, :1], x], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        out: Tensor = self.decoder_pred(self.decoder_norm(x[:, 1:]))
        return out
