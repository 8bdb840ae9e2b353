"""The options of tools/calibrate.py."""

from dataclasses import dataclass

from configs import SampleConfig, option


@dataclass(kw_only=True)
class CalibrateConfig(SampleConfig):
    """The calibration."""

    budgets: list[float] = option(
        lambda: [0.43, 0.475, 0.65], "shares of the MACs of the options' sampler", above=0, most=1
    )
    min_psnr: float | None = option(
        None, "in place of budgets: the PSNR in dB that the recipe shall have on the calibration seeds", above=0
    )
    target: str = option("twin", "the clips to lead to, see above", choices=("twin", "converged", "ddpm-250"))
    num_calibration: int = option(14, "seeds that all is chosen on", least=2)
    calibration_seed: int = option(20000, "the first of them", least=0)
    num_clips: int = option(28, "held-out seeds that the report is on", least=2)
    held_out_seed: int = option(30000, "the first of them", least=0)
    num_climbs: int = option(4, "steps of hill climbing from each of the best two candidates", least=0)
    output: str = option("results/calibrate", "the folder to write", path=True)
