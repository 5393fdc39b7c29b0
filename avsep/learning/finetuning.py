"""Fine-tune the picture network on clips' own pictures, from weak labels, from the sound, or from both."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avsep import storage
from avsep.learning import parallel
from avsep.learning.albums import open_images, read_album
from avsep.metrics import mean_average_precision
from avsep.miml import basis_posteriors, energy_shares, partial_label_loss
from avsep.model import LABELLER_FILE, LabelConfig, Model
from avsep.objects import N_IMAGENET_CLASSES, Vocabulary, weak_labels
from avsep.records import ClipRecord, Segment
from avsep.vision import ImageLabeller, build_network

BACKGROUND = 819  # ImageNet's "stage": what a network trained from scratch answers when it sees no object
_ONE_LOOK = LabelConfig()
START_FILE, CHECKPOINT_FILE, HISTORY_FILE = "start.safetensors", "checkpoint.pt", "history.json"


@dataclass(frozen=True)
class FinetuningConfig:
    """How the picture network is trained."""

    epochs: int = 8
    learning_rate: float = 3e-4  # the highest, of one cycle
    batch_clips: int = 12
    images_a_clip: int = 5  # an epoch; others take their turn in the next
    presence: float = 3.0  # weight of finding every label in some picture
    dropout: float = 0.0  # before the last layer
    seed: int = 0


# ------------------------------------------------------------------------------------- targets


@torch.inference_mode()
def sound_shares(model: Model, records: Iterable[ClipRecord]) -> dict[str, Tensor]:
    """Return each clip's objects' shares of the sound, `(L,)`, as the relation map of its bases has them."""
    shares = {}
    for record in records:
        relation = model.network.relate(*(torch.from_numpy(x) for x in record.factors()))[None]
        energy = torch.from_numpy(record.basis_energy)[None]
        shares[record.segment_id] = energy_shares(basis_posteriors(relation), energy)[0]
    return shares


def targets(
    kind: str,
    given: Tensor | None,
    shares: Tensor | None,
    scores: Tensor | None,
    model: Model | None,
    labels: LabelConfig = _ONE_LOOK,
) -> Tensor | None:
    """Decide what a clip's pictures show, boolean `(L,)`; None where there is nothing to go by.

    The thresholds of `labels` are those of one look at the middle of each picture, as `scores` are.
    `labels`: the given ones. `agreement`: what both the pictures and the sound point to. Picture score × confidence of
    the sound must reach `labels.best_threshold`. Where no picture network is to be had yet (`scores` None), it is what
    is heard with `separation.least_confidence`.
    `both`: what two of three voices say, given labels, pictures and sound. Without pictures it is the given labels that
    are heard, or all where none is. Without given labels it is as `agreement`.
    """
    if kind == "labels" or model is None or shares is None:
        return given
    confidence = model.config.evidence.confidence(shares)
    heard = confidence >= model.config.separation.least_confidence
    if scores is None:
        if kind == "agreement" or given is None:
            return heard
        audible = shares >= model.config.separation.silent_share
        return given & audible if (given & heard).any() else given
    if kind == "agreement" or given is None:
        return scores * confidence >= labels.best_threshold
    votes = given.int() + (scores >= labels.threshold).int() + heard.int()
    return votes >= 2


def score_album(labeller: ImageLabeller, path: str, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Score the objects in each clip's pictures, `(L,)`."""
    return {i: vocabulary.scores(labeller(open_images(jpegs))) for i, jpegs in read_album(path)}


def decide(
    kind: str,
    segments: Iterable[Segment],
    shares: dict[str, Tensor],
    scores: dict[str, Tensor],
    model: Model | None,
    vocabulary: Vocabulary,
) -> dict[str, Tensor]:
    """Decide by `targets` what each clip's pictures show; clips that show nothing for certain are left out."""
    labels = {}
    for s in segments:
        given = None if s.labels is None else vocabulary.multi_hot(s.labels)
        marks = targets(kind, given, shares.get(s.segment_id), scores.get(s.segment_id), model)
        if marks is not None and marks.any():
            labels[s.segment_id] = marks
    return labels


# ------------------------------------------------------------------------------------ training


def untrained(architecture: str, seed: int, vocabulary: Vocabulary) -> ImageLabeller:
    """Build a picture network of the objects' first ImageNet classes and BACKGROUND, from scratch."""
    torch.manual_seed(seed)
    classes = (*(o.imagenet[0] for o in vocabulary if o.imagenet), BACKGROUND)
    return ImageLabeller(architecture, build_network(architecture, len(classes)).eval(), "", classes, way="centre")


def class_groups(classes: Sequence[int] | None, vocabulary: Vocabulary) -> Tensor:
    """Say which object, or last none, each of a network's outputs stands for: `(C, L + 1)` of zeros and ones."""
    index = {c: row for row, o in enumerate(vocabulary) for c in o.imagenet}
    rows = [index.get(c, len(vocabulary)) for c in (classes if classes is not None else range(N_IMAGENET_CLASSES))]
    return nn.functional.one_hot(torch.tensor(rows), len(vocabulary) + 1).float()


