import math

import pytest
import torch
import torchvision

from avsep.objects import (
    AUDIOSET_23,
    OBJECT_NAMES,
    OBJECTS,
    find,
    multi_hot,
    object_index,
    object_scores,
    weak_labels,
)

# What torchvision itself calls the classes of each object (dogs: the first and the last).
NAMES = {
    "cat": "tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat",
    "chicken": "cock, hen",
    "frog": "bullfrog, tree frog, tailed frog",
    "accordion": "accordion",
    "acoustic_guitar": "acoustic guitar",
    "banjo": "banjo",
    "cello": "cello",
    "drum": "drum, drumstick",
    "electric_guitar": "electric guitar",
    "flute": "flute",
    "french_horn": "French horn",
    "harmonica": "harmonica",
    "harp": "harp",
    "marimba": "marimba",
    "piano": "grand piano, upright",
    "saxophone": "sax",
    "trombone": "trombone",
    "violin": "violin",
    "car": "beach wagon, cab, car wheel, convertible, grille, jeep, limousine, minivan, Model T, pickup, racer, "
    "sports car",
    "train": "bullet train, electric locomotive, freight car, passenger car, steam locomotive, streetcar",
    "plane": "airliner, warplane, wing",
    "motorcycle": "crash helmet, disk brake, moped, motor scooter",
}
# Where the publication has others.
PUBLISHED = NAMES | {
    "drum": "drum",
    "car": "racer, sports car, convertible",
    "train": "passenger car, bullet train, steam locomotive, electric locomotive",
    "plane": "airliner, warplane",
    "motorcycle": "motor scooter, moped",
}
MIDS = {
    "cat": "/m/01yrx", "dog": "/m/0bt9lr", "chicken": "/m/09b5t", "frog": "/m/09ld4", "accordion": "/m/0mkg",
    "acoustic_guitar": "/m/042v_gx", "banjo": "/m/018j2", "cello": "/m/01xqw", "drum": "/m/026t6",
    "electric_guitar": "/m/02sgy", "flute": "/m/0l14j_", "french_horn": "/m/0319l", "harmonica": "/m/03qjg",
    "harp": "/m/03m5k", "marimba": "/m/0dwsp", "piano": "/m/05r5c", "saxophone": "/m/06ncr",
    "trombone": "/m/07c6l", "violin": "/m/07y_7", "car": "/m/0k4j", "train": "/m/07jdr", "plane": "/m/0cmf2",
    "motorcycle": "/m/04_sv",
}  # fmt: skip


def one_hot_logits(*classes: int, sure: float = 50.0) -> torch.Tensor:
    logits = torch.zeros(len(classes), 1000)
    logits[torch.arange(len(classes)), list(classes)] = sure
    return logits


@pytest.mark.parametrize(("kind", "named"), [("everyday", NAMES), ("published", PUBLISHED)])
def test_objects_show_the_classes_that_torchvision_names(kind: str, named: dict[str, str]) -> None:
    categories = torchvision.models.ResNet152_Weights.IMAGENET1K_V1.meta["categories"]
    assert tuple(MIDS) == OBJECT_NAMES[: len(MIDS)]  # the published ones; others come after
    for o, classes in zip(OBJECTS, AUDIOSET_23.imagenet_classes(kind), strict=True):
        if o.name == "dog":  # 118 breeds; 269 is the timber wolf
            assert (classes[0], classes[-1], len(classes)) == (151, 268, 118)
            assert (categories[151], categories[268]) == ("Chihuahua", "Mexican hairless")
        else:
            assert sorted(categories[i] for i in classes) == sorted(filter(None, named.get(o.name, "").split(", ")))
        assert o.audioset == ((MIDS[o.name],) if o.name in MIDS else o.audioset)
    indices = [i for classes in AUDIOSET_23.imagenet_classes(kind) for i in classes]
    assert len(set(indices)) == len(indices)
    for o, classes in zip(OBJECTS, AUDIOSET_23.imagenet_classes(kind), strict=True):
        assert o.imagenet[:1] == () or o.imagenet[0] in classes


def test_everyday_classes_find_what_the_published_ones_leave_out() -> None:
    """A minivan, beside a racer: both are cars to the one, the other knows the racer alone."""
    minivan, racer = one_hot_logits(656), one_hot_logits(751)
    car = object_index("car")
    assert object_scores(minivan)[car] > 0.999 > 0.001 > object_scores(minivan, "published")[car]
    assert object_scores(racer)[car] > 0.999 and object_scores(racer, "published")[car] > 0.999
    with pytest.raises(ValueError, match="classes are 'all'; they must be one of everyday, published"):
        object_scores(racer, "all")


