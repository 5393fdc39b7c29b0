"""Dogs that are low tones, violins that are high ones, and a model that knows both by construction."""

import math

import torch

from avsep.factors import ExtractionConfig
from avsep.model import Model, ModelConfig, NetworkConfig, SeparationConfig
from avsep.objects import AUDIOSET_23, SoundObject, Vocabulary, object_index
from avsep.stft import STFT

RATE = 2000
SMALL = STFT(sample_rate=RATE, n_fft=200, hop_length=100)  # F = 101
DOG, VIOLIN = object_index("dog"), object_index("violin")
PITCH = {DOG: 200, VIOLIN: 700}  # Hz
UNSEEN = Vocabulary((SoundObject("dog"), SoundObject("violin")))  # no picture network knows them: none is loaded


def model(vocabulary: Vocabulary = AUDIOSET_23, **separation: object) -> Model:
    """A network that knows by construction: low bases are dogs, high ones violins, by 20 points of score."""
    dog, violin = vocabulary.index("dog"), vocabulary.index("violin")
    config = ModelConfig(
        vocabulary=vocabulary,
        extraction=ExtractionConfig(stft=SMALL, n_bases=6, n_iter=60),
        network=NetworkConfig(n_subconcepts=1, hidden=2, published_head=False),
        separation=SeparationConfig(**{"window_s": 2.0, "overlap_s": 0.4, "n_iter": 60} | separation),
    )
    network = config.build().eval()
    with torch.no_grad():
        network.shared[0].bias.zero_()
        network.shared[0].weight.zero_()
        network.shared[0].weight[0, :45] = 1.0  # up to 450 Hz
        network.shared[0].weight[1, 45:] = 1.0
        network.subconcepts.bias.fill_(-10.0)
        network.subconcepts.weight.zero_()
        network.subconcepts.weight[dog, 0] = network.subconcepts.weight[violin, 1] = 20.0
    return Model(config, network)


def tone(index: int, seconds: float, rhythm: float = 3.0) -> torch.Tensor:
    t = torch.arange(int(RATE * seconds)) / RATE
    return torch.sin(2 * math.pi * PITCH[index] * t) * (torch.sin(2 * math.pi * rhythm * t + index) > -0.3)
