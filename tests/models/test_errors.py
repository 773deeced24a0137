"""Errors that a user meets."""

import pickle

from models.errors import BadMask, OneRewardError


def test_an_error_survives_the_way_from_another_process() -> None:
    error: OneRewardError = pickle.loads(pickle.dumps(BadMask("The mask is empty.", "Paint one.")))
    assert isinstance(error, BadMask) and (error.what, error.remedy) == ("The mask is empty.", "Paint one.")
    assert str(error) == "The mask is empty. Paint one."
