"""--cuda-graph: the steps of a run without it, and where it is refused."""

import json
from dataclasses import replace

import pytest
import torch

from pipeline.errors import UserError
from tests.oracles_train import SyntheticLoader
from train.checkpoint import read_checkpoint
from train.config import PretrainConfig
from train.distributed import Ranks
from train.flags import resolved
from train.memory import with_device_defaults
from train.pretrain import EXIT_FINISHED, train
from train.recorded import ORDINARY

TINY = PretrainConfig(
    arch="resnet18", stem="small", projector="64-64", resolution=16, global_batch=16, epochs=5, warmup_epochs=1,
    lr_weights=1.0, lr_biases=0.05, lars_eta=0.02, paper_world_size=1, log_every=1, deterministic=True,
)  # fmt: skip
OWN = {
    "barlow_twins": {},
    "byol": {"preset": "imagenet-byol", "predictor": "64-64"},
    "moco_v2": {"preset": "imagenet-moco_v2", "queue": 24},  # no multiple of the batch: the ring closes within a step
    "swav": {"preset": "imagenet-swav", "prototypes": 32},  # frozen in the first epoch
}


@pytest.mark.parametrize(
    "ranks", [Ranks(0, 1, torch.device("cpu"), None), Ranks(0, 2, torch.device("cuda", 0), None)], ids=["cpu", "two"]
)
def test_only_one_gpu_records(ranks):
    with pytest.raises(UserError, match="records the step of one GPU"):
        with_device_defaults(replace(TINY, cuda_graph=True), ranks)


@pytest.mark.parametrize("flags", [{"amp": "fp16"}, {"on_nan": "skip"}])
def test_what_looks_at_numbers_within_a_step_is_refused(flags):
    with pytest.raises(UserError, match="cannot look at numbers within a step"):
        resolved(replace(TINY, cuda_graph=True, **flags))


class GpuLoader(SyntheticLoader):
    """The batches in GPU memory, the second half of the run larger, as with a --resolution-schedule."""

    def batches(self, start_step=0, stop_step=None):
        for step in range(start_step, stop_step):
            self.size_px = 16 if step < stop_step // 2 else 24
            for batch in super().batches(step, step + 1):
                views = (view.cuda().contiguous(memory_format=torch.channels_last) for view in batch.views)
                yield batch._replace(views=tuple(views), label=(batch.sample % 2).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_steps_of_a_run_without_it(tmp_path, monkeypatch, same_arithmetic, amp, method):
    """20 steps, two sizes of views: the weights of a run that starts the same kernels one by one.

    That run multiplies its learning rates where the recorded one does, in tensors: a run without --cuda-graph rounds
    them elsewhere, and bf16 makes of one last bit some per cent within 20 steps. It is compared at the first step,
    where nothing has grown yet. The linear layer steps outside the graph, on the features that a replay leaves.
    """
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)
    monkeypatch.setattr("train.pretrain.classes_beside", lambda config: 2)

    def losses_and_weights(name: str, cuda_graph: bool, ordinary: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        monkeypatch.setattr("train.recorded.ORDINARY", ordinary)
        config = replace(TINY, amp=amp, method=method, cuda_graph=cuda_graph, run=str(tmp_path / name), **OWN[method])
        assert train(resolved(config), Ranks(0, 1, torch.device("cuda", 0), None), GpuLoader(64, 16)) == EXIT_FINISHED
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        state = read_checkpoint(tmp_path / name / "checkpoint.pt")
        return [json.loads(line)["loss"] for line in lines], state["model"] | state["online_linear"]["layer"]

    recorded, weights = losses_and_weights("recorded", True, ORDINARY)
    one_by_one, expected = losses_and_weights("one by one", True, 1000)
    without, _ = losses_and_weights("without", False, ORDINARY)
    assert len(recorded) == len(without) == 20
    assert without[:2] == pytest.approx(one_by_one[:2], rel=1e-3 if amp == "off" else 2e-2)
    assert recorded == pytest.approx(one_by_one, rel=1e-3)
    for name, weight in expected.items():
        if weight.is_floating_point():
            distance = (weights[name] - weight).norm() / weight.norm().clamp(min=1)
            assert distance < 1e-3, name
        else:
            assert torch.equal(weights[name], weight), name
