"""Latte, a video diffusion transformer (arXiv:2401.03048), with the long skip branches of Skip-DiT (arXiv:2411.17616).

A layer is a spatial block followed by a temporal block. A long skip carries the output of layer i < num_skips to layer
L-1-i, which merges it into its input. num_skips = 0 is Latte, num_skips = L/2 is Skip-DiT.
Letters: B batch, F frames, T tokens of a frame, D width, L layers, C channels of the latents, H = W = input_size.
"""

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import UserError
from models.checkpoint import StrictHubMixin
from models.layers import (
    Block,
    FinalLayer,
    FP32LayerNorm,
    LabelEmbedder,
    PatchEmbed,
    SkipLinear,
    TimestepEmbedder,
    sincos_1d,
    sincos_2d,
)


class Latte(nn.Module, StrictHubMixin):
    """The transformer; `forward` is `embed`, `run` over all layers, `unembed`.

    Args:
        input_size: height and width of the latents.
        patch_size: height and width of a token, in latents.
        in_channels: channels of the latents.
        hidden_size: D.
        depth: number of blocks, a multiple of 4; L = depth / 2.
        num_heads: attention heads.
        mlp_ratio: hidden width of a block's MLP divided by D.
        num_frames: frames of a clip; frames past them are stills (joint image-video training).
        class_dropout_prob: above 0, the label `num_classes` is the null label. The caller drops labels, not the model.
        num_classes: None for an unconditional model.
        learn_sigma: whether the output has 2C channels, of which the second half is the variance.
        num_skips: number of long skip branches, 0 ... L / 2.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_frames: int = 16,
        class_dropout_prob: float = 0.1,
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        num_skips: int = 0,
    ):
        super().__init__()
        check_dimensions(input_size, patch_size, hidden_size, depth, num_heads, num_skips)
        self.num_frames, self.num_classes, self.num_skips = num_frames, num_classes, num_skips
        self.in_channels, self.out_channels = in_channels, in_channels * 2 if learn_sigma else in_channels
        self.input_size, self.patch_size, self.num_layers = input_size, patch_size, depth // 2
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = None
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        # Entry 0 serves the innermost branch, which ends at layer L/2 in Skip-DiT.
        self.skip_norms = nn.ModuleList(FP32LayerNorm(2 * hidden_size, eps=1e-6) for _ in range(num_skips))
        self.skip_linears = nn.ModuleList(SkipLinear(hidden_size) for _ in range(num_skips))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

        # Constants, but published checkpoints contain them.
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid)[None].float(), requires_grad=False)
        frames = torch.arange(num_frames)
        self.temp_embed = nn.Parameter(sincos_1d(hidden_size, frames)[None].float(), requires_grad=False)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, y_image: Tensor | None = None) -> Tensor:
        """Returns the model's prediction for noisy latents.

        Args:
            x: (B, F, C, H, W); frames past `num_frames` are stills.
            t: (B,) original timesteps, 0 ... 999; in a flow 1000 s, real numbers.
            y: (B,) labels, some of them replaced by the null label in training; None for an unconditional model.
            y_image: (B, F - num_frames) labels of the stills.

        Returns:
            (B, F, 2C, H, W), or (B, F, C, H, W) without `learn_sigma`.
        """
        x, c = self.embed(x, t, y, y_image)  # (B, F, T, D), (B, 1 or F, D)
        x = self.run(range(self.num_layers), x, c, skips=[])  # (B, F, T, D)
        return self.unembed(x, c)  # (B, F, 2C, H, W)

    def embed(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, y_image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, F, T, D) and conditioning (B, 1, D), or (B, F, D) where stills have their own labels."""
        B, F = x.shape[:2]
        patches = x.flatten(0, 1).to(self.x_embedder.proj.weight.dtype)  # (B*F, C, H, W)
        tokens = self.x_embedder(patches).unflatten(0, (B, F)) + self.pos_embed
        c = self.t_embedder(t)[:, None]  # (B, 1, D)
        if self.y_embedder is None:
            return tokens, c
        if y_image is None:
            return tokens, c + self.y_embedder(y)[:, None]
        labels = torch.cat([y[:, None].expand(-1, self.num_frames), y_image], dim=1)  # (B, F)
        return tokens, c + self.y_embedder(labels)

    def run(self, layers: Iterable[int], x: Tensor, c: Tensor, skips: list[Tensor]) -> Tensor:
        """Runs `layers` on x (B, F, T, D). `skips` is a stack: the first layers push to it and the last layers pop."""
        for i in layers:
            x = self.merge(i, x, skips)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Layers draw no random numbers, so there is no state of a generator to preserve.
                x = checkpoint(self.layer, i, x, c, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.layer(i, x, c)
            if i < self.num_skips:
                skips.append(x)
        return x

    def merge(self, i: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Returns the input of layer i: x (B, F, T, D), merged with the newest of `skips` if a branch ends here."""
        branch = i - (self.num_layers - self.num_skips)  # 0: the innermost
        if branch < 0:
            return x
        # With L/2 skips, the innermost merge concatenates x with itself. The published weights were trained so.
        return self.skip_linears[branch](self.skip_norms[branch](torch.cat([x, skips.pop()], dim=-1)))

    def layer(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        """Runs layer i on x (B, F, T, D): attention within each frame, then over the frames at each token's place."""
        spatial, temporal = self.blocks[2 * i], self.blocks[2 * i + 1]
        x = spatial(x, c)
        clip, stills = x[:, : self.num_frames], x[:, self.num_frames :]
        if i == 0:
            clip = clip + self.temp_embed[:, :, None]  # (1, F, 1, D)
        # contiguous(): otherwise each norm and sum in the block would copy its input or read it with strides.
        clip = temporal(clip.transpose(1, 2).contiguous(), c[:, :1]).transpose(1, 2)  # (B, T, F, D) -> (B, F, T, D)
        return torch.cat([clip, stills], dim=1) if stills.shape[1] else clip.contiguous()

    def unembed(self, x: Tensor, c: Tensor) -> Tensor:
        """Returns the output (B, F, 2C, H, W) of tokens x (B, F, T, D)."""
        p, size = self.patch_size, self.input_size // self.patch_size
        x = self.final_layer(x, c)
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=size, w=size, p=p, q=p)

    def set_attention(self, mode: str) -> None:
        """Selects the attention: `sdpa` (torch's fused kernel) or `math` (plain products)."""
        for block in self.blocks:
            block.attn.fused = mode == "sdpa"

    def init_weights(self) -> None:
        """Initializes as adaLN-zero: every block is the identity and the output is zero. Other layers are Xavier."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as a linear layer on flattened patches
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)


def check_dimensions(
    input_size: int, patch_size: int, hidden_size: int, depth: int, num_heads: int, num_skips: int, **others: Any
) -> None:
    """Raises UserError for arguments of Latte that do not fit together."""
    if depth % 4:
        raise UserError(f"depth: {depth} is not a multiple of 4 (a layer is two blocks, a skip joins two layers)")
    if not 0 <= num_skips <= depth // 4:
        raise UserError(f"num_skips: {num_skips} is outside 0 ... {depth // 4}, a quarter of depth = {depth}")
    if input_size % patch_size:
        raise UserError(f"patch_size: {patch_size} does not divide the latents' size {input_size}")
    if hidden_size % num_heads or hidden_size % 4:
        raise UserError(f"hidden_size: {hidden_size} is not a multiple of num_heads = {num_heads} and of 4")


@torch.no_grad()
def init_skips_as_identity(model: Latte, x: Tensor, t: Tensor, y: Tensor | None = None) -> None:
    """Sets each merge of `model` to return x, so that weights trained without skips keep nearly the same output.

    A merge is Linear(LayerNorm([x, skip])). The linear layer becomes s [I, 0]. The norm removes the scale of x; s is
    the least-squares estimate of that scale, measured in one forward pass on x (B, F, C, H, W), t (B,) and y (B,). The
    pass runs the innermost merge first, so each merge is fitted after those before it have been set.
    """

    def fit(norm: FP32LayerNorm, inputs: tuple[Tensor], normed: Tensor) -> None:
        D = normed.shape[-1] // 2
        stream, normed = inputs[0][..., :D].float(), normed[..., :D].float()
        scale = (stream * normed).sum() / normed.square().sum()
        linear = model.skip_linears[list(model.skip_norms).index(norm)].linear
        linear.weight.zero_().diagonal().copy_(scale)  # (D, 2D)
        linear.bias.zero_()

    hooks = [norm.register_forward_hook(fit) for norm in model.skip_norms]
    try:
        model(x, t, y)
    finally:
        for hook in hooks:
            hook.remove()
