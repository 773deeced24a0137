"""Pictures as tensors: moved ones show the same scene, and what cannot be moved so far is named."""

import pytest
import torch

from models.errors import ConfigError
from models.images import shifted


def test_a_moved_picture_mirrors_what_comes_in_and_one_that_is_too_small_is_named():
    pictures = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = shifted(pictures, 2, -1)
    assert moved.shape == pictures.shape and torch.equal(moved[..., 1:, :6], pictures[..., :5, 2:])
    assert torch.equal(moved[..., 0, :6], pictures[..., 1, 2:]) and torch.equal(moved[..., 1:, 6], pictures[..., :5, 6])
    assert torch.equal(shifted(pictures, 0, 0), pictures)
    with pytest.raises(ConfigError, match="8 x 6 pixels cannot be moved by 6"):
        shifted(pictures, 6, 0)
