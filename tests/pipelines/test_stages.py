import pytest

from avsep import stages


def test_a_profiles_rates_are_clips_by_time() -> None:
    """Two workers busy for 8 + 4 of 2 × 8 seconds, on 24 clips."""
    lines = stages.profile({"decode": 4.0, "factorize": 8.0, "fetch": 0.0}, 24, 2, 8.0)
    assert lines[0] == "factorize: 8.0 s, 67%, alone 6.00 clips/s"
    assert lines[1] == "decode: 4.0 s, 33%, alone 12.00 clips/s"
    assert lines[2] == (
        "the run: 3.00 clips/s on 2 workers, 50% of factorize alone, "
        "75% of the 4.00 clips/s that the stages together allow"
    )


@pytest.mark.parametrize(("seconds", "n_clips"), [({}, 3), ({"decode": 1.0}, 0), ({"decode": 0.0}, 3)])
def test_nothing_done_has_no_profile(seconds: dict[str, float], n_clips: int) -> None:
    assert stages.profile(seconds, n_clips, 2, 1.0) == []
