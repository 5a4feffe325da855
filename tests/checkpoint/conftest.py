"""Fixtures of the checkpoint tests."""

import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Where checkpoints that several tests read are kept."""
    return tmp_path_factory.mktemp("checkpoints")
