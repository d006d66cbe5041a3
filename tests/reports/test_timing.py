"""Where a run's time has gone, by its notes."""

import json

from spin_jax.reports import timing


def loop(at: float, name: str, seconds: float, useful: float = 0.0) -> dict:
    return {"at": at, "loop": name, "seconds": seconds, "useful_seconds": useful}


def test_starts_are_added_up():
    """Two starts, 100 and 50 seconds to their last loops; a third that made none; loops of one name in both."""
    rows = [
        {"at": 1010.0, "started": 1000.0, "devices": "8 x TPU v4"},
        loop(1060.0, "SFT", 40.0, 30.0),
        loop(1100.0, "iteration 0: train", 35.0, 20.0),
        {"at": 5005.0, "started": 5000.0},
        loop(5050.0, "iteration 0: train", 30.0, 25.0),
        {"at": 9000.0, "started": 8990.0},
    ]
    loops = {("SFT", None): 40.0, ("train", 0): 65.0}
    assert timing.spent(rows) == timing.Spent(wall=150.0, useful=75.0, loops=loops, starts=2)
    assert timing.spent(rows[:1]) is None and timing.spent([]) is None


def test_notes_are_added_to_those_before_and_never_stop_a_run(tmp_path, caplog):
    for number in range(2):
        timing.note(tmp_path, {"loop": f"iteration {number}: train"})
    rows = [json.loads(line) for line in (tmp_path / timing.FILE).read_text().splitlines()]
    assert [row["loop"] for row in rows] == ["iteration 0: train", "iteration 1: train"] and rows[0]["at"] > 1e9
    (tmp_path / "file").write_text("")
    timing.note(tmp_path / "file", {"loop": "train"})
    assert "cannot be written" in caplog.text
