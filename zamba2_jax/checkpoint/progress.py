"""One progress bar, in bytes."""

from tqdm import tqdm


def byte_bar(description: str, total: int, show: bool | None) -> tqdm:
    """A bar on stderr. `show` None: only where stderr is a terminal."""
    return tqdm(
        desc=description,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=None if show is None else not show,
        mininterval=0.5,
    )
