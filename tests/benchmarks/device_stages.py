"""What the device benchmark measures, a function a stage: each imports what it needs, and reports as it goes."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avsep.objects import AUDIOSET_23
from tests.benchmarks import measure

_PEAKS = {  # dense FLOP/s in bfloat16 (T4: in float16) by the vendor's data sheets; the first name that occurs counts
    "H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12,
}  # fmt: skip
_CLIPS, _EPOCHS = 180_477, 140  # AudioSet's clips with our objects; epochs as published
_IN_FLIGHT, _TOGETHER = 4, 16  # clips that an extracting worker, requests that the service has done at once


@dataclass
class Report:
    """A stage's figures, written whenever there is a new one, so that they outlive the process."""

    path: Path
    device: str  # cuda or cpu
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def small(self) -> bool:
        """Whether it is only to be shown that it runs."""
        return self.device == "cpu"

    def add(self, what: str, unit: str, ours: float, beside: Mapping[str, float] | None = None, **more: Any) -> None:
        """Add a figure, with the others' beside it and how many times theirs it is."""
        others = {name: {"value": value, "ratio": ours / value} for name, value in (beside or {}).items()}
        self.figures.append({"what": what, "unit": unit, "value": ours, "beside": others, **more})
        self.write()

    def rates(self, what: str, n: float, sides: Mapping[str, Callable[[], Any]], unit: str = "clips/s") -> None:
        """Time sides that each do `n` of something, ours first, and add their rates."""
        ours, *others = (n / seconds for seconds in self.times(sides).values())
        self.add(what, unit, ours, dict(zip(list(sides)[1:], others, strict=True)))

    def times(self, sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Time sides in turns after one that warms up, on one core of the CPU; the best of each, in seconds."""
        waiting = {name: self._waiting(run) for name, run in sides.items()}
        return measure.compare(lambda: waiting, 1 if self.small else 3)

    def _waiting(self, run: Callable[[], Any]) -> Callable[[], None]:
        import torch

        def wait() -> None:
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()  # what was begun isn't done

        return wait

    def write(self, reason: str = "") -> None:
        """Write the figures, and why there are no more."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"figures": self.figures, "reason": reason}))
        part.replace(self.path)


def product_rate(report: Report) -> float:
    """Return FLOP/s of a product of large bfloat16 matrices."""
    import torch

    size = 512 if report.small else 8192
    a, b = (torch.randn(size, size, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    return 4 * 2 * size**3 / report.times({"": lambda: [a @ b for _ in range(4)]})[""]


def peak(report: Report) -> tuple[float, str]:
    """Return FLOP/s that a device can do at most, and by what: its data sheet, else a product of large matrices."""
    import torch

    name = "" if report.small else torch.cuda.get_device_name()
    for known, flops in _PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return flops, f"data sheet of the {known}"
    return product_rate(report), "measured in bfloat16"


def sounds(n_clips: int, report: Report) -> list[Any]:
    """Play a few notes in each clip, other ones in every one, over a little noise, `(S,)` each."""
    import numpy as np

    rng, t = np.random.default_rng(0), np.arange(48_000 * (2 if report.small else 10), dtype=np.float32) / 48_000
    clips = []
    for _ in range(n_clips):
        clip = 0.01 * rng.standard_normal(len(t), dtype=np.float32)
        for pitch, rhythm in zip(rng.uniform(100, 2000, 4), rng.uniform(0.5, 3, 4), strict=True):
            swell = np.clip(np.sin(2 * np.pi * rhythm * t), 0, 1)
            clip += swell * sum(np.sin(2 * np.pi * pitch * k * t) / (20 * k) for k in (1, 2, 3))
        clips.append(clip.astype(np.float32))
    return clips


def pictures() -> Any:
    """Ten pictures of a clip, 256 pixels high, `(10, 256, 455, 3)`."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (10, 256, 455, 3), np.uint8)


def networks(architecture: str, device: str) -> tuple[Any, Any]:
    """Return a labeller on a device, and the bare network as plain torch has it; their weights are random."""
    import torch

    from avsep.vision import ImageLabeller, build_network

    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(build_network(architecture, 1000).eval().to(device))
    return ImageLabeller(architecture, pair[0], "", None, device), pair[1]


def plain_logits(network: Any, crops: Any, label: Any, *, autocast: bool = False) -> Any:
    """Classify pictures as torchvision's manual says, in one batch; logits on the CPU."""
    import torch
    from torchvision.transforms.functional import normalize

    x = torch.from_numpy(crops).to(label.device).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode(), torch.autocast(label.device, torch.bfloat16, enabled=autocast):
        return network(normalize(x, label.preprocessing.mean, label.preprocessing.std)).float().cpu()


def plain_factors(waveforms: Sequence[Any], config: Any, device: str) -> list[Any]:
    """Factorise waveforms of one length with multiplicative updates in plain float32 torch; factors on the CPU."""
    import numpy as np
    import torch

    from tests.benchmarks import nmf as peers

    V = config.stft(torch.from_numpy(np.stack(waveforms)).to(device)).abs()
    W0 = torch.rand(len(V), V.shape[1], config.n_bases, device=device)
    H0 = torch.rand(len(V), config.n_bases, V.shape[2], device=device)
    return [x.cpu() for x in peers.plain_torch(V, W0, H0, config.n_iter)]


# ------------------------------------------------------------------------------------------- the stages


def machine(report: Report) -> None:
    """Say what the device is."""
    import os

    import torch

    more: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count()}
    if not report.small:
        free, whole = torch.cuda.mem_get_info()
        more |= {"gpu": torch.cuda.get_device_name(), "memory_gb": whole / 1e9, "free_gb": free / 1e9}
    report.add("a product of large bfloat16 matrices", "TFLOP/s", product_rate(report) / 1e12, **more)


def nmf(report: Report) -> None:
    """Factorise clips in the pipeline's batches, from waveforms to factors on the CPU, and in a large batch."""
    import importlib.util

    import torch

    from avsep import nmf, stages
    from tests.benchmarks import nmf as peers

    device, config = report.device, stages.ExtractionConfig(n_iter=10 if report.small else 200)
    for n in (2,) if report.small else (_IN_FLIGHT, 3 * _TOGETHER):
        waveforms = sounds(n, report)
        sides = {
            "avsep": lambda w=waveforms: stages.factorize_clips(w, range(len(w)), config, device),
            "plain torch, float32": lambda w=waveforms: plain_factors(w, config, device),
        }
        report.rates(f"{n} clips at once, with STFT and copies", n, sides)
    there = stages.factorize_clips(waveforms[:4], range(len(waveforms[:4])), config, device)
    pairs = [(a, stages.factorize(w, i, config)) for i, (w, a) in enumerate(zip(waveforms, there, strict=False))]
    ratios = [a.kl_divergence / b.kl_divergence for a, b in pairs]
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1))
    bases = max(float((a.W - b.W).abs().max()) for a, b in pairs)
    report.add("divergence beside the CPU's", "times", furthest, largest_difference_of_bases=bases, clips=len(pairs))
    n = 2 if report.small else 256
    V = config.stft(torch.from_numpy(waveforms[0]).to(device)).abs().expand(n, -1, -1).contiguous()
    W0, H0 = nmf.factorize(V, config.n_bases, n_iter=0)
    sides = {
        "avsep": lambda: nmf.factorize(V, config.n_bases, n_iter=config.n_iter, W0=W0, H0=H0),
        "plain torch, float32": lambda: peers.plain_torch(V, W0, H0, config.n_iter),
    }
    report.rates(f"{n} clips at once, in the device's memory", n, sides)
    if importlib.util.find_spec("torchnmf"):
        sides = {
            "avsep": lambda: nmf.factorize(V[0], config.n_bases, n_iter=config.n_iter, W0=W0[0], H0=H0[0]),
            "torchnmf": lambda: peers.with_torchnmf(V[0], W0[0], H0[0], config.n_iter),
        }
        report.rates("one clip, in the device's memory", 1, sides)


