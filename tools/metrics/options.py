"""Options of the programs that measure. Importing this module is quick: it does not import torch."""

from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple

from configs import SampleConfig, option
from configs.errors import UserError, choice
from tools.metrics.protocols import PROTOCOLS


class Output(NamedTuple):
    """One output of a detector: how the detector is called for it, and the metrics that are computed from it."""

    metrics: dict[str, str]  # name -> kind, see tools/metrics/scores.py
    by_frame: bool = False
    width: int | None = None  # D of features; None: class probabilities
    options: dict[str, bool] = {}  # of the call


class Pixels(NamedTuple):
    """How a detector takes its pixels: `size` x `size`, resized (bilinear), scaled to 0 ... 1, less mean, over std."""

    size: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


class Detector(NamedTuple):
    """A network behind metrics: a TorchScript file, published or made from published weights, or our own code.

    A file is called with clips (B, 3, F, H, W), or frames (B F, 3, H, W), and returns rows (N, D).
    """

    outputs: dict[str, Output]
    url: str | None = None  # None: not published as TorchScript
    sha256: str | None = None  # None: no public source states it
    pixels: Pixels | None = None  # None: uint8, of any size
    is_file: bool = True


DETECTORS = {  # a new one is a line here: its option, metrics and checks follow from it
    # StyleGAN-V's port of FVD's Kinetics-400 I3D; SHA-256: Stability-AI/SemanTok, scripts/download_eval_models.sh
    "i3d": Detector(
        {"i3d": Output({"fvd": "frechet", "prdc": "prdc"}, width=400,
                       options=dict(rescale=True, resize=True, return_features=True))},
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    # NVIDIA's port of FID's Inception; SHA-256: crowsonkb/k-diffusion, k_diffusion/evaluation.py
    "inception": Detector(
        {"inception": Output({"fid": "frechet", "kid": "kid"}, True, 2048, dict(return_features=True)),
         "inception_classes": Output({"is": "inception_score"}, True, options=dict(no_output_bias=True))},
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    # StyleGAN-V's port of TGAN2's C3D, trained on UCF101
    "c3d": Detector(
        {"c3d_classes": Output({"video_is": "inception_score"})},
        "https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1",
    ),
    # Content-debiased FVD (arXiv:2404.12391): forward_features of VideoMAE-v2 ViT-g, vit_g_hybrid_pt_1200e_ssv2_ft.pth
    "videomae": Detector({"videomae": Output({"videomae_fvd": "frechet"}, width=1408)}, pixels=Pixels(224)),
    # JEDi (arXiv:2410.05203): V-JEPA's ViT-H/16 and the attentive pooler of its SSv2 probe
    "vjepa": Detector(
        {"vjepa": Output({"jedi": "polynomial_mmd"}, width=1280)},
        pixels=Pixels(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "proxy": Detector({"proxy": Output({"proxy": "frechet", "proxy_prdc": "prdc"}, width=80)}, is_file=False),
    "motion": Detector({"motion": Output({"flickering": "flickering", "dynamic": "dynamic"}, width=2)}, is_file=False),
}  # fmt: skip
OUTPUTS = {name: output for detector in DETECTORS.values() for name, output in detector.outputs.items()}
DETECTOR_OF = {output: name for name, detector in DETECTORS.items() for output in detector.outputs}
OUTPUT_OF = {metric: name for name, output in OUTPUTS.items() for metric in output.metrics}
KINDS = {metric: kind for output in OUTPUTS.values() for metric, kind in output.metrics.items()}
ONE_SIDED = ("inception_score", "flickering", "dynamic")  # kinds of the fakes alone

DetectorFiles = make_dataclass(
    "DetectorFiles",
    [
        (name, str | None, option(None, f"the file of {name}; empty: the published one", path=True))
        for name, detector in DETECTORS.items()
        if detector.is_file
    ],
    kw_only=True,
    namespace={"__doc__": "Detectors: TorchScript files."},
)


@dataclass(kw_only=True)
class ClipOptions:
    """How clips are cut from videos and read. What is empty is as the protocol says."""

    protocol: str = option("ours", "the settings of published scores", choices=tuple(PROTOCOLS))
    real_path: str | None = option(None, "training videos: files or folders of frames, flat or nested", path=True)
    num_real: int | None = option(None, "the largest number of real clips", least=2)
    order: str | None = option(
        None, "the clips used if there are more: a random choice, or the first by name", choices=("random", "sorted")
    )
    num_frames: int | None = option(None, "frames of a clip", least=2)
    first_frames: int | None = option(None, "only these frames (at real_fps) of a real video; 0: all", least=0)
    real_stride: int | None = option(None, "frames from one to the next of a real clip", least=1)
    real_fps: float | None = option(
        None, "frames of a real clip per second, as fps in training; real_stride is 1 then", above=0
    )
    short_clips: str | None = option(
        None, "videos below num_frames x stride, as in training; spread: used whole; skip: left out",
        choices=("spread", "skip"),
    )  # fmt: skip
    image_size: int | None = option(None, "the side of a square cut from the centre", least=1)
    resize_filter: str | None = option(
        None, "the filter that resizes to it, antialiased; lanczos crops first, as Latte, all others resize first",
        choices=("bilinear", "bicubic", "lanczos", "lanczos-first"),
    )  # fmt: skip
    jpeg: bool | None = option(None, "all frames pass through JPEG of quality 75, as files of Latte's converter")
    seed: int = option(0, "chooses the clips, and where their windows begin", least=0)
    video_reader: str = option("pyav", "see train.py", choices=("pyav", "decord"))
    max_bad_fraction: float = option(0.1, "stop if more of the videos read than this are broken", least=0, most=1)
    batch_size: int = option(8, "clips that pass a detector at once", least=1)
    num_workers: int | None = option(None, "processes that read; empty: one for each core", least=0)


@dataclass(kw_only=True)
class EvaluateConfig(ClipOptions, DetectorFiles):
    """The evaluation: metrics, samples and detectors."""

    data: str | None = option(None, "the same as real_path", path=True)
    ckpt: str | None = option(None, "a checkpoint to sample, by the options in it where generate gives none", path=True)
    metrics: str = option("fvd", f"separated by commas, of {', '.join(KINDS)}")
    fake_path: str | None = option(None, "the videos to evaluate", path=True)
    generate: str | None = option(None, "or: YAML of sampling options, sampled in memory from its seed on", path=True)
    sample: dict[str, Any] = option(dict, "changes to those options, as sample.cache.interval=2")
    num_fake: int | None = option(None, "the largest number of sampled clips", least=2)
    fake_stride: int | None = option(None, "frames from one to the next of a sampled clip", least=1)
    covariance: str | None = option(None, "what covariances are divided by", choices=("N-1", "N"))
    fid_frames: str | None = option(
        None, "real frames of FID: of the clips of other metrics, or all of all videos", choices=("clips", "all")
    )
    jackknife: int = option(
        20, "groups of clips left out in turn for an interval; 0 or 1, or fewer than 4 fakes: no interval", least=0
    )
    output: str = option(
        "results/evaluate.json", "the record to write; beside it, the card (.md, .png) and evaluations.csv", path=True
    )
    detector_path: str = option("pretrained/metrics", "the folder of the published detectors", path=True)
    feature_path: str | None = option(
        "results/features", "the folder that keeps features of real sets; null: keep none", path=True
    )

    def metric_names(self) -> list[str]:
        """The metrics asked for; raises UserError for an unknown one."""
        return [choice("metrics", name, KINDS) for name in self.metrics.split(",")]


@dataclass(kw_only=True)
class MeasureConfig(SampleConfig):
    """The measurement: seeds and real clips."""

    num_clips: int = option(64, "seeds seed, seed + 1, ...", least=4)
    real_path: str | None = option(None, "video files; empty: no distance to real clips", path=True)
    real_stride: int = option(1, "frames from one to the next of a real clip, as in training", least=1)
    real_fps: float | None = option(None, "frames of a real clip per second, as fps in training", above=0)
    short_clips: str = option(
        "skip", "real videos below num_frames x stride, as in training", choices=("spread", "skip")
    )
    fidelity: str = option(
        "ours", "metrics against twins; teacache: also PSNR by frame, SSIM and LPIPS of mp4 files (arXiv:2411.19108)",
        choices=("ours", "teacache"),
    )  # fmt: skip
    output: str = option("results/fidelity", "the folder to write", path=True)

    def check_clips(self) -> None:
        """Raises UserError if there are fewer clips than classes."""
        if self.num_clips < (self.num_classes or 0):
            raise UserError(f"num_clips: {self.num_clips} is less than {self.num_classes}, one of each class")
