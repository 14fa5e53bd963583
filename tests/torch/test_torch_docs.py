"""The blocks of the documentation that need PyTorch run."""

import pathlib
import re

import pytest
import torch
from drawn import norm_fc_file

from lolo.optimizers import weights_file

pytestmark = pytest.mark.torch

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "use.md"


def test_the_block_about_param_groups_gives_adamw_to_embedding_and_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = norm_fc_file()
    weights_file.write_weights("mine.safetensors", weights.meta_params, learner=weights.learner)
    model = torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(9, 4), "body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 9)}
    )
    (block,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"model": model}
    exec(compile(block, PAGE.name, "exec"), names)
    optimizer = names["optimizer"]
    model["head"](model["body"](model["embedding"](torch.arange(9)))).square().mean().backward()
    optimizer.step()
    with_network = [name for name, p in model.named_parameters() if "row" in optimizer.state[p]]
    assert with_network == ["body.weight"] and {len(optimizer.state[p]) for p in model.parameters()} == {3, 5}
