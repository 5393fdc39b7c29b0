"""The starter model that is shipped is as its script makes it."""

from dataclasses import asdict
from pathlib import Path

from avsep import starter
from avsep.model import ModelConfig
from deploy.starter import build


def test_it_is_calibrated_as_the_script_says() -> None:
    config = ModelConfig.read(starter.PATH)
    evidence, separation = asdict(config.evidence), asdict(config.separation)
    assert {k: evidence[k] for k in build.EVIDENCE} == build.EVIDENCE
    assert {k: separation[k] for k in build.SEPARATION} == build.SEPARATION
    assert config.recipe == build.RECIPE and config.n_networks == 2


def test_its_card_is_the_scripts() -> None:
    """Up to the tables of clips and sources, which it fills in."""
    told, card = (
        (p.read_text()).partition("## Clips and recordings")[0]
        for p in (build.HERE / "card.md", Path(starter.PATH, "README.md"))
    )
    assert told == card
