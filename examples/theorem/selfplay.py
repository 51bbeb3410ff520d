"""Self-play on known distributions: its objective summed over all pairs, and three ways to act on it.

The losses are the package's own. Log-probabilities of all responses are [prompts, responses],
float64; policy and opponent are given by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from distribution import NUM_PROMPTS, response_logps
from torch import Tensor

from nemo_spin.objective.losses import Loss, PairLogps, margin


def all_margins(policy: Tensor, opponent: Tensor, beta: float) -> Tensor:
    """[prompts, real responses, generated responses]: the margin of every pair there is."""
    shape = (*policy.shape, policy.shape[1])
    return margin(
        PairLogps(
            policy_real=policy[:, :, None].expand(shape),
            policy_generated=policy[:, None, :].expand(shape),
            opponent_real=opponent[:, :, None].expand(shape),
            opponent_generated=opponent[:, None, :].expand(shape),
        ),
        beta,
    )


def pair_weights(data: Tensor, opponent: Tensor) -> Tensor:
    """p_data(y|x) p_t(y'|x) / prompts, of every pair."""
    return (data[:, :, None] + opponent[:, None, :]).exp() / NUM_PROMPTS


def full_sum(policy: Tensor, opponent: Tensor, data: Tensor, *, loss: Loss, beta: float) -> Tensor:
    """The objective without sampling: eq. (4.7) of arXiv 2401.01335, every expectation a sum."""
    return (pair_weights(data, opponent) * loss(all_margins(policy, opponent, beta))).sum()


def closed_form(opponent: Tensor, data: Tensor, exponent: float) -> Tensor:
    """p proportional to p_t (p_data / p_t)^exponent."""
    return (opponent + exponent * (data - opponent)).log_softmax(dim=1)


def optimum(opponent: Tensor, data: Tensor, *, loss: Loss, beta: float, steps: int = 200) -> Tensor:
    """The policy that minimises `full_sum`, among all there are: Newton's method on one logit per response.

    The objective is convex in those logits. Steps are halved until it falls.
    """
    policy, weights = opponent, pair_weights(data, opponent)
    for _ in range(steps):
        margins = all_margins(policy, opponent, beta).requires_grad_()
        losses = loss(margins)
        (slope,) = torch.autograd.grad(losses.sum(), margins, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), margins)
        slope, curvature = beta * weights * slope.detach(), beta**2 * weights * curvature
        gradient = slope.sum(dim=2) - slope.sum(dim=1)
        both = curvature + curvature.mT
        hessian = torch.diag_embed(both.sum(dim=2)) - both
        direction = -_solve(hessian, gradient)
        expected = float((gradient * direction).sum())
        before, length = float((weights * losses.detach()).sum()), 1.0
        if -expected < 1e-28:
            break
        while length > 1e-6:
            moved = (policy + length * direction).log_softmax(dim=1)
            if float((weights * loss(all_margins(moved, opponent, beta))).sum()) < before:
                break
            length /= 2
        else:
            break  # no number below is left to fall to: the end, to rounding
        policy = moved
    return policy


def _solve(hessian: Tensor, gradient: Tensor) -> Tensor:
    """hessian^-1 gradient, for the logits' common shift is free and rows differ by many powers of ten."""
    scale = hessian.diagonal(dim1=1, dim2=2).clamp(min=1e-300).rsqrt()
    scaled = scale[:, :, None] * hessian * scale[:, None, :]
    scaled = scaled + 1e-13 * torch.eye(hessian.shape[1], dtype=hessian.dtype)
    return scale * torch.linalg.solve(scaled, scale * gradient)


def optimised_table(table: Tensor, data: Tensor, *, loss: Loss, beta: float) -> Tensor:
    """`optimum` once more, on the table itself and by autograd alone (L-BFGS): the independent check."""
    opponent = response_logps(table).detach()
    table = table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = full_sum(response_logps(table), opponent, data, loss=loss, beta=beta)
        value.backward()
        return value

    optimizer.step(closure)
    return response_logps(table).detach()


def early_stopped(
    table: Tensor, data: Tensor, *, loss: Loss, beta: float, lr: float = 0.002, steps: int = 20
) -> Tensor:
    """The table after a few RMSProp steps against the policy that it holds now."""
    opponent = response_logps(table).detach()
    table = table.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([table], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        full_sum(response_logps(table), opponent, data, loss=loss, beta=beta).backward()
        optimizer.step()
    return table.detach()


def play(start: Tensor, iterate: Callable[[Tensor], Tensor], iterations: int) -> Iterator[Tensor]:
    """theta_0, theta_1, …: each the answer of `iterate` to the one before."""
    for _ in range(iterations + 1):
        yield start
        start = iterate(start)


def starting_gradient(table: Tensor, opponent: Tensor, data: Tensor, *, loss: Loss, beta: float) -> Tensor:
    """Gradient of `full_sum` by the table."""
    table = table.clone().requires_grad_()
    value = full_sum(response_logps(table), opponent, data, loss=loss, beta=beta)
    return torch.autograd.grad(value, table)[0]


def sft_gradient(table: Tensor, data: Tensor) -> Tensor:
    """Gradient of the cross-entropy of p_data by the table."""
    table = table.clone().requires_grad_()
    logps = response_logps(table)
    return torch.autograd.grad(-(data.exp() * logps).sum() / NUM_PROMPTS, table)[0]


def generation_noise(
    table: Tensor,
    data: Tensor,
    num_generations: int,
    *,
    loss: Loss,
    beta: float,
    generator: torch.Generator,
    num_real: int = 256,
    draws: int = 200,
) -> tuple[float, float]:
    """How sampled gradients at the start of an iteration differ from what they estimate.

    Real responses are drawn once; then, again and again, `num_generations` answers of the
    policy to each of their prompts. The expected gradient is -l'(0) beta times the plain
    fine-tuning gradient of those real responses, whatever is generated.

    Returns:
        Root mean square distance to it, as a share of its length; and the mean cosine to it.
    """
    opponent = response_logps(table).detach()
    prompts = torch.randint(NUM_PROMPTS, (num_real,), generator=generator)
    real = torch.multinomial(data.exp()[prompts], 1, generator=generator)
    table = table.clone().requires_grad_()
    logps = response_logps(table)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(zero).sum(), zero)
    sft = torch.autograd.grad(-logps[prompts[:, None], real].mean(), table, retain_graph=True)[0]
    expected = -float(slope) * beta * sft
    distances, cosines = [], []
    for _ in range(draws):
        generated = torch.multinomial(
            opponent.exp()[prompts], num_generations, replacement=True, generator=generator
        )
        rows = prompts[:, None]
        both = (logps[rows, real], logps[rows, generated], opponent[rows, real], opponent[rows, generated])
        pairs = PairLogps(*torch.broadcast_tensors(*both))
        (found,) = torch.autograd.grad(loss(margin(pairs, beta)).mean(), table, retain_graph=True)
        distances.append((found - expected).square().sum())
        cosines.append((found * expected).sum() / (found.norm() * expected.norm()))
    noise = torch.stack(distances).mean().sqrt() / expected.norm()
    return float(noise), float(torch.stack(cosines).mean())