def image_loss(logits: Tensor, labels: Tensor, groups: Tensor, presence: float) -> Tensor:
    """Return each clip's loss from weak labels of the whole clip, `(B, P, C), (B, L), (C, L + 1)` → `(B,)`.

    The pictures are a bag, as the bases are one for the sound (`miml.partial_label_loss`). Each is explained by one of
    the clip's labels, seldom by an object that was missed, or by none. Every label must be found in the pictures as a
    whole, weighed by `presence`.
    """
    p = (logits.softmax(-1) @ groups).clamp_min(1e-8)  # (B, P, L + 1)
    relation = (p[..., :-1].log() - p[..., -1:].log()).transpose(1, 2)
    return partial_label_loss(relation, labels, presence=presence)


def batches(
    files: Sequence[str],
    labels: dict[str, Tensor],
    config: FinetuningConfig,
    epoch: int,
    rank: int = 0,
    n_ranks: int = 1,
    held_clips: int = 2048,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pictures `(B, P, height, width, 3)` and labels `(B, L)` of the clips that have labels.

    Files come in random order, `held_clips` clips at a time are shuffled together, and of a clip
    come P pictures spread over its length. Each rank gets its clips of every batch.
    """
    rng = np.random.default_rng([config.seed, epoch])
    held: list[tuple[str, list[bytes]]] = []
    order = rng.permutation(len(files)).tolist()
    for position, index in enumerate(order):
        held += [(i, jpegs) for i, jpegs in read_album(files[index]) if i in labels]
        if len(held) < held_clips and position < len(order) - 1:
            continue
        rng.shuffle(held)
        for first in range(0, len(held), config.batch_clips):
            batch = held[first : first + config.batch_clips]
            places = [np.arange(config.images_a_clip) + rng.random() for _ in batch]
            share = [k % len(batch) for k in range(rank, max(len(batch), n_ranks), n_ranks)]  # one clip at least
            images = [
                open_images([batch[k][1][int(x * len(batch[k][1]) / config.images_a_clip)] for x in places[k]])
                for k in share
            ]
            if len(images) * config.images_a_clip > 1:  # batch norm needs two
                yield torch.from_numpy(np.stack(images)), torch.stack([labels[batch[k][0]] for k in share])
        held = []


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror, crop and brighten a batch of pictures, `(n, 3, height, width)`, normalised ones."""
    height, width = images.shape[-2:]
    share = rng.uniform(0.75, 1)
    h, w = int(share * height), int(share * width)
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    cropped = images[..., top : top + h, left : left + w]
    images = nn.functional.interpolate(cropped, (height, width), mode="bilinear", antialias=False)
    images = images * rng.uniform(0.8, 1.2) + rng.uniform(-0.2, 0.2)
    return images.flip(-1) if rng.random() < 0.5 else images


def train_epoch(
    labeller: ImageLabeller,
    parts: Iterable[tuple[Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    config: FinetuningConfig,
    learning_rate: Callable[[float], float],
    n_batches: int,
    epoch: int,
    vocabulary: Vocabulary,
) -> float:
    """Train over the batches once; return the mean loss by clip. `learning_rate` is that at a share of the run."""
    rng = np.random.default_rng([config.seed, epoch, 1])
    device = labeller.device
    network = labeller.network.train().to(memory_format=torch.channels_last)
    groups = class_groups(labeller.classes, vocabulary).to(device)
    kind = torch.device(device).type
    halved = kind == "cuda" or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    total, count = 0.0, 0
    for number, (images, labels) in enumerate(parts):
        share = (epoch + min(number / n_batches, 1)) / config.epochs
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(share)
        shape = images.shape[:2]
        pixels = augment(labeller.preprocessing(images.flatten(0, 1).to(device)), rng)
        with torch.autocast(kind, torch.bfloat16, enabled=halved):
            logits = network(pixels.contiguous(memory_format=torch.channels_last)).float()
        losses = image_loss(logits.unflatten(0, shape), labels.to(device), groups, config.presence)
        optimiser.zero_grad(set_to_none=True)
        (losses.mean() / parallel.place()[1]).backward()  # the workers' parts are alike in size
        parallel.add_up_gradients(network)
        optimiser.step()
        total += float(losses.detach().sum())
        count += len(losses)
    network.eval()
    return total / max(count, 1)


def one_cycle(highest: float) -> Callable[[float], float]:
    """Rise over the first fifth of a run, then fall along a cosine to nothing."""

    def at(share: float) -> float:
        rising = min(1.0, 0.04 + share / 0.2)
        return highest * rising * (1 if share < 0.2 else 0.5 * (1 + np.cos(np.pi * (share - 0.2) / 0.8)))

    return at


def add_dropout(network: nn.Module, share: float) -> None:
    """Drop inputs of the last layer in training; the weights keep their names."""
    last = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    last.register_forward_pre_hook(
        lambda module, inputs: (nn.functional.dropout(inputs[0], share, module.training), *inputs[1:])
    )


def agreement(
    scores: dict[str, Tensor], truth: dict[str, Tensor], threshold: float = 0.3, best_threshold: float = 0.05
) -> dict[str, float]:
    """Compare picture scores with what clips show: `map`, and `agreement`.

    Agreement is the mean over clips of the labels that both have among those that either has.
    """
    ids = [i for i in scores if i in truth]
    if not ids:
        return {"map": float("nan"), "agreement": float("nan")}
    labels, found = torch.stack([truth[i] for i in ids]), torch.stack([scores[i] for i in ids])
    chosen = weak_labels(found, threshold, best_threshold)
    both, either = (chosen & labels).sum(1), (chosen | labels).sum(1)
    return {
        "map": mean_average_precision(labels, found),
        "agreement": float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean()),
    }


def measure(scores: dict[str, Tensor], truth: dict[str, Tensor], thresholds: LabelConfig) -> dict[str, float]:
    """Return mAP, agreement, and their mean, by which the epoch is chosen."""
    found = agreement(scores, truth, thresholds.threshold, thresholds.best_threshold)
    return found | {"selection": float(np.nanmean(list(found.values())))}


def describe(row: dict[str, float]) -> str:
    """Format validation figures."""
    return f"mAP {row['map']:.3f}, label agreement {row['agreement']:.3f}"


# ----------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class FinetuningRun:
    """What the workers of a fine-tuning need to know."""

    out: str
    train: list[str]  # albums
    val: list[str]
    labels: dict[str, Tensor]  # of training clips, boolean `(L,)`
    truth: dict[str, Tensor]  # of validation clips
    before: float  # the start's figure by which epochs are chosen
    thresholds: LabelConfig
    config: FinetuningConfig
    vocabulary: Vocabulary
    threads: int = 1


def save(labeller: ImageLabeller, path: str) -> bytes:
    """Write a picture network to a file or URI, and return the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.safetensors")
        labeller.save(file)
        data = file.read_bytes()
    storage.write_bytes(path, data)
    return data


def fit(
    run: FinetuningRun,
    device: str | None = None,
    rank: int = 0,
    n_ranks: int = 1,
    report: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train to the end from the run's checkpoint, if there is one: the body of one training worker.

    The first worker writes the best epoch's network. `report` gets the figures of each epoch.
    """
    config = run.config
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(run.threads)
    torch.manual_seed(config.seed)
    with storage.local_file(storage.join(run.out, START_FILE)) as path:
        labeller = ImageLabeller.load(weights=path, device=device)
    network = labeller.network
    if config.dropout:
        add_dropout(network, config.dropout)
    optimiser = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=1e-2)
    rows = _resume(run, network, optimiser, device)
    n_batches = -(-len(run.labels) // config.batch_clips)
    best = max([run.before, *(r["selection"] for r in rows)])
    for epoch in range(len(rows), config.epochs):
        started = time.monotonic()
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout
        parts = batches(run.train, run.labels, config, epoch, rank, n_ranks)
        rate = one_cycle(config.learning_rate)
        loss = train_epoch(labeller, parts, optimiser, config, rate, n_batches, epoch, run.vocabulary)
        scores = {i: s for f in run.val for i, s in score_album(labeller, f, run.vocabulary).items()}
        row = measure(scores, run.truth, run.thresholds)
        row |= {"epoch": epoch, "train_loss": loss, "seconds": time.monotonic() - started}
        rows.append(row)
        if rank == 0:
            if row["selection"] > best:
                best = row["selection"]
                save(labeller, storage.join(run.out, LABELLER_FILE))
            _save_checkpoint(run, network, optimiser, rows)
        if report:
            report(row)


def _resume(
    run: FinetuningRun, network: nn.Module, optimiser: torch.optim.Optimizer, device: str
) -> list[dict[str, float]]:
    """Go on from the checkpoint, if there is one; return the figures of the epochs that are done."""
    path = storage.join(run.out, CHECKPOINT_FILE)
    if not storage.exists(path):
        return []
    saved = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
    network.load_state_dict(saved["network"])
    optimiser.load_state_dict(saved["optimiser"])
    return saved["rows"]


def _save_checkpoint(
    run: FinetuningRun, network: nn.Module, optimiser: torch.optim.Optimizer, rows: list[dict[str, float]]
) -> None:
    buffer = io.BytesIO()
    state: dict[str, Any] = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "rows": rows}
    torch.save(state, buffer)
    storage.write_bytes(storage.join(run.out, CHECKPOINT_FILE), buffer.getbuffer())
    storage.write_text(storage.join(run.out, HISTORY_FILE), json.dumps(rows, indent=1))