def labeller(report: Report) -> None:
    """Label clips' tiles, copies included, with the published network and with the small one."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    highest, by = peak(report)
    for architecture in ("resnet152", "efficientnet_lite0"):
        label, network = networks(architecture, report.device)
        size = label.preprocessing.size
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, size, size, device=report.device))
        clip = label.looking("tiles")(pictures()).crops
        crops = clip[:2] if report.small else np.concatenate([clip] * _IN_FLIGHT)
        sides = {
            "avsep": lambda label=label, crops=crops: label(crops),
            "plain torchvision, float32": lambda x=(network, crops, label): plain_logits(*x),
            "plain torchvision, bfloat16": lambda x=(network, crops, label): plain_logits(*x, autocast=True),
        }
        times = report.times(sides)
        rates = {side: len(crops) / len(clip) / seconds for side, seconds in times.items()}
        flops = counter.get_total_flops() * len(crops)
        report.add(
            f"{architecture}, {len(crops)} pictures at once", "clips/s", rates.pop("avsep"), rates, peak_by=by,
            share_of_peak={side: round(flops / seconds / highest, 4) for side, seconds in times.items()},
            images_a_clip=len(clip), gflop_a_picture=flops / len(crops) / 1e9,
        )  # fmt: skip
    report.rates("cutting the tiles, on one core", 1, {"avsep": lambda: label.looking("tiles")(pictures())})


def training(report: Report) -> None:
    """Train beside plain loops, then as the pipeline does, and say how long AudioSet would take."""
    from tests.benchmarks.training import network

    made = network(report.device)
    in_memory(report, 16 if report.small else 256, made)
    from_shards(report, 16 if report.small else 256, made)


def in_memory(report: Report, batch: int, made: tuple[Any, Any, Any]) -> None:
    """Train on clips in the device's memory, beside plain loops over the same and over the host's."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from avsep.learning.bags import Bags, shuffled_batches
    from avsep.learning.training import train_epoch
    from tests.benchmarks.training import network, plain_epoch

    device, n = report.device, 32
    if not report.small:
        n = min(16_384, int(0.3 * torch.cuda.mem_get_info()[0] / (2 * 25 * 2401)))
    bases = torch.empty(n, 25, 2401, dtype=torch.float16, device=device)
    for part in bases.split(1024):
        part.copy_(torch.rand(part.shape, device=device) ** 4)
    labels = torch.eye(23, dtype=torch.bool, device=device)[torch.arange(n, device=device) % 23]
    statistics, energy = torch.rand(n, 25, 15, device=device), torch.full((n, 25), 0.04, device=device)
    bags = Bags([str(i) for i in range(n)], bases, energy > 0, energy, labels, statistics)
    columns = bases, labels, statistics
    host = DataLoader(TensorDataset(*(x.cpu() for x in columns)), batch, shuffle=True)
    plain, loaded = network(device), network(device)

    def plain_loop() -> None:
        orders = torch.randperm(n, device=device).split(batch)
        plain_epoch(*plain[:2], ([x[rows] for x in columns] for rows in orders))

    sides = {
        "avsep": lambda: train_epoch(made[0], shuffled_batches(bags, batch, 0), *made[1:], 0),
        "plain torch, float32": plain_loop,
        "plain torch, float32, DataLoader": lambda: plain_epoch(*loaded[:2], host),
    }
    report.rates(f"an epoch of {n} clips in the device's memory", n, sides)


