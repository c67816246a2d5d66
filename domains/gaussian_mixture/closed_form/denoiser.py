"""The exact denoiser of a mixture, and a residual network that lets it leave the mixtures."""

import torch
from torch import Tensor, nn

from domains.gaussian_mixture.closed_form.mixture import Mixture
from lit_rlft.core.block_checkpointing import BlockCheckpointing
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.state import expand_as

__all__ = ["GaussianMixtureDenoiser", "Residual"]


class GaussianMixtureDenoiser(nn.Module, BlockCheckpointing):
    r"""The posterior mean of a Gaussian mixture, plus a residual network that starts at zero.

    With :math:`v_k = \alpha_t^2 s_k^2 + \sigma_t^2` and responsibilities
    :math:`\rho_k \propto w_k N(x_t; \alpha_t m_k, v_k I)`,

    .. math::
        E[x_0 \mid x_t] = \sum_k \frac{\rho_k}{v_k} (\sigma_t^2 m_k + \alpha_t s_k^2 x_t), \qquad
        E[\epsilon \mid x_t] = \sigma_t \sum_k \frac{\rho_k}{v_k} (x_t - \alpha_t m_k),

    converted to the prediction type of the process. Logits of w, means and log s are parameters,
    so full fine-tuning without a residual moves from mixture to mixture.

    Args:
        mixture: The distribution of the data, which is denoised exactly.
        process: The noising process that predictions are made for.
        residual_width: Hidden units of the residual network; 0 leaves it out.
    """

    def __init__(
        self, mixture: Mixture, process: GaussianProcess, residual_width: int = 64
    ) -> None:
        super().__init__()
        self.process = process
        self.logits = nn.Parameter(mixture.weights.log().float())
        self.means = nn.Parameter(mixture.means.float())
        self.log_stds = nn.Parameter(mixture.stds.log().float())
        dims = mixture.means.shape[1]
        self.residual = Residual(dims, residual_width) if residual_width else None

    @property
    def mixture(self) -> Mixture:
        """The mixture that the parameters stand for, detached."""
        logits, log_stds = self.logits.detach(), self.log_stds.detach()
        return Mixture(logits.softmax(dim=0), self.means.detach(), log_stds.exp())

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction for x_t [B, d] at times t [B]."""
        x_0, eps = self.run(self.posterior_means, x_t, t)
        prediction = self.process.prediction(x_0, eps, t)
        if self.residual is None:
            return prediction
        return prediction + self.run(self.residual, x_t, t)

    def posterior_means(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x_0 | x_t] and E[eps | x_t] of the mixture; no level divides by zero."""
        schedule = self.process.schedule
        alpha, sigma = (expand_as(c, x_t) for c in (schedule.alpha(t), schedule.sigma(t)))
        data = (2 * self.log_stds).exp()
        variance = alpha**2 * data + sigma**2  # [B, K]
        offset = x_t.unsqueeze(1) - alpha.unsqueeze(-1) * self.means  # [B, K, d]
        dims = x_t.shape[1]
        log_normal = -0.5 * (offset.square().sum(dim=-1) / variance + dims * variance.log())
        pull = (self.logits + log_normal).softmax(dim=1) / variance
        x_0 = sigma**2 * (pull @ self.means) + alpha * (pull @ data).unsqueeze(1) * x_t
        eps = sigma * (pull.sum(dim=1, keepdim=True) * x_t - alpha * (pull @ self.means))
        return x_0, eps


class Residual(nn.Module):
    """A small network on (x_t, t) whose output layer is zero at the start.

    Hidden weights come from a fixed seed: two pipelines of one config are the same model.

    Args:
        dims: d, the dimensions of x_t.
        width: Units of the two hidden layers.
    """

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims + 4, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, dims)
        generator = torch.Generator().manual_seed(0)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.normal_(layer.bias, std=1.0, generator=generator)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the residual of the prediction, [B, d]."""
        clock = torch.stack([torch.cos(torch.pi * k * t) for k in range(1, 5)], dim=1)
        hidden = torch.nn.functional.silu(self.fc1(torch.cat([x_t, clock.to(x_t)], dim=1)))
        return self.fc3(torch.nn.functional.silu(self.fc2(hidden)))
