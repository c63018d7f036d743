"""Muon trains TIGER's matrices, Adam the rest."""

from __future__ import annotations

from torch import nn

from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.tasks.separation import SeparationTask


def test_every_parameter_of_the_network_is_trained_once():
    task = SeparationTask(TIGER(TIGERConfig(channels=8, hidden_channels=8, blocks=1, heads=2)), matrix_learning_rate=0.01)
    optimizer = task._optimizer()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(task.parameters()))
    matrices, _ = optimizer.param_groups
    assert {id(one) for one in matrices["params"]} == {id(module.weight) for module in task.modules() if isinstance(module, nn.Linear)}
