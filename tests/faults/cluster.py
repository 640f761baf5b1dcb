"""A SLURM cluster of two nodes on this machine, without accounting, and what happens to jobs on it.

with cluster(folder) as environment:                 # its daemons, started here and ended afterwards
    snakemake(project, environment, "--retries", 1)  # through profiles/slurm
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from trial import Case, Trial, difference, fingerprint

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
KillWait=5
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=16821 CPUs=8 RealMemory=16000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=16822 CPUs=8 RealMemory=16000
PartitionName=short Nodes=ALL Default=YES
PartitionName=long Nodes=ALL
"""
SYSTEM = Path("/etc/slurm/slurm.conf")  # found without SLURM_CONF, which the executor takes out of a job's environment
PATH = "smoke/g2x3-walks/gpt2-2x32/next_token/default"
STEPS, MANY_STEPS = 600, 3000  # some checkpoints; more than a minute of training


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    programs = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if programs:
        return f"SLURM is not installed: {', '.join(programs)} missing (Debian: slurmctld slurmd slurm-client munge)"
    if not importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return "the executor is not installed: pip install -e .[slurm] -c constraints.txt"
    if SYSTEM.exists():
        return f"this machine belongs to a cluster: {SYSTEM}"
    return "" if os.getuid() == 0 else "only root can start munged and slurmd"


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a cluster's programs, for as long as its daemons are needed."""
    folder = Path(tempfile.mkdtemp(prefix="mutor-slurm-"))
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    daemons: list[subprocess.Popen] = []
    try:
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=socket.gethostname()))
        SYSTEM.parent.mkdir(exist_ok=True)
        SYSTEM.symlink_to(folder / "slurm.conf")
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        (folder / "state").mkdir()
        munge = [f"--{name}={folder}/{file}" for name, file in (
            ("key-file", "key"), ("socket", "munge.socket"), ("log-file", "munged.log"), ("pid-file", "munged.pid"),
            ("seed-file", "seed"),
        )]  # fmt: skip
        commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"])
        for command in (*commands, ["slurmd", "-D", "-c", "-N", "n1"], ["slurmd", "-D", "-c", "-N", "n2"]):
            daemons.append(started(command, environment, folder))
            time.sleep(1)
        for _ in range(30):
            states = told(environment, "sinfo", "--noheader", "--format=%t", "--partition=short").split()
            if states == ["idle"]:
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"the cluster's nodes are {states}; see {folder}")
        yield environment | {"MUTOR_CLUSTER": str(folder)}
    finally:
        told(environment, "scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        for file in folder.glob("*.pid"):  # of one that was started anew
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):
                late = psutil.Process(int(file.read_text()))
                late.terminate()
                late.wait(30)
        SYSTEM.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def started(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen:
    """A daemon."""
    with open(folder / "daemons.log", "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def told(environment: dict[str, str], *command: str) -> str:
    """What a program of the cluster says."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


class Jobs:
    """Snakemake through profiles/slurm in a project of its own; one setting, one seed."""

    def __init__(self, trial: Trial, folder: Path, environment: dict[str, str], **scale: Any):
        """scale: changes of the smoke scale."""
        self.folder, self.environment = folder, environment | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        shutil.copytree(trial.folder, folder, ignore=shutil.ignore_patterns("runs", "results", ".snakemake"))
        file = folder / "config/scales/smoke.yaml"
        recipe = {key: scale.pop(key) for key in ("steps", "accumulate") if key in scale}
        content = yaml.safe_load(file.read_text()) | scale
        every = {"log_every": 50, "eval_every": 100, "save_every": 100} if "steps" in recipe else {}
        content["recipes"]["star_graph"] |= recipe | every
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def start(self, *words: Any, profile: str = "slurm", config: tuple[str, ...] = ()) -> subprocess.Popen:
        """The workflow; what it says goes to log.txt."""
        command = [sys.executable, "-m", "snakemake", f"runs/{PATH}/index.json"]
        command += ["--workflow-profile", f"profiles/{profile}"]
        command += [*map(str, words), "--config", "scale=smoke", "seeds=[42]", *config]
        if profile == "slurm":
            command += ["--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "5"]
        with open(self.folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        return self.process

    def wait_for(self, pattern: str) -> Path:
        """Wait until the run has such a file."""
        for _ in range(600):
            for found in self.folder.glob(f"runs/{PATH}/seed42/{pattern}"):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.5)
        raise RuntimeError(f"no {pattern}: {self.said()[-500:]}")

    def job(self) -> str:
        """The number of the job that is running."""
        name = f"--name={self.said().partition('SLURM run ID: ')[2].split()[0]}"
        return told(self.environment, "squeue", "--noheader", "--format=%i", "--states=R", name).split()[0]

    def said(self) -> str:
        return (self.folder / "log.txt").read_text()

    def runs(self) -> dict[str, Any]:
        found = fingerprint(self.folder / "runs")
        return {name: what for name, what in found.items() if not name.endswith((".log", ".tsv"))}


def _undisturbed(jobs: Jobs) -> str:
    return _ended(
        jobs.start("--set-resources", "train:slurm_partition='long' if 'smoke' in wildcards.run else 'short'")
    )


def _ended(process: subprocess.Popen) -> str:
    code = process.wait(900)
    return f"ended with {code}" if code else ""


def _resumed(jobs: Jobs, process: subprocess.Popen) -> str:
    """Ended well, in a second job that went on from a checkpoint."""
    wrong = _ended(process)
    log = (jobs.folder / f"runs/{PATH}/run.log").read_text() + jobs.said()  # which has the logs of jobs that failed
    return wrong or ("" if "resumed from step" in log else "did not go on from a checkpoint")


def _cancelled(jobs: Jobs) -> str:
    process = jobs.start()
    jobs.wait_for("checkpoints/checkpoint-*/manifest.json")
    told(jobs.environment, "scancel", jobs.job())
    return _resumed(jobs, process)


def _killed(jobs: Jobs) -> str:
    process = jobs.start()
    jobs.wait_for("checkpoints/checkpoint-*/manifest.json")
    mine = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(jobs.folder)]
    (run,) = [p for p in mine if p.info["cmdline"][1:4] == ["-m", "mutor", "run"]]
    run.send_signal(signal.SIGKILL)
    return _resumed(jobs, process)


def _time_limit(jobs: Jobs) -> str:
    return _resumed(jobs, jobs.start("--set-resources", "train:runtime=1", "--retries", 9))


def _memory(jobs: Jobs) -> str:
    wrong = _ended(jobs.start())
    return wrong or ("" if jobs.said().count("has been submitted") == 2 else "was not submitted twice")


def _controller(jobs: Jobs) -> str:
    process, folder = jobs.start(), Path(jobs.environment["MUTOR_CLUSTER"])
    jobs.wait_for("checkpoints/checkpoint-*/manifest.json")
    psutil.Process(int((folder / "slurmctld.pid").read_text())).kill()
    time.sleep(10)
    started(["slurmctld", "-D"], jobs.environment, folder)
    return _ended(process)


def _two_nodes(jobs: Jobs) -> str:
    process = jobs.start(config=("processes_per_node=1",))
    jobs.wait_for("config_hash")
    nodes = told(jobs.environment, "squeue", "--noheader", "--format=%D").split()
    return _ended(process) or ("" if nodes == ["2"] else f"ran on {nodes} nodes")


def _hopeless(jobs: Jobs) -> str:
    began, process = time.monotonic(), jobs.start("--retries", 0)
    jobs.wait_for("checkpoints/checkpoint-*/manifest.json")
    told(jobs.environment, "scancel", jobs.job())
    killed = time.monotonic()
    code = process.wait(400)
    if code == 0 or time.monotonic() - killed > 90:
        return f"ended with {code}, {time.monotonic() - killed:.0f} s after the job"
    return "" if killed - began and "Error in rule train" in jobs.said() else "the job was not named"


FAULTS: dict[str, tuple[str, Callable[[Jobs], str], dict[str, Any]]] = {
    "undisturbed": ("nothing happens; the partition is chosen by scale", _undisturbed, {}),
    "cancelled": ("scancel while it trains", _cancelled, {"steps": STEPS}),
    "killed": ("kill -9 of the step's process", _killed, {"steps": STEPS}),
    "time limit": ("a job meets its time limit of a minute", _time_limit, {"steps": MANY_STEPS}),
    "memory": ("a job takes more memory than it asked for: the second asks for more", _memory, {"memory_mb": 700}),
    "controller": ("slurmctld is killed and started again", _controller, {"steps": STEPS}),
    "two nodes": ("two processes on two nodes, by srun", _two_nodes, {"processes": {"gpt2-2x32": 2}, "accumulate": 2}),
    "no retry": ("scancel without retries: the failure is named within 90 s", _hopeless, {"steps": STEPS}),
}


def outcome(name: str, trial: Trial, folder: Path, environment: dict[str, str]) -> str:
    """What is wrong after a fault: the job's end, or its files, other than those of the same run without a cluster."""
    _, attempt, scale = FAULTS[name]
    folder.mkdir(parents=True)
    jobs = Jobs(trial, folder / "cluster", environment, **scale)
    wrong = attempt(jobs)
    if wrong or name == "no retry":
        return f"{wrong}: {jobs.said()[-300:]}" if wrong else ""
    local = Jobs(trial, folder / "local", environment, **scale)
    return _ended(local.start("--cores", 2, profile="default")) or difference(jobs.runs(), local.runs())


def faults(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """Each fault above, one after the other; none where there can be no cluster."""
    why = missing()
    if why:
        print(f"  left out: {why}")
        return []
    found = []
    with cluster() as environment:
        for name, (what, _, _) in FAULTS.items():
            began, wrong = time.monotonic(), outcome(name, trial, folder / name.replace(" ", "-"), environment)
            print(f"  {what}: {wrong or 'as without a cluster'} ({time.monotonic() - began:.0f} s)", flush=True)
            found.append((Case(what, name, lambda home: ""), wrong))
    return found
