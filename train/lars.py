"""LARS (You 2017) as Barlow Twins uses it (Zbontar 2021, section 2.2), without a single host sync.

For every parameter p with gradient g and momentum m:

    dp = g + weight_decay · p
    q  = eta · ‖p‖ / ‖dp‖          1 where either norm is 0, and in groups that are not adapted
    m  = momentum · m + q · dp
    p  = p − lr · m                the learning rate stays outside the momentum

A group without adaptation and weight decay is plain SGD with momentum. A step uses the gradients up: they hold
q · dp afterwards, which spares a copy of the network.
"""

import torch


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """‖t‖ of every tensor, (N,), on their device.

    On the CPU row by row: summed in one go, torch's float32 norm of an 8192 × 8192 matrix is 0.5 % too small.
    """
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors))
    rows = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim))) if t.ndim > 1 else t for t in tensors]
    return torch.stack([torch.linalg.vector_norm(row) for row in rows])


def gradient_norm(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """‖g‖ over all parameters, 0-d, before `step` uses the gradients up. Nothing is read back."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.linalg.vector_norm(norms(gradients))


class LARS(torch.optim.Optimizer):
    """Groups need `lr`; `weight_decay` (0) and `adapt` (True) may differ by group.

    `clip` makes q min(q / lr, 1), so that lr · q is never above lr: LARC's rule, as solo-learn trains on CIFAR-10.
    """

    def __init__(self, groups, *, momentum: float = 0.9, eta: float = 0.001, clip: bool = False):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "adapt": True})
        self.momentum, self.eta, self.clip = momentum, eta, clip
        self.rates: list[torch.Tensor] | None = None

    def send_rates(self) -> None:
        """From here on steps take the learning rates from tensors, which this sets to the groups' `lr`.

        For a recorded step (recorded.py): its kernels would repeat a number for ever, but read a tensor each time.
        """
        if self.rates is None:
            self.rates = [group["params"][0].new_zeros(()) for group in self.param_groups]
        for rate, group in zip(self.rates, self.param_groups, strict=True):
            rate.fill_(group["lr"])

    @torch.no_grad()
    def forget_(self, group: dict) -> None:
        """Takes a group's momentum back to 0, in place, where a recorded step reads it."""
        for p in group["params"]:
            for momentum in self.state[p].values():
                momentum.zero_()

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter that has a gradient."""
        assert closure is None, "the gradients are there already"
        rates = self.rates or [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, rates, strict=True):
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update_(parameters, group, lr)

    def _update_(self, parameters: list[torch.Tensor], group: dict, lr: float | torch.Tensor) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momentum = [self.state[p]["momentum"] for p in parameters]
        update = [p.grad for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            torch._foreach_add_(update, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(update, self._trust(parameters, update, lr))
        torch._foreach_mul_(momentum, self.momentum)
        torch._foreach_add_(momentum, update)
        if isinstance(lr, torch.Tensor):
            torch._foreach_copy_(update, momentum)  # the gradients are used up: a place for lr · m
            torch._foreach_mul_(update, lr)
            torch._foreach_sub_(parameters, update)
        else:
            torch._foreach_add_(parameters, momentum, alpha=-lr)

    def _trust(self, parameters, update, lr: float | torch.Tensor) -> list[torch.Tensor]:
        """q of every parameter, 0-d tensors on the parameters' device: nothing is read back to decide anything."""
        norm, update_norm = norms(parameters), norms(update)
        trust = self.eta * norm / update_norm
        if self.clip:
            trust = (trust / lr).clamp(max=1.0)
        trust = torch.where((norm > 0) & (update_norm > 0), trust, 1.0)
        return list(trust.unbind())
