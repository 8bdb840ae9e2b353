"""The parts of the transformer.

Letters: B batch, F frames, T tokens of a frame, G sequences of a sample, S tokens of a sequence, D width.
Spatial attention has G = F and S = T; temporal attention has G = T and S = F.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FREQUENCIES = 256  # sines and cosines of a timestep
# tanh(z) = z P(z^2) / Q(z^2) for |z| <= 9, to 6e-8 of its value; lowest powers first, by weighted least squares.
TANH_P = (9.99999941e-1, 1.29192295e-1, 2.92076311e-3, 9.26743469e-6, -1.27804885e-8, 1.82553805e-11)
TANH_Q = (1.0, 4.62525134e-1, 2.37631735e-2, 2.28100391e-4)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x (1 + scale) + shift, computed in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh approximation.

    A compiled CPU kernel takes tanh from rational functions: the compiler's own costs a fifth of a training step.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    z = (math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).clamp(-9, 9)
    t = (z * _polynomial(TANH_P, z * z) / _polynomial(TANH_Q, z * z)).detach()
    t = t + (1 - t * t) * (z - z.detach())  # adds 0; its gradient is that of tanh
    return (0.5 * wide * (1 + t)).to(x.dtype)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Returns a polynomial of x with the lowest power first, by Horner's rule."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


class PatchEmbed(nn.Module):
    """Embeds square patches of an image as tokens."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, T, D), rows first."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, by torch's fused kernel or by plain products."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.fused = True  # see Latte.set_attention
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, S, D) -> (N, S, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (N, S, 3, heads, D / heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # (N, heads, S, D / heads) each
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around tanh-approximated GELU."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return self.fc2(gelu(self.fc1(x)))


class TimestepEmbedder(nn.Module):
    """Embeds timesteps with sinusoids and a two-layer MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), integer or fractional -> (B, D)."""
        half = NUM_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)  # (B, half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)  # fp32: bf16 cannot tell t = 998 from 1000
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Embeds class labels. With label dropout, the table has one more row for the null label, `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """labels (...,) -> (..., D)."""
        return self.embedding_table(labels)


class Block(nn.Module):
    """A DiT block with adaLN-zero. Tokens attend only within their sequence."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, G, S, D), c (B, 1 or G, D) -> (B, G, S, D)."""
        B, G = x.shape[:2]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).unsqueeze(2).chunk(6, dim=-1)
        sequences = modulate(self.norm1(x), shift_a, scale_a).flatten(0, 1)  # (B*G, S, D)
        x = torch.addcmul(x, gate_a, self.attn(sequences).unflatten(0, (B, G)))
        return torch.addcmul(x, gate_m, self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 for any type of input, because the two concatenated streams differ widely in scale."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class SkipLinear(nn.Module):
    """The projection of a long skip branch, 2D -> D."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class FinalLayer(nn.Module):
    """Maps tokens to the values of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, F, T, D), c (B, 1 or F, D) -> (B, F, T, patch * patch * channels)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Returns sines, then cosines, of positions at dim / 2 frequencies: (N,) -> (N, dim), float64."""
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim: int, size: int) -> Tensor:
    """Returns (size * size, dim) for a grid, row by row; the first half encodes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1)
