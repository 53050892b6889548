"""The advice held against the runs of the lab that are kept in docs/results."""

import importlib.util
from pathlib import Path

import pytest
import torch

from anybatch.lab.data import load

SCRIPT = Path(__file__).parents[1] / "scripts" / "judge_advice.py"


@pytest.mark.real
def test_within_a_point_of_the_best_in_nine_of_ten_settings() -> None:
    """In each the advised method was run, and it is the best or within a point of it in nine of ten."""
    spec = importlib.util.spec_from_file_location("judge_advice", SCRIPT)
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    torch.set_num_threads(1)
    dataset, behind = load("embedded", 128, 1), []
    for setting in judge.settings():
        advice = judge.advice_for(setting, dataset)
        behind.append(setting.points[setting.best] - setting.of(advice.method))
    assert len(behind) >= 10
    assert sum(points <= 1 for points in behind) >= 0.9 * len(behind)
