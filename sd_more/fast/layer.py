"""What all fast layers have in common."""

from mlx import nn


class FastLayer(nn.Module):
    """A layer that computes what another does, from its arrays under the same names."""

    def __init__(self, plain):
        super().__init__()
        vars(self).update(vars(plain))  # numbers, such as a stride
        dict.update(self, plain)  # arrays; Module.update refuses those that self lacks as yet

    def keep(self, name, dtype):
        """Whether the array of that name stays as it is, where dtype is asked for."""
        return False
