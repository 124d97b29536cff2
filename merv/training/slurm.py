"""Detect whether SLURM's srun started the processes of a run. Lightning cannot always tell.

Lightning takes part in a SLURM job as soon as SLURM_NTASKS is set. But batch scripts and interactive shells
have this variable, too: a process in them would wait for processes that do not exist.
"""

from __future__ import annotations

import logging
import os

from lightning import Trainer
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from merv.errors import TrainingError

logger = logging.getLogger(__name__)


def srun_tasks() -> int | None:
    """How many processes `srun` has started, of which this is one; None outside SLURM and under torchrun.

    srun alone sets SLURM_STEP_NUM_TASKS. A shell in a job counts as one process.
    """
    in_job = "SLURM_NTASKS" in os.environ or "SLURM_JOB_ID" in os.environ
    if not in_job or TorchElasticEnvironment.detect():
        return None
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def cluster_environment(num_nodes: int) -> ClusterEnvironment | None:
    """The environment to give to Lightning in a SLURM job; None leaves the choice to Lightning.

    Raises:
        TrainingError: The run needs processes that srun has to start, or Lightning cannot use those that it
            has started.
    """
    tasks = srun_tasks()
    if tasks is None:
        return None
    if tasks > 1:
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise TrainingError(
                f"srun started {tasks} processes, but Lightning needs to know how many run on each node. Use "
                "--nodes and --ntasks-per-node instead of --ntasks, or for one process: srun --ntasks=1."
            )
        return SLURMEnvironment()
    if num_nodes > 1 and "NODE_RANK" not in os.environ:  # users set it to start each node by hand
        raise TrainingError(
            f"trainer.num_nodes is {num_nodes}, but srun did not start this process, so nothing runs on the "
            f"other nodes. Run `srun --nodes={num_nodes} --ntasks-per-node=DEVICES merv fit ...`."
        )
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        logger.warning(
            "SLURM_NTASKS is %s, but srun did not start this process: training uses only the devices of this "
            "node (trainer.devices). To use the tasks of the job, run `srun merv fit ...`.",
            os.environ["SLURM_NTASKS"],
        )
    return LightningEnvironment()


def check_tasks(trainer: Trainer) -> None:
    """Raise TrainingError unless srun has started one process for each device of the run."""
    tasks, devices = srun_tasks(), trainer.num_devices * trainer.num_nodes
    if tasks is not None and tasks > 1 and tasks != devices:
        raise TrainingError(
            f"srun started {tasks} processes, but the run has {devices}: trainer.devices="
            f"{trainer.num_devices} on trainer.num_nodes={trainer.num_nodes}. Set them to srun's "
            "--ntasks-per-node and --nodes."
        )
