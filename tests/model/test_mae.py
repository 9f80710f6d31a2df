import numpy as np
import pytest
import torch
from torch import Tensor

from ced.errors import ConfigError
from ced.model.config import ModelConfig
from ced.model.mae import MaskedAutoencoder, error_of_hidden, normalised, patches, picture
from ced.model.vit import CED

CONFIG = ModelConfig(32, 2, depth=2, outputdim=1, target_length=64, pooling="token")


def autoencoder_of(columns: int = 3, ratio: float = 0.75) -> MaskedAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = CED(CONFIG)
        autoencoder = MaskedAutoencoder(encoder, columns, ratio=ratio, width=16, heads=2, depth=1)
    return autoencoder.eval()


def mel_of(count: int = 2, frames: int = 50) -> Tensor:
    """As the front end gives it, with two frames more than three patch columns."""
    return torch.randn((count, 64, frames), generator=torch.Generator().manual_seed(1)) * 10 - 40


def hidden_of(autoencoder: MaskedAutoencoder, count: int = 2, seed: int = 5) -> Tensor:
    return autoencoder.hide(count, torch.Generator().manual_seed(seed))


def test_patches_are_in_the_order_of_tokens() -> None:
    mel = torch.arange(64.0 * 50).reshape(1, 64, 50)
    cut = patches(mel)
    assert cut.shape == (1, 12, 256)
    assert torch.equal(cut[0, 1].reshape(16, 16), mel[0, :16, 16:32])
    assert torch.equal(cut[0, 3].reshape(16, 16), mel[0, 16:32, :16])
    assert torch.equal(picture(cut, 4), mel[..., :48])


def test_a_patch_is_normalised_by_its_own_mean_and_variance() -> None:
    cut = torch.tensor([[[1.0, 3.0, 1.0, 3.0], [-80.0, -80.0, -80.0, -80.0]]])
    found, mean, deviation = normalised(cut)
    torch.testing.assert_close(found, torch.tensor([[[-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]))
    torch.testing.assert_close(mean.flatten(), torch.tensor([2.0, -80.0]))
    torch.testing.assert_close(deviation.flatten(), torch.tensor([1.0, 0.001]))


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 9), (0.5, 6), (0.9, 11), (0.1, 1)])
def test_the_same_number_of_patches_is_hidden_in_each_clip(ratio: float, hidden: int) -> None:
    autoencoder = autoencoder_of(ratio=ratio)
    drawn = hidden_of(autoencoder, 40)
    assert drawn.sum(1).tolist() == [hidden] * 40
    assert autoencoder.visible == 12 - hidden
    assert torch.equal(drawn, hidden_of(autoencoder, 40))
    assert not torch.equal(drawn, hidden_of(autoencoder, 40, seed=6))
    assert drawn.any(0).all()  # no patch is never hidden


def test_the_encoder_gets_only_visible_patches() -> None:
    autoencoder, cut = autoencoder_of(), patches(mel_of())
    hidden = hidden_of(autoencoder)
    noise = torch.randn(cut.shape, generator=torch.Generator().manual_seed(2)) * 30

    def tokens(replaced: Tensor) -> Tensor:
        """Encode the pictures with other patches in some places."""
        mel = picture(torch.where(replaced.unsqueeze(-1), noise, cut), 4)
        with torch.no_grad():
            return autoencoder.encode(mel, autoencoder.places(hidden))

    as_is = tokens(torch.zeros_like(hidden))
    assert as_is.shape == (2, 1 + 3, 32)
    assert torch.equal(tokens(hidden), as_is)
    one_seen = torch.zeros_like(hidden)
    one_seen[0, int((~hidden[0]).nonzero()[0])] = True
    assert not torch.equal(tokens(one_seen)[0], as_is[0])


def test_a_visible_patch_keeps_its_place() -> None:
    """The tokens are those of the visible patches where they are, in their order behind the class token."""
    autoencoder, mel = autoencoder_of(), mel_of(1)
    hidden = torch.ones((1, 12), dtype=torch.bool)
    hidden[0, [1, 5, 10]] = False
    encoder = autoencoder.encoder
    with torch.no_grad():
        every = encoder.embed_patches(encoder.init_bn(mel))
        expected = encoder.relate(every[:, [1, 5, 10]])
        torch.testing.assert_close(autoencoder.encode(mel, autoencoder.places(hidden)), expected)


def test_the_loss_is_that_of_a_plain_computation() -> None:
    """A decoder that answers 0.5 and -0.25 in turn, whatever it is given."""
    autoencoder, mel = autoencoder_of(), mel_of()
    hidden = hidden_of(autoencoder)
    answer = np.tile([0.5, -0.25], 128)
    with torch.no_grad():
        autoencoder.decoder_pred.weight.zero_()
        autoencoder.decoder_pred.bias.copy_(torch.from_numpy(answer))
        loss = error_of_hidden(autoencoder(mel, hidden), hidden)
    squares = []
    for clip, mask in zip(mel.double().numpy(), hidden.numpy(), strict=True):
        for row in range(4):
            for column in range(3):
                if mask[3 * row + column]:
                    patch = clip[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten()
                    squares.append(np.mean((answer - (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)) ** 2))
    assert len(squares) == 18
    assert float(loss) == pytest.approx(np.mean(squares), rel=1e-5)


def test_only_hidden_patches_are_learned_from() -> None:
    errors, hidden = torch.tensor([[1.0, 2.0, 100.0], [3.0, 50.0, 6.0]]), torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    assert float(error_of_hidden(errors, hidden)) == 3.0


def test_all_parameters_but_the_output_layer_get_gradients() -> None:
    autoencoder, mel = autoencoder_of(), mel_of()
    hidden = hidden_of(autoencoder)
    error_of_hidden(autoencoder(mel, hidden), hidden).backward()
    idle = {name for name, parameter in autoencoder.named_parameters() if parameter.grad is None}
    assert {name.partition("outputlayer.")[0] for name in idle} == {"encoder."}
    learned = {name for name, parameter in autoencoder.named_parameters() if name not in idle}
    assert {"mask_token", "encoder.cls_token", "decoder_time_pos_embed", "decoder_freq_pos_embed"} <= learned


def test_only_hidden_patches_are_replaced() -> None:
    autoencoder, mel = autoencoder_of(), mel_of()
    hidden = hidden_of(autoencoder)
    with torch.no_grad():
        autoencoder.decoder_pred.weight.zero_()
        autoencoder.decoder_pred.bias.fill_(2.0)
        filled = patches(autoencoder.fill(mel, hidden))
    cut = patches(mel)
    assert torch.equal(filled[~hidden], cut[~hidden])
    expected = cut.mean(-1) + 2 * cut.std(-1, correction=0)
    torch.testing.assert_close(filled[hidden], expected.unsqueeze(-1).expand_as(cut)[hidden])


@pytest.mark.parametrize(
    ("columns", "ratio", "message"),
    [
        (5, 0.75, "5 patch columns are more than the 4 of target_length 64"),
        (1, 0.9, r"mask_ratio 0\.9 leaves 0 of 4 patches visible"),
        (1, 0.1, r"mask_ratio 0\.1 leaves 4 of 4 patches visible"),
    ],
)
def test_impossible_mask_ratios_are_refused(columns: int, ratio: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autoencoder_of(columns, ratio)
