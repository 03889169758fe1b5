"""A node takes a job only when its own model, prompts and dataset are those that the job is about."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.dataset_writer import create_dataset
from common.errors import DataError, LopdError, UsageError
from common.prompts import load_prompts
from precompute.config import Generate, Sampling
from precompute.fleet.messages import Job, State
from precompute.fleet.ray_relay import at_home
from precompute.plan import plan_generation
from tests.precompute import tiny
from tests.precompute.conftest import Models


@dataclass(frozen=True)
class Case:
    job: Job
    model: Path
    cache: Path


@pytest.fixture
def case(models: Models, prompts: Path, tmp_path: Path) -> Case:
    """A dataset that has been begun, and the job as the supervisor tells it."""
    model = Path(shutil.copytree(models.student, tmp_path / "student"))
    config = Generate(
        model=str(model), prompts=str(prompts), cache=str(tmp_path / "cache"), sampling=Sampling(max_tokens=8)
    )
    planned = plan_generation("rollouts", config, load_prompts(config.prompts))
    create_dataset(config.cache, planned.plan)
    job = Job(
        phase="rollouts",
        section=config.model_dump(mode="json"),
        plan=planned.plan,
        model=config.model,
        folder="/of/another/box",
        max_model_len=planned.max_model_len,
        window=1,
    )
    return Case(job, model, tmp_path / "cache")


def refusal(job: Job) -> LopdError:
    with pytest.raises(LopdError) as caught:
        at_home(job, _unheard)
    return caught.value


def test_the_model_is_found_where_it_lies_on_this_node(case: Case) -> None:
    said: list[State] = []
    assert at_home(case.job, said.append).folder == str(case.model)
    assert [state.state for state in said] == ["loading"]


def test_another_model_under_the_same_path_is_refused(case: Case, models: Models) -> None:
    shutil.rmtree(case.model)
    shutil.copytree(models.orphan, case.model)
    error = refusal(case.job)
    assert isinstance(error, DataError)
    assert "differs in tensors_sha256" in error.what
    assert error.where == str(case.model)


def test_a_model_that_is_not_here_is_refused(case: Case) -> None:
    shutil.rmtree(case.model)
    assert isinstance(refusal(case.job), UsageError)


def test_a_dataset_on_another_nodes_disk_is_refused(case: Case) -> None:
    shutil.rmtree(case.cache)
    error = refusal(case.job)
    assert isinstance(error, UsageError)
    assert "cannot be seen from here" in error.what


def test_another_dataset_at_the_same_place_is_refused(case: Case) -> None:
    other = {**case.job.plan, "sampling": {**case.job.plan["sampling"], "seed": 7}}
    assert "another plan" in refusal(case.job.model_copy(update={"plan": other})).what


def test_other_prompts_under_the_same_path_are_refused(case: Case, prompts: Path) -> None:
    tiny.write_prompts(prompts, 3)
    error = refusal(case.job)
    assert isinstance(error, DataError)
    assert "prompts" in error.what


def test_another_vllm_is_refused(case: Case) -> None:
    other = {**case.job.plan, "engine": {**case.job.plan["engine"], "version": "vllm 0.1"}}
    error = refusal(case.job.model_copy(update={"plan": other}))
    assert isinstance(error, UsageError)
    assert "vllm 0.1" in error.what


def _unheard(state: State) -> None: ...
