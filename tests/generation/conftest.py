import numpy as np
import pytest

from bench.oracle import layer_types, pair


@pytest.fixture(scope="session")
def models(oracle_dir):
    """A small hybrid of the 1.2B kind, as torch's and as ours.

    The oracle's embeddings have a standard deviation of 0.5 and the head is tied to them, so logits spread over several
    units: the gap between the two best of 131 is some 1e5 times the float32 error, and token-for-token equality is a
    fair demand.
    """
    return pair(
        oracle_dir,
        "1.2B",
        num_hidden_layers=3,
        layers_block_type=layer_types(3, (1,)),
        max_position_embeddings=4096,
    )


@pytest.fixture(scope="session")
def prompts():
    """Three rows of 4, 11 and 7 tokens, padded on the left; ids and mask."""
    ids = np.random.default_rng(1).integers(3, 131, (3, 11))
    mask = np.ones((3, 11), int)
    mask[0, :7] = 0
    mask[2, :4] = 0
    ids[mask == 0] = 0
    return ids, mask
