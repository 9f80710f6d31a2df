import logging

import pytest

from ced.distill.start import warn_of_cuts
from ced.model.config import ModelConfig
from ced.model.vit import CED


def test_items_a_little_too_long_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """80,000 samples are 501 frames: with pieces of 496, a second one would hold five frames and padding."""
    network = CED(ModelConfig(embed_dim=32, num_heads=1, depth=1, outputdim=3, target_length=496))
    with caplog.at_level(logging.WARNING):
        warn_of_cuts(network, 79_199)
        assert not caplog.records
        warn_of_cuts(network, 80_000)
    (record,) = caplog.records
    assert "items of 501 frames are cut into pieces of 496" in record.getMessage()
    assert "model_args.target_length 501" in record.getMessage()
