"""A SigLIP with 3 of its 12 blocks and random weights: the real shapes at a cost that a CPU can pay."""

from merv.encoders.siglip import SigLIP


class ShallowSigLIP(SigLIP):
    """SigLIP's first 3 blocks; the features are those of the second."""

    def build(self) -> None:
        super().build()
        self.net.blocks = self.net.blocks[:3]
