"""The benchmarks compare ways of computing one function."""

import torch

from configs import SampleConfig, TrainConfig, load_config
from models import get_models
from tools import benchmark_training
from tools.benchmark import as_original, benchmark

TINY = ["model=Latte-skip", "num_classes=5", "image_size=32", "hidden_size=32", "num_heads=2", "depth=8"]


@torch.no_grad()
def test_the_original_way_computes_the_same_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = get_models(load_config(SampleConfig, None, TINY)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_attention("math")
    x, t, y = torch.randn(2, 16, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 5])
    ours = model(x, t, y)
    torch.testing.assert_close(as_original(model, x, t, y), ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x, t, y), ours)


def test_report_has_every_way_and_its_share_of_the_matmul_rate(capsys):
    report = benchmark(load_config(SampleConfig, None, TINY), runs=1, batch=1)
    assert {"original, fp32", "fp32", "fp32, cached"} <= set(report["ways"])
    assert all(way["share_of_matmul_rate"] > 0 and way["seconds"] > 0 for way in report["ways"].values())
    assert "matmul rate in float32" in capsys.readouterr().out


def test_training_report_has_every_way_and_checkpointing_needs_less_memory(capsys):
    report = benchmark_training.benchmark(load_config(TrainConfig, None, [*TINY, "local_batch_size=2"]), runs=1)
    ways = report["ways"]
    assert {"original, fp32", "fp32", "fp32, checkpointing"} <= set(ways)
    assert ways["fp32, checkpointing"]["peak_bytes"] < 0.7 * ways["fp32"]["peak_bytes"]
    assert ways["original, fp32"]["speedup"] == 1 and all(way["seconds"] > 0 for way in ways.values())
    assert "2 x (16, 4, 4, 4) latents" in capsys.readouterr().out


def test_peak_counts_what_a_step_holds_at_once():
    def step() -> None:
        a = torch.zeros(1000)  # 4 kB
        b = a + 1
        del a
        b + 1

    assert 8000 <= benchmark_training.peak_bytes(torch.device("cpu"), step) < 8100
