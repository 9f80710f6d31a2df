import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ced.config import FinetuneConfig, check
from ced.distill.finetune import LabelledClips
from ced.distill.step import TargetLoss
from ced.distill.targets import mixup
from ced.distill.trainer import Trainer, batch_share, begin_run, warn_of_splitting
from ced.errors import ConfigError
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.progress import silent
from ced.sound.labels import numbered
from tests.distill.trainings import MASKS, settings


def test_a_single_process_has_the_whole_batch_in_order() -> None:
    assert batch_share(0, 1, 5).tolist() == [0, 1, 2, 3, 4]


def test_processes_share_a_batch_with_both_ends_of_each_mixup_pair() -> None:
    shares = [batch_share(rank, 3, 12) for rank in range(3)]
    assert [part.tolist() for part in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    x, weights = torch.randn(12, 5), torch.rand(12)
    whole = mixup(x, weights)
    for part in shares:
        assert torch.equal(mixup(x[part], weights[part]), whole[part])
    assert sorted(np.concatenate(shares).tolist()) == list(range(12))


def test_a_batch_that_cannot_be_divided_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size is 6; .* multiple of 4"):
        batch_share(0, 2, 6)


def test_items_slightly_longer_than_the_longest_input_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """80,000 samples are 501 frames: with pieces of 496, a second one would hold five frames and padding."""
    network = CED(ModelConfig(embed_dim=32, num_heads=1, depth=1, outputdim=3, target_length=496))
    with caplog.at_level(logging.WARNING):
        warn_of_splitting(network, 79_199)
        assert not caplog.records
        warn_of_splitting(network, 80_000)
    (record,) = caplog.records
    assert "items of 501 frames are split into pieces of 496" in record.getMessage()
    assert "model_args.target_length 501" in record.getMessage()


def test_a_new_run_gets_its_folder_when_it_is_trained(sounds: Path, tmp_path: Path) -> None:
    keys = settings(sounds, tmp_path, chunk_length=1, epochs=1, epoch_length=1, spectransforms=MASKS)
    config = check(FinetuneConfig, keys, "test")
    run = begin_run(config, name="mine", resume=None, progress=silent)
    network = CED(ModelConfig(32, 2, depth=1, target_length=112, outputdim=4, pooling="logit"))
    objective = TargetLoss(network, F.binary_cross_entropy_with_logits)
    trainer = Trainer(config, run, network, objective, LabelledClips(config, numbered(4)))
    assert not any(tmp_path.iterdir())
    folder = trainer.fit()
    assert folder.parent == tmp_path / "mine"
    assert (folder / "last.safetensors").is_file()
