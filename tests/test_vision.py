import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from avsep import storage, vision
from avsep.objects import object_index, object_scores
from avsep.vision import ImageLabeller, LabellerUnavailable, build_network, normalise

TINY = "squeezenet1_1"  # the smallest of torchvision's with 1000 classes: 5 MB
CLASSES = (889, 0, 420)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(TINY, 1000).eval()


@pytest.fixture(scope="module")
def pth(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict, named as torchvision names its files: by the start of its SHA-256."""
    plain = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(network.state_dict(), plain)
    return plain.rename(plain.with_name(f"{TINY}-{hashlib.sha256(plain.read_bytes()).hexdigest()[:8]}.pth"))


def pictures(n: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def small_labeller() -> ImageLabeller:
    torch.manual_seed(1)
    return ImageLabeller(TINY, build_network(TINY, len(CLASSES)).eval(), "", CLASSES)


def test_images_are_normalised_as_imagenet_s() -> None:
    """(x / 255 − mean) / deviation by channel, and channels first."""
    images = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    images[..., 1] = 255
    x = normalise(images)
    assert x.shape == (1, 3, 2, 3)
    assert x[0, :, 1, 2].tolist() == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225])


def test_a_file_whose_name_holds_its_hash(pth: Path, network: nn.Module) -> None:
    labeller = ImageLabeller.load(TINY, pth)
    assert labeller.sha256 == hashlib.sha256(pth.read_bytes()).hexdigest()
    assert labeller.classes is None and not labeller.network.training
    images = pictures(3)
    logits = labeller(images)
    with torch.inference_mode():
        expected = network(normalise(torch.from_numpy(images)))
    assert logits.shape == (3, 1000) and logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(labeller(images, batch_size=2), logits, atol=1e-4)
    assert labeller(pictures(0)).shape == (0, 1000)


def test_a_file_whose_name_holds_another_hash_is_refused(pth: Path, tmp_path: Path) -> None:
    wrong = tmp_path / f"{TINY}-0123abcd.pth"
    wrong.write_bytes(pth.read_bytes())
    with pytest.raises(LabellerUnavailable, match=r"its name says 0123abcd; download the file again") as caught:
        ImageLabeller.load(TINY, wrong)
    assert one_line(caught.value) and str(wrong) in str(caught.value) and pth.stem[-8:] in str(caught.value)
    cut = tmp_path / pth.name
    cut.write_bytes(pth.read_bytes()[:-100])  # a broken download
    with pytest.raises(LabellerUnavailable, match="download the file again"):
        ImageLabeller.load(TINY, cut)
    unnamed = tmp_path / "mine.pth"
    unnamed.write_bytes(pth.read_bytes())
    assert ImageLabeller.load(TINY, unnamed).sha256.startswith(pth.stem[-8:])


quick_bfloat16 = pytest.mark.skipif(
    not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported(), reason="no bfloat16 units"
)


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet50", 1000).eval()


@quick_bfloat16
def test_bfloat16_keeps_the_logits_within_a_hundredth_of_their_range(deep: nn.Module) -> None:
    labeller, images = ImageLabeller("resnet50", deep, ""), pictures(5, 96)
    with torch.inference_mode():
        expected = deep(normalise(torch.from_numpy(images)))
    logits = labeller(images)
    assert labeller._classify is not deep and logits.dtype == torch.float32
    assert float((logits - expected).abs().max()) < 0.01 * float(expected.max() - expected.min())
    assert all(p.dtype == torch.float32 for p in deep.parameters())  # what is saved stays exact


@quick_bfloat16
def test_bfloat16_is_not_used_where_it_would_change_the_logits(
    deep: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "_BFLOAT16_ERROR", 1e-6)
    assert ImageLabeller("resnet50", deep, "")._classify is deep


def test_small_networks_stay_in_float32(network: nn.Module) -> None:
    assert ImageLabeller(TINY, network, "")._classify is network


def test_weights_are_read_where_a_uri_says(tmp_path: Path, memory_folder: str) -> None:
    labeller, path, uri = small_labeller(), tmp_path / "labeller.safetensors", f"{memory_folder}/labeller.safetensors"
    labeller.save(path)
    storage.write_bytes(uri, path.read_bytes())
    assert ImageLabeller.load(weights=uri).sha256 == ImageLabeller.load(weights=path).sha256
    with pytest.raises(LabellerUnavailable, match=r"memory://\S+/nothing.pth can't be read: "):
        ImageLabeller.load(weights=f"{memory_folder}/nothing.pth")


def test_safetensors_with_classes_give_minus_infinity_elsewhere(tmp_path: Path) -> None:
    labeller, path = small_labeller(), tmp_path / "labeller.safetensors"
    labeller.save(path)
    back = ImageLabeller.load(weights=path)  # the file knows its architecture
    assert (back.architecture, back.classes) == (TINY, CLASSES)
    images = pictures(2)
    logits = back(images)
    own = small_labeller().network(normalise(torch.from_numpy(images)))
    assert logits.shape == (2, 1000) and torch.allclose(logits[:, list(CLASSES)], own, atol=1e-5)
    others = torch.ones(1000, dtype=torch.bool)
    others[list(CLASSES)] = False
    assert torch.isneginf(logits[:, others]).all()
    scores = object_scores(logits)
    expected: Tensor = own.softmax(1).amax(0)
    assert float(scores[object_index("violin")]) == pytest.approx(float(expected[0].detach()), rel=1e-4)
    assert scores[object_index("cello")] == 0


def test_a_full_network_is_saved_too(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    ImageLabeller(TINY, network, "").save(path)
    back = ImageLabeller.load("resnet152", path)
    assert (back.architecture, back.classes) == (TINY, None)
    assert torch.allclose(back(pictures(1)), ImageLabeller(TINY, network, "")(pictures(1)))


def one_line(error: Exception) -> bool:
    return "\n" not in str(error)


def test_weights_that_can_not_be_downloaded_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(LabellerUnavailable, match=r"of resnet152 can't be downloaded .*pass --weights FILE") as caught:
        ImageLabeller.load()
    assert one_line(caught.value) and "https://download.pytorch.org/models/resnet152-394f9c45.pth" in str(caught.value)


def test_files_that_do_not_fit_are_one_line_each(pth: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"no weights")
    unknown = tmp_path / "unknown.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, unknown, {"architecture": "nosuchnet"})
    classes = tmp_path / "classes.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, classes, {"architecture": TINY, "classes": json.dumps([1, 2])})
    damaged = torch.load(pth, weights_only=True)
    damaged[next(iter(damaged))][0] = torch.nan
    nan = tmp_path / "nan.pth"
    torch.save(damaged, nan)
    for architecture, path, message in (
        (TINY, nan, "holds NaN or infinity; copy the file again"),
        (TINY, tmp_path / "missing.pth", "no such file; give a .pth or .safetensors file"),
        (TINY, garbage, "doesn't fit squeezenet1_1"),
        ("resnet18", pth, "doesn't fit resnet18"),
        (TINY, unknown, "doesn't fit nosuchnet"),
        (TINY, classes, "doesn't fit squeezenet1_1"),
    ):
        with pytest.raises(LabellerUnavailable, match=message) as caught:
            ImageLabeller.load(architecture, path)
        assert one_line(caught.value) and str(path) in str(caught.value)
    with pytest.raises(
        LabellerUnavailable, match=r"'nosuchnet' is no torchvision classifier.*resnet152 is the default"
    ):
        ImageLabeller.load("nosuchnet")


def test_loading_a_file_never_runs_code_from_it(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").write_text, ("it did",))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(LabellerUnavailable):
        ImageLabeller.load(TINY, tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_the_default_is_the_network_of_the_published_thresholds() -> None:
    assert vision.DEFAULT_ARCHITECTURE == "resnet152"
    assert vision.published_weights("resnet152").url.endswith("resnet152-394f9c45.pth")  # V1


def test_a_small_labeller_learns_colours() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 48)
    images = rng.integers(0, 60, (48, 32, 32, 3)).astype(np.uint8)
    images[np.arange(48), ..., targets] += 180  # red or green
    labeller = vision.train_small_labeller(images, targets.tolist(), (889, 420), epochs=10, batch_size=8)
    logits = labeller(images)
    found = logits[:, [889, 420]].argmax(1).numpy()
    assert (found == targets).mean() > 0.9
    assert labeller.classes == (889, 420) and torch.isneginf(logits[:, 0]).all()


@pytest.mark.slow
def test_a_picture_network_needs_no_compiler_and_detectors_get_it_when_they_ask() -> None:
    program = """
import sys, torch
from avsep.vision import build_network
network = build_network("resnet18", 3).eval()
with torch.inference_mode():
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
assert not {m for m in sys.modules if m.startswith("torch._dynamo")}
from torchvision.ops import roi_align
assert roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0, 4, 4]])], 2).shape == (1, 1, 2, 2)
assert roi_align.__globals__["is_compile_supported"]("cpu") in (True, False)
import torch._dynamo
assert torch._dynamo.utils.is_compile_supported and hasattr(torch, "compile")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