def from_shards(report: Report, batch: int, made: tuple[Any, Any, Any]) -> None:
    """Train as the pipeline does, on clips that it reads once and holds, and say how long AudioSet would take."""
    from avsep import shards
    from avsep.learning import bags
    from avsep.learning.training import train_epoch
    from avsep.model import LabelConfig, Labelling
    from tests.benchmarks.training import write

    n, labels = 32 if report.small else 2048, Labelling(LabelConfig(), AUDIOSET_23)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), n, hdf5=False)
        files = shards.clip_files(str(Path(folder, "clips")))
        counts = [bags.count_clips(f, labels)[0]["train"] for f in files]
        read_s = measure.seconds(lambda: [bags.bags_from_file(f, labels, "train") for f in files]) / n
        report.add("reading shards", "clips/s", 1 / read_s, clips=n)
        options: dict[str, Any] = {"held": True, "device": report.device, "buffer_clips": n // 2}
        clips = bags.TrainingClips(files, counts, labels, **options)
        times = report.times({"": lambda: train_epoch(made[0], clips.batches(batch, 0), *made[1:], 0)})
    train_s = times[""] / n
    report.add("an epoch of clips that are held after they were read", "clips/s", 1 / train_s, clips=n)
    figures = {"epoch_s": train_s * _CLIPS, "reading_s": read_s * _CLIPS}
    hours = (_EPOCHS * figures["epoch_s"] + figures["reading_s"]) / 3600
    report.add(f"extrapolated: {_EPOCHS} epochs of {_CLIPS} clips, read once", "hours", hours, **figures)


def separation(report: Report) -> None:
    """Separate one clip, where the device factorises and labels, beside one core that does all."""
    from tests.benchmarks.separation import sides

    seconds = 2 if report.small else 10
    there, here = sides(seconds, 2, report.device), sides(seconds, 2)
    for what in list(here)[: 1 if report.small else None]:
        pair = {"avsep": there[what], "one core of the CPU": here[what]}
        report.rates(f"{seconds} s of sound, {what}", 1, pair)


def request_of(report: Report) -> tuple[Any, Any, range]:
    """Return what a request is about: the separator that asks, the sound, and its factorisations' seeds."""
    from dataclasses import replace

    from tests.benchmarks.separation import separator

    made = separator()
    if report.small:
        made.extraction = replace(made.extraction, n_iter=5)
    return made, sounds(1, report)[0], range(made.config.n_factorizations)


def service(report: Report) -> None:
    """Do the device's part of requests together, as the service does where many wait, and one by one."""
    import numpy as np

    from avsep.stages import DeviceStages

    architecture, n = ("efficientnet_lite0", 2) if report.small else ("resnet152", _TOGETHER)
    label, network = networks(architecture, report.device)
    made, sound, seeds = request_of(report)
    crops = label.looking("tiles")(pictures()).crops[: 4 if report.small else None]
    stages = DeviceStages(label, report.device)

    def ours(n: int) -> None:
        stages.label(np.concatenate([crops] * n))
        stages.factorize([sound] * len(seeds) * n, [*seeds] * n, made.extraction)

    def plain() -> None:
        plain_logits(network, crops, label)
        plain_factors([sound] * len(seeds), made.extraction, report.device)

    sides = {
        "avsep": lambda: ours(n),
        "avsep, one by one": lambda: [ours(1) for _ in range(n)],
        "plain torch, float32, one by one": lambda: [plain() for _ in range(n)],
    }
    report.rates(f"{n} requests' pictures and sounds together", n, sides, "requests/s")


def queue(report: Report) -> None:
    """Have many requests wait for the service's device process on Ray Serve, which does them in batches."""
    import hashlib

    from ray import serve as ray_serve

    from avsep.model import LABELLER_FILE
    from avsep.service.config import ServiceConfig
    from pipelines import runners, serve

    architecture, n = ("efficientnet_lite0", 4) if report.small else ("resnet152", 64)
    (made, sound, seeds), (label, _) = request_of(report), networks(architecture, "cpu")
    crops = label.looking("tiles")(pictures()).crops
    options = {"num_cpus": 0, "num_gpus": 0 if report.small else 1}
    process = ray_serve.deployment(serve.OnDevice, max_ongoing_requests=200, ray_actor_options=options)
    with tempfile.TemporaryDirectory() as folder, runners.session():
        made.model.save(folder)
        label.save(Path(folder, LABELLER_FILE))
        sha256 = hashlib.sha256(Path(folder, LABELLER_FILE).read_bytes()).hexdigest()
        ray_serve.start(proxy_location="Disabled")
        device = ray_serve.run(process.bind(ServiceConfig(folder)), name="device", route_prefix=None)

        def ask(n: int) -> None:
            asked = []
            for _ in range(n):
                asked.append(device.label.remote(crops, sha256))
                asked.append(device.factorize.remote([sound] * len(seeds), list(seeds), made.extraction))
            for answer in [r.result() for r in asked]:
                if answer is None or isinstance(answer, Exception):
                    raise RuntimeError(f"the device process answered {answer!r}")

        sides = {f"{n} at once": lambda: ask(n), "one by one": lambda: [ask(1) for _ in range(4)]}
        times = report.times(sides)
        sizes = {stage: dict(counts) for stage, counts in device.batch_sizes.remote().result().items()}
        rates = n / times[f"{n} at once"], {"one by one": 4 / times["one by one"]}
        report.add(f"{n} requests at once through Ray Serve", "requests/s", *rates, batches_by_size=sizes)
        ray_serve.shutdown()


STAGES = {f.__name__: f for f in (machine, nmf, labeller, training, separation, service, queue)}
