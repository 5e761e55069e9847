"""Processes that train with plain batch norm, one each, under DistributedDataParallel: what norm_groups stands for.

Apart from the tests, so that a process imports PyTorch alone.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

EACH, STEPS, CLASSES = 3, 3, 5
RATES = (0.05, 0.5)  # of the backbone and of the classifier


class Net(nn.Module):
    """A stem, a block with a shortcut, and a classifier, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.flat = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, images):
        x = self.backbone(images)
        return self.head(self.flat((x + self.more(x)).relu().mean((2, 3))))


def batches(world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches whose groups' statistics are far apart: the images differ in brightness and contrast."""
    generator = torch.Generator().manual_seed(1)
    count = world_size * EACH
    images = torch.randn(STEPS, count, 3, 8, 8, generator=generator, dtype=torch.float64)
    images *= torch.linspace(0.2, 3, count)[:, None, None, None]
    images += torch.arange(count)[:, None, None, None]
    return list(zip(images, torch.randint(CLASSES, images.shape[:2], generator=generator), strict=True))


def optimizer_of(net: Net) -> torch.optim.SGD:
    rest = [p for name, p in net.named_parameters() if not name.startswith("head")]
    groups = [{"params": net.head.parameters(), "lr": RATES[1]}, {"params": rest, "lr": RATES[0]}]
    return torch.optim.SGD(groups, 0, momentum=0.9)


def trained(net: Net, model: nn.Module, world_size: int, own: slice) -> dict[str, torch.Tensor]:
    """The state after three steps on a process' own images of each batch, and the last step's gradients and loss."""
    optimizer = optimizer_of(net)
    for images, labels in batches(world_size):
        loss = cross_entropy(model(images[own]), labels[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return found | {f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters()} | {"loss": loss}


def process(rank: int, world_size: int, folder: str) -> None:
    """One of the published code's processes: plain batch norm under DistributedDataParallel with its defaults."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    net = Net()
    found = trained(net, DistributedDataParallel(net), world_size, slice(rank * EACH, (rank + 1) * EACH))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
