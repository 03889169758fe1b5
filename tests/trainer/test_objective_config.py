"""From settings to a loss: each setting arrives where it is meant to, and one that nothing reads is refused."""

import math
from functools import partial

import pytest
import torch

from common.errors import UsageError
from tests.trainer import build
from tests.trainer.states import tables, tokens_of
from trainer import objectives
from trainer.cli import settings_from
from trainer.config import OpdConfig, SftConfig
from trainer.loop import train
from trainer.run import rules_of

REQUIRED = ["model=m", "data=d", "output=o"]
CASES = {
    "objective=paper": objectives.paper,
    "objective=paper clip_advantage=0.3": partial(objectives.paper, clip=0.3),
    "objective=importance": partial(objectives.importance, max_ratio=2.0),
    "objective=importance max_importance_ratio=0.7": partial(objectives.importance, max_ratio=0.7),
    "objective=importance max_importance_ratio=inf clip_advantage=0.3": partial(
        objectives.importance, max_ratio=math.inf, clip=0.3
    ),
    "objective=proximal": partial(objectives.proximal, alpha=0.5),
    "objective=proximal proximal_alpha=0.2 clip_advantage=0.3": partial(objectives.proximal, alpha=0.2, clip=0.3),
    "objective=topk": objectives.topk,
    "objective=topk kl=forward": partial(objectives.topk, kl="forward"),
    "objective=topk kl=mixed": partial(objectives.topk, kl="mixed", forward_share=0.5),
    "objective=topk kl=mixed kl_forward_share=0.2": partial(objectives.topk, kl="mixed", forward_share=0.2),
    "objective=paper token_weights=entropy": lambda t: objectives.entropy_weight(t) * objectives.paper(t),
    "objective=paper token_weights=position": lambda t: objectives.position_weight(t) * objectives.paper(t),
    "objective=paper anchor=0.1": lambda t: objectives.paper(t) + 0.1 * objectives.anchor(t, 2.0),
    "objective=topk anchor=0.1 max_importance_ratio=0.7": lambda t: (
        objectives.topk(t) + 0.1 * objectives.anchor(t, 0.7)
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_the_loss_is_what_the_settings_say(words):
    tokens = tokens_of(*tables(), k=3)
    losses = {
        each: rules_of(settings_from(OpdConfig, "opd", [*REQUIRED, *each.split()])).loss(tokens) for each in CASES
    }
    torch.testing.assert_close(losses[words], CASES[words](tokens))
    others = [loss for each, loss in losses.items() if each != words]
    twins = 1 if words in ("objective=proximal",) else 0
    assert sum(torch.allclose(loss, losses[words]) for loss in others) <= twins


@pytest.mark.parametrize(("stored", "chosen"), [(0, "importance"), (3, "topk")])
def test_auto_is_what_the_dataset_has_the_scores_for(example, alone, tmp_path, stored, chosen):
    rows = build.graded(build.open_model(example.teacher), example.rows, stored)
    data = build.make_dataset(
        tmp_path / "scored", rows, kind="scored", policy=example.student, teacher=example.teacher, topk=stored
    )
    same = {"compute": "float32", "token_budget": 90, "rows_per_step": 8, "lr": 1e-2, "export_dtype": "float32"}
    lines, weights = list[str](), list[bytes]()
    for objective in ("auto", chosen):
        output = tmp_path / f"by-{objective}"
        config = OpdConfig(
            model=str(example.student), data=data, output=str(output), objective=objective, max_steps=2, **same
        )
        train(config, alone, lines.append)
        weights.append((output / "export" / "model.safetensors").read_bytes())
    assert any(line.startswith(f"objective: {chosen}") for line in lines)
    assert weights[0] == weights[1]


def test_fine_tuning_imitates():
    tokens = tokens_of(*tables())
    rules = rules_of(SftConfig(model="m", data="d", output="o"))
    assert torch.equal(rules.loss(tokens), -tokens.student)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("objective=topk clip_advantage=2", "clip_advantage: objective=topk does not use it"),
        ("objective=paper kl=forward", "kl: objective=paper does not use it. Leave it out, or set objective=topk"),
        ("objective=paper kl_forward_share=0.2", "kl_forward_share: kl=reverse does not use it"),
        ("objective=topk kl=forward kl_forward_share=0.2", "kl=forward does not use it. Leave it out, or set kl=mixed"),
        ("objective=importance proximal_alpha=0.2", "proximal_alpha: objective=importance does not use it"),
        ("proximal_alpha=0.2", "proximal_alpha: objective=auto does not use it"),
        ("topk=4", "topk: objective=auto does not use it. Leave it out, or set objective=topk"),
        ("objective=paper topk=4", "topk: objective=paper does not use it"),
        ("objective=proximal proximal_alpha=0", "proximal_alpha: Input should be greater than 0"),
        ("objective=proximal proximal_alpha=1.1", "proximal_alpha: Input should be less than or equal to 1"),
        ("objective=topk kl=mixed kl_forward_share=1", "kl_forward_share: Input should be less than 1"),
        ("objective=paper clip_advantage=0", "clip_advantage: Input should be greater than 0"),
        ("anchor=-1", "anchor: Input should be greater than or equal to 0"),
        ("token_weights=random", "token_weights: Input should be 'none', 'entropy' or 'position'"),
        ("objective=ppo kl=mixed", "objective: Input should be 'paper', 'importance', 'proximal', 'topk' or 'auto'"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(words, said):
    with pytest.raises(UsageError) as error:
        settings_from(OpdConfig, "opd", [*REQUIRED, *words.split()])
    assert said in str(error.value) and "(command line)" in str(error.value)


def test_the_refusal_names_the_recipe_that_holds_the_setting(tmp_path):
    recipe = tmp_path / "run.toml"
    recipe.write_text('[opd]\nobjective = "topk"\nkl = "forward"\n')
    with pytest.raises(UsageError, match=r"kl: objective=paper does not use it.*run.toml \[opd\]"):
        settings_from(OpdConfig, "opd", [str(recipe), *REQUIRED, "objective=paper"])


@pytest.mark.parametrize("field", ["clip_advantage", "proximal_alpha", "topk", "kl", "kl_forward_share"])
def test_defaults_are_never_refused(field):
    for objective in ("auto", "paper", "importance", "proximal", "topk"):
        config = settings_from(OpdConfig, "opd", [*REQUIRED, f"objective={objective}"])
        assert getattr(config, field) == OpdConfig.model_fields[field].default
