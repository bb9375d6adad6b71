"""The scripts and manifests of docs/distributed.md: whole, consistent, and in words that torchrun and CleanGPT know."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from cleangpt.config import ParallelConfig
from cleangpt.experiment_files import experiments

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The first fenced block under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (text, *_) = re.findall(r"^```text\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return str(text)


def manifests(heading: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all(block(heading)))


def commands() -> list[list[str]]:
    """Every torchrun on the page, as words."""
    joined = PAGE.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if re.match(r"\s*(srun )?torchrun ", line)]
    (_, job) = manifests("Kubernetes")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return [shlex.split(line.replace("srun ", "")) for line in lines] + [container["command"]]


def test_torchrun_knows_every_option_and_cleangpt_every_word() -> None:
    found = commands()
    assert len(found) >= 6
    for words in found:
        options = get_args_parser().parse_args(words[1:])
        assert options.module and options.training_script == "cleangpt"
        command, experiment, *_ = options.training_script_args
        assert command == "train" and experiment in experiments()
        if options.nnodes != "1:1":
            assert options.rdzv_backend == "c10d" and options.rdzv_endpoint.endswith(":29500")
            assert any(word.startswith("--run-dir") for word in words), "a job that restarts must find its run"


def test_the_kubernetes_job_and_its_service_belong_together() -> None:
    service, job = manifests("Kubernetes")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = container["command"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]} and pod["subdomain"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["publishNotReadyAddresses"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in words
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2 and "--nnodes=2" in words
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (variable,) = container["env"]
    assert int(variable["value"]) < pod["terminationGracePeriodSeconds"]


def test_the_skypilot_task_is_yaml() -> None:
    (task,) = manifests("SkyPilot")
    assert task["num_nodes"] == 2 and "torchrun" in task["run"] and "/shared" in task["file_mounts"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_is_bash_and_saves_in_the_time_that_its_signal_leaves() -> None:
    script = block("SLURM")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (signal,) = re.findall(r"--signal=TERM@(\d+)", script)
    (timeout,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script)
    assert int(timeout) < int(signal)


def test_the_example_of_ray_is_python() -> None:
    compile(block("Ray Train"), "ray.py", "exec")


def test_every_strategy_is_explained() -> None:
    hint = str(ParallelConfig.__annotations__["strategy"])
    (table,) = re.findall(r"^\| `parallel.strategy` \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert set(re.findall(r"['\"](\w+)['\"]", hint)) <= set(re.findall(r"`(\w+)`", table))
