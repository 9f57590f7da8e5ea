"""Architecture of a Wan checkpoint as data.

Every published model is a row of numbers read from the file's tensor shapes, never a branch in the model code.
Source: Wan-Video/Wan2.1 and Wan2.2 (model classes and published configurations).
"""

from __future__ import annotations

from dataclasses import dataclass

FREQ_DIM = 256
ROPE_THETA = 10000.0
PATCH_SIZE = (1, 2, 2)
# Latent channels of the 2.2 VAE, whose tokens are 32 pixels a side; others are 16.
CHANNELS_2_2 = 48


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of one Wan transformer.

    dim: channel width; ffn_dim: feed-forward width; num_heads, num_layers: counts.
    in_dim: latent channels at the patch embedding, condition channels included; out_dim: channels predicted.
    text_dim: width of the text encoder's output, 0 for a model that reads no text; text_len: tokens that the text is
    padded to.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = FREQ_DIM
    patch_size: tuple[int, int, int] = PATCH_SIZE
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.num_heads} heads.")
        if self.head_dim % 2:
            raise ValueError(f"The head size {self.head_dim} is odd; rotary embedding needs an even one.")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels that an image condition (mask and latent) adds to the noise: 0 for text to video."""
        return self.in_dim - self.out_dim

    @property
    def token_side(self) -> int:
        """How many pixels a token is wide and high."""
        return 32 if self.out_dim == CHANNELS_2_2 else 16


# Those that make videos from text alone; the others differ in what they read besides.
PUBLISHED_CONFIGS = {
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "5B": WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=CHANNELS_2_2, out_dim=CHANNELS_2_2),
}
