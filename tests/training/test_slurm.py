"""SLURM jobs: processes that srun started, and processes in a shell of the job."""

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from running import QUIET, fit, make_material

from merv.errors import TrainingError
from merv.training.fit import cluster_environment

pytestmark = QUIET

SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
PER_NODE = {"SLURM_NTASKS_PER_NODE": "4"}


def setenv(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_shell_in_a_job_trains_alone(tmp_path, monkeypatch):
    material = make_material(tmp_path)
    setenv(monkeypatch, **SHELL)
    assert fit(material, tmp_path / "run", trainer__max_steps=1, trainer__devices=1) == 0


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
@pytest.mark.parametrize("name", ["train", "bash"])
def test_process_that_srun_did_not_start_with_others_is_not_part_of_a_group(monkeypatch, step, name):
    setenv(monkeypatch, **{**SHELL, **step, "SLURM_JOB_NAME": name})
    assert isinstance(cluster_environment(num_nodes=1), LightningEnvironment)


def test_processes_of_srun_form_a_group(monkeypatch):
    setenv(monkeypatch, **SHELL, **SRUN, **PER_NODE)
    environment = cluster_environment(num_nodes=1)
    assert isinstance(environment, SLURMEnvironment)
    assert (environment.world_size(), environment.global_rank()) == (4, 1)


def test_several_nodes_without_srun_are_an_error(monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)  # Lightning leaves it behind in other tests
    setenv(monkeypatch, **SHELL)
    with pytest.raises(TrainingError, match="srun --nodes=2"):
        cluster_environment(num_nodes=2)
    setenv(monkeypatch, NODE_RANK="0")
    assert isinstance(cluster_environment(num_nodes=2), LightningEnvironment)


@pytest.mark.parametrize(("tasks", "name"), [({}, "--ntasks-per-node"), (PER_NODE, "trainer.devices")])
def test_tasks_that_do_not_fit_the_devices_are_an_error(tmp_path, monkeypatch, capsys, tasks, name):
    setenv(monkeypatch, **SHELL, **SRUN, **tasks)
    assert fit(make_material(tmp_path), tmp_path / "run", trainer__devices=1) == 2
    assert name in capsys.readouterr().err


def test_environments_outside_slurm_are_chosen_by_lightning(monkeypatch):
    assert cluster_environment(num_nodes=1) is None
    setenv(monkeypatch, **SHELL, **SRUN)
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        setenv(monkeypatch, **{name: "0"})
    assert cluster_environment(num_nodes=1) is None  # torchrun
