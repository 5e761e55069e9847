"""Backbones by name, stems, projector, and their errors."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from timm.models.resnet import BasicBlock
from torch import nn

from pipeline.errors import UserError
from tests.test_config import parse
from train.batchnorm import CrossRankBatchNorm, with_global_batch_norm
from train.cards import PRESETS
from train.flags import resolved
from train.methods.choose import make_method
from train.model import NARROW, make_backbone, make_projector


def test_resnet_has_torchvisions_names_and_zero_initialized_residuals():
    backbone, features = make_backbone("resnet50")
    theirs = torchvision.models.resnet50().state_dict()
    assert {n: w.shape for n, w in backbone.state_dict().items()} == {
        n: w.shape for n, w in theirs.items() if not n.startswith("fc.")
    }
    assert features == 2048
    assert all((block.bn3.weight == 0).all() for block in backbone.layer1)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("small", 4), ("solo-learn", 5)])
def test_stems(stem, side):
    backbone, features = make_backbone("resnet18", stem)
    seen = []
    backbone.layer4.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, features) == (2, 512)
    assert seen[0] == (2, 512, side, side)


def test_solo_learns_network_is_theirs():
    """solo/methods/base.py, lines 193 to 203, around torchvision's resnet18: the maps and a seed's weights."""
    torch.manual_seed(3)
    ours, _ = make_backbone("resnet18", "solo-learn")
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18()
    theirs.fc, theirs.maxpool = nn.Identity(), nn.Identity()
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())
    assert all((block.bn2.weight == 1).all() for block in ours.layer1), "no batch norm starts at zero"
    sides = []
    for layer in (ours.conv1, ours.layer2, ours.layer3, ours.layer4):
        layer.register_forward_hook(lambda module, given, out: sides.append(out.shape[-1]))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images)) and sides == [34, 17, 9, 5]
    assert parse("--preset", "cifar10", "--stem", "solo-learn").stem == "solo-learn"


@pytest.mark.parametrize("arch", ["test_resnet", "mobilenetv3_small_050"])
def test_timm_models_tell_their_feature_dimension(arch):
    backbone, features = make_backbone(arch)
    assert backbone.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, features)


@pytest.mark.parametrize("arch", NARROW)
def test_a_narrow_resnet_is_timms_of_these_widths(arch):
    """Put together from timm's parts: the same names, the same features, the last batch norm of each block at zero."""
    ours, features = make_backbone(arch)
    widths = NARROW[arch]
    four = (*widths, 1)[:4]  # timm's have four stages
    theirs = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=four)
    theirs.conv1 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
    theirs.bn1, theirs.maxpool = nn.BatchNorm2d(widths[0]), nn.Identity()
    theirs.layer1 = nn.Sequential(BasicBlock(widths[0], widths[0]))
    if len(widths) == 3:
        theirs.layer4 = nn.Identity()
    assert not any(weight.any() for name, weight in ours.named_parameters() if name.endswith("bn2.weight"))
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert ours(images).shape == (4, features) and torch.allclose(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(UserError, match=r"resnet5O.*did you mean.*resnet50"):
        make_backbone("resnet5O")
    with pytest.raises(UserError, match="did you mean resnet8_narrow"):
        make_backbone("resnet8_narow")
    with pytest.raises(UserError, match="list_models"):
        make_backbone("qqqqqqqqqq")


@pytest.mark.parametrize("arch", ["test_resnet", *NARROW])
def test_small_stem_is_for_torchvisions_resnets(arch):
    with pytest.raises(UserError, match=f"--stem small .* not for {arch}; pass --stem imagenet"):
        make_backbone(arch, "small")


def test_projector_layers():
    projector = make_projector(2048, [8192, 4096, 128])
    kinds = [type(layer) for layer in projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in projector[::3]] == [(8192, 2048), (4096, 8192), (128, 4096)]
    assert all(layer.bias is None for layer in projector[::3])


@pytest.mark.parametrize(("theirs", "shape"), [(nn.BatchNorm2d(6), (5, 6, 3, 4)), (nn.BatchNorm1d(6), (5, 6))])
def test_our_batch_norm_is_torchs_at_world_size_1(theirs, shape):
    torch.manual_seed(0)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    theirs = theirs.double()
    ours = CrossRankBatchNorm(6).double()
    ours.load_state_dict(theirs.state_dict())
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    for training in (True, True, False):
        out, expected = ours.train(training)(x), theirs.train(training)(y)
        torch.testing.assert_close(out, expected)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_one_process_keeps_torchs_batch_norm():
    backbone, _ = make_backbone("resnet18")
    assert with_global_batch_norm(backbone) is backbone
    assert not any(isinstance(m, CrossRankBatchNorm) for m in backbone.modules())


def test_timms_batch_norm_keeps_its_activation(monkeypatch):
    plain, _ = make_backbone("test_efficientnet")
    ours = copy.deepcopy(plain)
    with monkeypatch.context() as patch:
        patch.setattr("train.batchnorm.world_size", lambda: 2)
        with_global_batch_norm(ours)
    assert sum(isinstance(m, CrossRankBatchNorm) for m in ours.modules()) > 10
    assert list(ours.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-4)  # here one rank is all there are


def test_foreign_batch_norm_on_several_ranks(monkeypatch):
    monkeypatch.setattr("train.batchnorm.world_size", lambda: 2)
    with pytest.raises(UserError, match="BatchNorm3d has no form here that sees all ranks"):
        with_global_batch_norm(nn.Sequential(nn.BatchNorm3d(2)))


def test_the_type_and_the_memory_format_are_torchs():
    x = torch.randn(5, 6, 3, 4).contiguous(memory_format=torch.channels_last).bfloat16().requires_grad_()
    out, expected = CrossRankBatchNorm(6)(x), nn.BatchNorm2d(6)(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_large_mean_costs_no_digits(shift):
    """In float32, against float64: Σ x² alone would have lost the variance."""
    x = torch.randn(64, 3, dtype=torch.float64).float().double() + shift
    norm = CrossRankBatchNorm(3, affine=False)
    expected = nn.BatchNorm1d(3, affine=False).double()(x)
    torch.testing.assert_close(
        norm(x.float()).double(), expected, rtol=1e-3 if shift else 1e-5, atol=2e-3 if shift else 1e-5
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # neither is converted: see `_to`
def test_our_batch_norm_compiles_in_one_piece(dtype):
    torch._dynamo.reset()
    norm = CrossRankBatchNorm(6).to(dtype)
    x = torch.randn(5, 6, 3, 4, dtype=dtype, requires_grad=True)
    compiled = torch.compile(nn.Sequential(norm, nn.ReLU()), fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(x).square().sum().backward()
    assert norm.num_batches_tracked == 1 and x.grad.isfinite().all()
    ours = x.grad.clone()
    x.grad = None
    nn.BatchNorm2d(6).to(dtype)(x).relu().square().sum().backward()
    torch.testing.assert_close(ours, x.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("cifar10-demo")])
def test_every_part_of_a_method_has_its_own_forward(preset):
    """torch 2.11's compile() silently leaves out a module whose forward is nn.Sequential's."""
    config = resolved(replace(PRESETS[preset], run="x"))
    method = make_method(*make_backbone(config.arch, config.stem), config)
    assert all(type(part).forward is not nn.Sequential.forward for part in method.children())
