"""Dense attention and a full cache: the baseline of every comparison."""

from ..policy import Policy


class Dense(Policy):
    """Every token attends, stays and goes on; exactly what the base class does."""
