"""Kills at moments nobody chose cost the steps since the last save, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_runs
from kill_runs import SAVE_EVERY


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 40), pytest.param(20, 150, marks=pytest.mark.slow)]
)
def test_random_kills_change_nothing(tmp_path, kills, steps, quick_children):
    corpus = train_runs.corpus(tmp_path / "corpus").folder
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = [sys.executable, Path(__file__).parent / "kill_runs.py", corpus, whole, killed]
    done = subprocess.run(
        [*map(str, script), str(steps), str(kills), "5"],
        # Lives are compared with each other, bit for bit: all have the same programs.
        env={**os.environ, **quick_children},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) == kills
    for life in lives:
        # A save has until the next one is due to be complete.
        assert life["logged"] <= life["saved"] + 2 * SAVE_EVERY, life
        assert life["saved"] >= life["began"], life
    assert any(life["saved"] > life["began"] for life in lives)
    assert all(life["partial"] for life in lives if life["inside"]), "no kill came inside a save"
    assert lives[-1]["saved"] < steps, "the run ended before its kills did"
    assert [step for step, _ in train_runs.losses(killed)] == list(range(1, steps + 1))
    assert train_runs.losses(killed) == train_runs.losses(whole)
    assert train_runs.digest(killed, steps) == train_runs.digest(whole, steps)
