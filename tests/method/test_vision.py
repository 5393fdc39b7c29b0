import functools
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from avsep import lite, storage, synthetic, vision
from avsep.objects import object_index, object_scores
from avsep.vision import NETWORKS, ImageLabeller, ImageNetwork, LabellerUnavailable, Preprocessing, build_network

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


LITE = {"efficientnet_lite0": 224, "efficientnet_lite2": 260}


def test_pixels_are_scaled_by_channel() -> None:
    """(x / 255 − mean) / deviation, and channels first."""
    images = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    images[..., 1] = 255
    x = Preprocessing()(images)
    assert x.shape == (1, 3, 2, 3)
    assert x[0, :, 1, 2].tolist() == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225])


@pytest.mark.parametrize("name", ["resnet152", "efficientnet_b1", "inception_v3"])
def test_torchvisions_networks_are_shown_what_their_weights_were_measured_with(name: str) -> None:
    """Its own transforms on a picture, against ours on the same: sizes, crop, mean and deviation."""
    published = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    found = vision.preprocessing_of(name)
    assert found.size == published.crop_size[0] and found.crop == published.crop_size[0] / published.resize_size[0]
    images = torch.from_numpy(pictures(1, published.resize_size[0]))
    expected = published(images[0].permute(2, 0, 1))
    start = round((published.resize_size[0] - found.size) / 2)
    middle = images[:, start : start + found.size, start : start + found.size]
    torch.testing.assert_close(found(middle)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "size"), LITE.items())
def test_lite_is_shown_pixels_about_127(name: str, size: int) -> None:
    prepare = vision.preprocessing_of(name)
    levels = torch.tensor([0, 127, 255], dtype=torch.uint8)
    assert prepare.size == size and prepare.crop in (0.875, 0.89)
    x = prepare(levels.view(1, 1, 3, 1).expand(1, 1, 3, 3))
    assert torch.equal(x[0, 0], x[0, 2]) and x[0, 0, 0].tolist() == pytest.approx([-127 / 128, 0.0, 1.0], abs=1e-6)


def gradient(size: int) -> np.ndarray:
    """Red grows to the right, green to the bottom, blue along both, `(1, size, size, 3)`."""
    across = np.linspace(0, 255, size)[None, :].repeat(size, 0)
    return np.stack([across, across.T, (across + across.T) / 2], -1).astype(np.uint8)[None]


GOLDEN = {  # as the authors' own implementation has them
    "efficientnet_lite0": [-0.316, -0.462, 0.648, -1.963, -0.565],
    "efficientnet_lite2": [0.433, -0.487, 0.403, -1.414, -1.434],
}


@pytest.mark.parametrize("name", LITE)
def test_lites_published_weights_answer_as_ever(name: str) -> None:
    """Strictly loaded, without a download; logits of ImageNet's first classes and of a violin."""
    labeller = ImageLabeller.load(name)
    assert labeller.classes is None and len(labeller.sha256) == 64 and not labeller.network.training
    images = gradient(LITE[name])
    logits = labeller(images)[0]
    assert logits[[0, 151, 402, 751, 889]].tolist() == pytest.approx(GOLDEN[name], abs=0.02)
    wrong = ImageLabeller(name, labeller.network, "")
    wrong.preprocessing = Preprocessing(LITE[name])  # ImageNet's mean and deviation
    assert float((wrong(images)[0] - logits).abs().max()) > 0.5


def test_lite_pads_as_tensorflow_does() -> None:
    """Of seven by eight pixels, at stride two, four by four; what is uneven falls to the right and the bottom."""
    conv = lite.SameConv(1, 1, 3, stride=2)
    nn.init.ones_(conv.weight)
    with torch.no_grad():
        found = conv(torch.ones(1, 1, 7, 8))[0, 0]
    rows, columns = [2, 3, 3, 2], [3, 3, 3, 2]  # pixels under the kernel: one is padded above and below, one right
    assert torch.equal(found, torch.tensor(rows)[:, None] * torch.tensor(columns).float())
    assert lite.EfficientNetLite("efficientnet_lite0", 5).eval()(torch.zeros(1, 3, 65, 97)).shape == (1, 5)


def test_a_lite_network_of_other_classes_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network("efficientnet_lite0", 3).eval()
    labeller = ImageLabeller("efficientnet_lite0", network, "", CLASSES, way="centre")
    labeller.save(tmp_path / "lite.safetensors")
    back = ImageLabeller.load(weights=tmp_path / "lite.safetensors")
    assert (back.architecture, back.classes, back.way) == ("efficientnet_lite0", CLASSES, "centre")
    assert back.looking("tiles").way == "centre" and back.looking("tiles").size == 224
    assert torch.allclose(back(gradient(224)), labeller(gradient(224)))


