import numpy as np
import pytest
import torch

from ced.distill.loop import share
from ced.distill.targets import mixup
from ced.errors import ConfigError


def test_a_process_alone_takes_the_whole_batch_in_order() -> None:
    assert share(0, 1, 5).tolist() == [0, 1, 2, 3, 4]


def test_processes_share_a_batch_with_both_ends_of_each_mixup_pair() -> None:
    shares = [share(rank, 3, 12) for rank in range(3)]
    assert [part.tolist() for part in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    x, weights = torch.randn(12, 5), torch.rand(12)
    whole = mixup(x, weights)
    for part in shares:
        assert torch.equal(mixup(x[part], weights[part]), whole[part])
    assert sorted(np.concatenate(shares).tolist()) == list(range(12))


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 6; for 2 processes it must be a multiple of 4"):
        share(0, 2, 6)
