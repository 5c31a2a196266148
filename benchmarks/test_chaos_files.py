"""Damage thousands of files and read them: each is read, refused by an error of ours, or left out with a warning."""

import pytest
from damaged_files import readings
from fuzzing import escaped, outcomes

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

COUNTS = {
    "journals": 2000,
    "checkpoints": 500,
    "metrics": 500,
    "baselines": 500,
    "histories": 500,
    "examples": 500,
    "counterexamples": 500,
    "certificates": 500,
    "rows": 10_000,
}


@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_no_damaged_file_ends_in_an_error_of_another_kind(tmp_path, capsys, kind, count):
    counts = outcomes(readings(kind, tmp_path, count))
    with capsys.disabled():
        print(f"\n{count} damaged {kind}: " + ", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    assert escaped(counts) == []
    assert sum(counts.values()) == count
