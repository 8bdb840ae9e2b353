"""Training losses: mean squared error of the prediction, and the variational bound, which trains the variance."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusion import Diffusion


def mean_flat(x: Tensor) -> Tensor:
    """Returns the mean over all dimensions but the first: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Returns KL(N1 || N2) of Gaussians, elementwise, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2) - 1)


def normal_cdf(x: Tensor) -> Tensor:
    """Returns the standard normal's distribution function, approximated with tanh as in the original's losses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Returns the log probability, in nats, of x in [-1, 1] in bins of 2/255; Ho et al. 2020, eq. 13."""
    upper = normal_cdf((x - mean + 1 / 255) * torch.exp(-log_std))
    lower = normal_cdf((x - mean - 1 / 255) * torch.exp(-log_std))
    upper = torch.where(x > 0.999, 1.0, upper)  # the outermost bins reach to infinity
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def variational_bound(diffusion: "Diffusion", output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Returns one term of the variational bound for each sample, (B,), in bits per dimension.

    The term is L_{t-1}, or L_0 where t = 0; Ho et al. 2020, eq. 5.
    """
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    p = diffusion.interpret(output, x_t, t, clip_denoised=False)
    kl = mean_flat(normal_kl(mean, log_variance, p["mean"], p["log_variance"]))
    nll = -mean_flat(discretized_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"]))
    return torch.where(t == 0, nll, kl) / math.log(2)


def x_start_errors(
    diffusion: "Diffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    log_snrs: Sequence[float],
    model_kwargs: dict[str, Any] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Returns the mean squared error of the estimate of x_0 at each noise level, (B, K).

    It compares models whatever they are trained to predict, and by whatever process.

    Args:
        x_start: (B, ..., C, H, W) data.
        log_snrs: K values of log(alpha^2 / sigma^2).
        noise: (B, ..., C, H, W), the same at all levels; None: drawn from the global generator.
    """
    noise, errors = torch.randn_like(x_start) if noise is None else noise, []
    for log_snr in log_snrs:
        alpha, sigma, timestep = diffusion.noise_level(log_snr)
        x = alpha * x_start + sigma * noise
        t = torch.full((len(x),), timestep, device=x.device)  # (B,), real numbers
        prediction, _ = diffusion.split(model(x, t, **(model_kwargs or {})).float(), x)
        errors.append(mean_flat((diffusion.x_start(prediction, x, alpha, sigma) - x_start) ** 2))
    return torch.stack(errors, dim=1)


def min_snr_weight(diffusion: "Diffusion", t: Tensor, gamma: float) -> Tensor:
    """Returns the weights (B,) of the prediction's squared error that give x_0's error the weight min(SNR, gamma)."""
    alpha, sigma = diffusion.at(t, t)[:2]  # (B,)
    snr = (alpha / sigma) ** 2
    slope = {"eps": sigma / alpha, "x0": torch.ones_like(snr), "v": sigma}[diffusion.prediction]  # of x_0
    return snr.clamp(max=gamma) * slope**2


def training_losses(
    diffusion: "Diffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
    noise: Tensor | None = None,
    min_snr: float = 0.0,
) -> dict[str, Tensor]:
    """Returns the losses of each sample, (B,) each: "mse", "vb" if the variance is learned, and "loss", their sum.

    "mse" is the squared error of the prediction. "vb" is a term of the variational bound, in bits per dimension; its
    mean is detached, so that it trains only the variance (Nichol & Dhariwal 2021, section 3.1).

    Args:
        x_start: (B, ..., C, H, W) data.
        t: (B,) timesteps of this process.
        noise: (B, ..., C, H, W); None: drawn from the global generator.
        min_snr: gamma. Above 0, "loss" has "mse" times `min_snr_weight`; Hang et al. 2023, eq. 6.
    """
    noise = torch.randn_like(x_start) if noise is None else noise
    x_t = diffusion.q_sample(x_start, t, noise)
    output = model(x_t, diffusion.original_timesteps(t), **(model_kwargs or {})).float()  # (B, ..., C or 2C, H, W)
    prediction, variance = diffusion.split(output, x_t)
    losses = {"mse": mean_flat((diffusion.target(x_start, noise, t) - prediction) ** 2)}
    if diffusion.learn_sigma:
        frozen = torch.cat([prediction.detach(), variance], dim=-3)
        losses["vb"] = variational_bound(diffusion, frozen, x_start, x_t, t)
    total = sum(losses.values())
    if min_snr:
        total = total + (min_snr_weight(diffusion, t, min_snr) - 1) * losses["mse"]
    return {**losses, "loss": total}
