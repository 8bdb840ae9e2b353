"""Latte, a video diffusion transformer (arXiv:2401.03048), with the long skip branches of Skip-DiT (arXiv:2411.17616).

A layer is a spatial and a temporal block. Layer i < num_skips hands its output to layer L-1-i, which merges it before
it runs. num_skips = 0 is Latte, L/2 is Skip-DiT. Letters: B batch, F frames, T tokens of a frame, D width, L layers.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import UserError
from models.checkpoint import StrictHubMixin
from models.layers import (
    Block,
    FinalLayer,
    FP32LayerNorm,
    LabelEmbedder,
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
        mlp_ratio: hidden width of a block's MLP over D.
        num_frames: frames of a clip; frames past them are stills (joint image-video training).
        class_dropout_prob: above 0 there is a null label, `num_classes`. Labels are dropped by the caller.
        num_classes: None for a model without class condition.
        learn_sigma: 2 x in_channels outputs, the second half being the variance.
        num_skips: long skip branches, 0 ... L / 2.
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
        if depth % 4:
            raise UserError(f"depth: {depth} is not a multiple of 4 (a layer is two blocks, a skip joins two layers)")
        if not 0 <= num_skips <= depth // 4:
            raise UserError(f"num_skips: {num_skips} is outside 0 ... {depth // 4}, a quarter of depth = {depth}")
        if input_size % patch_size:
            raise UserError(f"patch_size: {patch_size} does not divide the latents' size {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size: {hidden_size} is not a multiple of num_heads = {num_heads} and of 4")
        self.num_frames, self.num_classes, self.num_skips = num_frames, num_classes, num_skips
        self.in_channels, self.out_channels = in_channels, in_channels * 2 if learn_sigma else in_channels
        self.input_size, self.patch_size, self.num_layers = input_size, patch_size, depth // 2
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = None
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.skip_norms = nn.ModuleList(
            FP32LayerNorm(2 * hidden_size, eps=1e-6) for _ in range(num_skips)
        )  # 0: the innermost
        self.skip_linears = nn.ModuleList(SkipLinear(hidden_size) for _ in range(num_skips))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

        # Fixed tables, but part of every checkpoint.
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid)[None].float(), requires_grad=False)
        frames = torch.arange(num_frames)
        self.temp_embed = nn.Parameter(sincos_1d(hidden_size, frames)[None].float(), requires_grad=False)
        self.init_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, y_image: Tensor | None = None) -> Tensor:
        """The model's prediction for noisy latents.

        Args:
            x: (B, F, C, H, W); frames past `num_frames` are stills.
            t: (B,) original timesteps, 0 ... 999.
            y: (B,) labels, already dropped; None for a model without class condition.
            y_image: (B, F - num_frames) labels of the stills.

        Returns:
            (B, F, 2C, H, W), or C channels without `learn_sigma`.
        """
        x, c = self.embed(x, t, y, y_image)  # (B, F, T, D), (B, 1 or F, D)
        x = self.run(range(self.num_layers), x, c, skips=[])  # (B, F, T, D)
        return self.unembed(x, c)  # (B, F, 2C, H, W)

    def embed(self, x: Tensor, t: Tensor, y: Tensor | None = None, y_image: Tensor | None = None):
        """Latents to tokens (B, F, T, D), and the conditioning: a row a sample, or one a frame where stills differ."""
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
        """Run `layers` on x (B, F, T, D). `skips` is a stack: first layers push, last ones pop."""
        for i in layers:
            x = self.merge(i, x, skips)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.layer, i, x, c, use_reentrant=False, preserve_rng_state=False)  # none is drawn
            else:
                x = self.layer(i, x, c)
            if i < self.num_skips:
                skips.append(x)
        return x

    def merge(self, i: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        """What enters layer i: x (B, F, T, D), with the newest of `skips` merged in where a skip branch ends."""
        branch = i - (self.num_layers - self.num_skips)  # 0: the innermost
        if branch < 0:
            return x
        # The innermost merge of a model with L/2 skips gets its own input twice: it was trained so.
        return self.skip_linears[branch](self.skip_norms[branch](torch.cat([x, skips.pop()], dim=-1)))

    def layer(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        """Layer i on x (B, F, T, D): attention within each frame, then along time at each place of the clip."""
        spatial, temporal = self.blocks[2 * i], self.blocks[2 * i + 1]
        x = spatial(x, c)
        clip, stills = x[:, : self.num_frames], x[:, self.num_frames :]
        if i == 0:
            clip = clip + self.temp_embed[:, :, None]  # (1, F, 1, D)
        # Contiguous, or every norm and sum of the block would copy, or stride through, its input.
        clip = temporal(clip.transpose(1, 2).contiguous(), c[:, :1]).transpose(1, 2)  # (B, T, F, D) inside
        return torch.cat([clip, stills], dim=1) if stills.shape[1] else clip.contiguous()

    def unembed(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, F, T, D) to (B, F, 2C, H, W)."""
        p, size = self.patch_size, self.input_size // self.patch_size
        x = self.final_layer(x, c)
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=size, w=size, p=p, q=p)

    def set_attention(self, mode: str) -> None:
        """`sdpa` (torch's fused kernel) or `math` (plain products); see hardware.fastest_attention."""
        for block in self.blocks:
            block.attn.fused_attn = mode == "sdpa"

    def init_weights(self) -> None:
        """adaLN-zero: every block starts as the identity and the output as zero; Xavier elsewhere."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a linear layer over a patch
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


@torch.no_grad()
def init_skips_as_identity(model: Latte, x: Tensor, t: Tensor, y: Tensor | None = None) -> None:
    """Let each skip branch pass its input on, for a trunk that was trained without skips.

    A merge is LayerNorm, then Linear, on [x, skip]. The linear layer becomes s [I, 0] with the s that restores, in the
    least-squares sense, the scale that the norm takes away; it is measured on one forward of x (B, F, C, H, W), t, y,
    from the innermost merge outwards, each seeing those before it in place.
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