def test_what_several_looks_say_together_is_not_normalised_again() -> None:
    """Of each class the largest log-probability: two objects may both be sure, and the row's sum is above one."""
    row = torch.full((1, 1000), math.log(1e-5))
    row[0, [889, 420]] = torch.tensor([math.log(0.9), math.log(0.8)])
    joined, again = object_scores(row, joined=True), object_scores(row)
    violin, banjo = object_index("violin"), object_index("banjo")
    assert joined[[violin, banjo]].tolist() == pytest.approx([0.9, 0.8])
    assert again[violin] + again[banjo] < 1
    row[0, [579, 881]] = math.log(0.7)  # two looks, each sure of another class of one object
    assert joined.max() <= 1 and float(object_scores(row, joined=True)[object_index("piano")]) == 1.0


def test_a_score_is_the_probability_of_the_union_of_the_classes() -> None:
    """Equal logits give each class 1/1000: a dog of 118 breeds 0.118, a banjo 0.001."""
    scores = object_scores(torch.full((1, 1000), 3.0))
    assert scores.shape == (len(OBJECTS),)
    expected = torch.tensor([len(o.imagenet) / 1000 for o in OBJECTS])
    assert torch.allclose(scores, expected, rtol=1e-5)


def test_a_score_is_the_best_picture_s() -> None:
    scores = object_scores(one_hot_logits(889, 420, 889))
    assert scores[object_index("violin")] > 0.999 and scores[object_index("banjo")] > 0.999
    assert scores.sum() < 2.001
    split = torch.full((1, 1000), -math.inf)
    split[0, [579, 881]] = math.log(0.3)
    split[0, 0] = math.log(0.4)
    assert float(object_scores(split)[object_index("piano")]) == pytest.approx(0.6)
    assert torch.isfinite(object_scores(split)).all()  # −inf elsewhere, as small labellers give


def test_float16_evidence_and_leading_axes() -> None:
    logits = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    scores = object_scores(logits)
    assert scores.shape == (2, len(OBJECTS)) and (scores >= 0).all() and (scores <= 1).all()
    assert torch.allclose(scores[1], object_scores(logits[1]))
    assert torch.allclose(object_scores(logits.half()), scores, rtol=5e-3)


def test_weak_labels_at_their_thresholds() -> None:
    scores = torch.zeros(4, 23)
    scores[0, [1, 5, 7]] = torch.tensor([0.3, 0.9, 0.29])  # at and above the threshold
    scores[1, [2, 3]] = torch.tensor([0.05, 0.04])  # the best one alone
    scores[2, 2] = 0.049  # not even that
    labels = weak_labels(scores)
    assert labels.dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in labels] == [[1, 5], [2], [], []]
    assert weak_labels(scores, threshold=0.95, best_threshold=0.2)[0].nonzero().flatten().tolist() == [5]


def test_names_and_rows() -> None:
    assert OBJECT_NAMES[object_index("violin")] == "violin"
    assert multi_hot(["violin", "dog"]).nonzero().flatten().tolist() == [1, object_index("violin")]
    assert not multi_hot([]).any()
    with pytest.raises(ValueError, match=r"unknown object 'tuba'; the objects are cat, dog"):
        object_index("tuba")


@pytest.mark.parametrize("name", [*OBJECT_NAMES, *(a for o in OBJECTS for a in o.aliases)])
def test_a_name_is_found_however_it_is_written(name: str) -> None:
    if name == "guitar":
        return
    (meant,) = [o.name for o in OBJECTS if name in (o.name, *o.aliases)]
    words = name.split("_")
    plural = name if name.endswith("s") else name + ("es" if name.endswith(("x", "ch")) else "s")
    for written in (name, name.upper(), " ".join(words).title(), "-".join(words), "".join(words), f" {name} ", plural):
        assert find(written) == meant, written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guitar", "'guitar' is ambiguous: acoustic_guitar or electric_guitar?"),
        ("Guitars", "ambiguous"),
        ("violen", r"unknown object 'violen'; did you mean violin\?$"),
        ("saxaphone", r"did you mean saxophone\?$"),
        ("accoustic guitar", r"did you mean acoustic_guitar\?$"),
        ("tuba", "the objects are cat, dog"),
        ("", "the objects are cat, dog"),
        ("dragon", "the objects are cat, dog"),
    ],
)
def test_a_name_that_is_not_found_says_what_may_be_meant(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name)


def test_what_is_stored_holds_the_objects_own_names() -> None:
    with pytest.raises(ValueError, match=r"unknown object 'Violin'; did you mean violin\?$"):
        object_index("Violin")


@pytest.mark.parametrize("shape", [(1000,), (2, 999), (0, 1000)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(…, n_images ≥ 1, 1000\)"):
        object_scores(torch.zeros(shape))