def test_a_file_whose_name_holds_its_hash(pth: Path, network: nn.Module) -> None:
    labeller = ImageLabeller.load(TINY, pth)
    assert labeller.sha256 == hashlib.sha256(pth.read_bytes()).hexdigest()
    assert labeller.classes is None and not labeller.network.training
    images = pictures(3)
    logits = labeller(images)
    with torch.inference_mode():
        expected = network(Preprocessing()(torch.from_numpy(images)))
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
        expected = deep(Preprocessing()(torch.from_numpy(images)))
    logits = labeller(images)
    assert labeller.running is not deep and logits.dtype == torch.float32
    assert float((logits - expected).abs().max()) < 0.01 * float(expected.max() - expected.min())
    assert all(p.dtype == torch.float32 for p in deep.parameters())  # what is saved stays exact


@quick_bfloat16
def test_bfloat16_is_not_used_where_it_would_change_the_logits(
    deep: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "BFLOAT16_ERROR", 1e-6)
    assert ImageLabeller("resnet50", deep, "").running is deep


def test_small_networks_stay_in_float32(network: nn.Module) -> None:
    assert ImageLabeller(TINY, network, "").running is network


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
    own = small_labeller().network(Preprocessing()(torch.from_numpy(images)))
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


def test_weights_that_cannot_be_downloaded_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(LabellerUnavailable, match=r"of resnet152 can't be downloaded .*pass --weights FILE") as caught:
        ImageLabeller.load()
    assert one_line(caught.value) and "https://download.pytorch.org/models/resnet152-394f9c45.pth" in str(caught.value)


def test_what_a_file_says_is_known_before_it_is_loaded(pth: Path, tmp_path: Path, monkeypatch) -> None:
    """The same that is loaded then: its hash, network, classes and way of looking."""
    own = tmp_path / "own.safetensors"
    ImageLabeller(TINY, build_network(TINY, len(CLASSES)), "", CLASSES, way="centre").save(own)
    lite0 = vision.LabellerFile.find("efficientnet_lite0")
    files = [(vision.LabellerFile.find(TINY, str(pth)), TINY, pth), (lite0, "efficientnet_lite0", None)]
    for found, name, path in [*files, (vision.LabellerFile.find(weights=str(own)), TINY, own)]:
        loaded = ImageLabeller.load(name, path)
        same = (loaded.architecture, loaded.sha256, loaded.classes, loaded.way)
        assert (found.architecture, found.sha256, found.classes, found.way) == same
        assert found.looking("tiles") == loaded.looking("tiles")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert vision.LabellerFile.find() == vision.LabellerFile("resnet152")  # not here, and not brought
    with pytest.raises(LabellerUnavailable, match="no such file"):
        vision.LabellerFile.find(TINY, str(tmp_path / "missing.pth"))


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
    expected = r"'nosuchnet' is no picture network .*: give efficientnet_lite0, efficientnet_lite2, .*or a class"
    with pytest.raises(LabellerUnavailable, match=expected):
        ImageLabeller.load("nosuchnet")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, its address on loopback, and what was asked for there."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(self.path)

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "www")) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{s.server_port}", asked
        s.shutdown()


def blots(n_outputs: int) -> nn.Module:
    """Logits of the mean colour."""
    torch.manual_seed(3)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, n_outputs))


def test_another_picture_network_is_an_entry(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are downloaded once, its pictures cut, resized and scaled as it says; it is saved and loaded."""
    folder, address, asked = served
    torch.save(blots(1000).state_dict(), folder / "plain.pth")
    name = f"blots-{hashlib.sha256((folder / 'plain.pth').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "plain.pth").rename(folder / name)
    look = Preprocessing(8, 0.5, (0.0,) * 3, (0.5,) * 3, Image.Resampling.NEAREST)
    monkeypatch.setitem(NETWORKS, "blots", ImageNetwork(blots, look, f"{address}/{name}"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    labeller, again = ImageLabeller.load("blots"), ImageLabeller.load("blots")
    assert asked == [f"/{name}"] and labeller.sha256 == again.sha256
    image = pictures(1, 32)
    with torch.inference_mode():
        middle = torch.from_numpy(image[:, 9:24:2, 9:24:2])  # of NEAREST, every second pixel of the middle half
        expected = blots(1000)(middle.permute(0, 3, 1, 2) / 255 / 0.5)
    torch.testing.assert_close(labeller.evidence(image, "centre"), expected)
    small = ImageLabeller("blots", blots(3), "", CLASSES)
    small.save(tmp_path / "small.safetensors")
    back = ImageLabeller.load(weights=tmp_path / "small.safetensors")
    assert torch.equal(back(image), small(image)) and back.preprocessing == look
    with pytest.raises(LabellerUnavailable, match=r"give efficientnet_lite0, .*, blots, or a class"):
        ImageLabeller.load("nosuchnet")
    monkeypatch.setitem(NETWORKS, "blots", ImageNetwork(blots, look, f"{address}/blots-00000000.pth"))
    with pytest.raises(LabellerUnavailable, match=r"of blots can't be downloaded \(.*404.*fetch .*pass --weights FILE"):
        ImageLabeller.load("blots")
    monkeypatch.setitem(NETWORKS, "blots", ImageNetwork(blots, look))
    with pytest.raises(LabellerUnavailable, match="'blots' is no picture network with ImageNet weights"):
        ImageLabeller.load("blots")


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
    labeller = synthetic.train_small_labeller(images, targets.tolist(), (889, 420), epochs=10, batch_size=8)
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
