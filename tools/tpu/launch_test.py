"""Tests of manifests: golden files, behavior with fake programs, and error messages."""

import ast
import functools
import importlib.util
import os
from pathlib import Path
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ov_sharding import distributed
from tools.testing import program
from tools.tpu import job, ssh_program, tpu
from tools.tpu.job import Job

_DATA = Path(__file__).parent / "testdata"
_APP = ["--config=apps/configs/openvision2.py:img=L/14,res=224"]
_GKE = ["--topology=v4-512", "--image=us-docker.pkg.dev/p/r/openvision:1", *_APP]
_BUCKET = "--workdir=gs://my-bucket/runs/l14"
_SLURM = ["--kind=slurm", "--nodes=8", "--gpus=8", *_APP]
_SSH = ["--kind=ssh", "--checkout=/srv/openvision", "--workdir=/data/my run", *_APP]


_tool = functools.partial(program.run, tpu, "launch", cwd=Path.cwd())


def _written(*arguments: str) -> str:
  done = _tool(*arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  "golden, arguments",
  [
    ("jobset_v4_512.yaml", [*_GKE, _BUCKET, "--name=l14", "--spot", "--", "--config.seed=1"]),
    (
      "jobset_two_slices.yaml",
      [
        "--topology=v5litepod-256", "--slices=2", "--image=openvision", "--app=clip_train",
        "--config=apps/configs/openvision.py", "--workdir=gs://my-bucket/clip/", "--grace=60",
        "--service_account=trainer", "--restarts=0",
      ],
    ),
    (
      "slurm.sh",
      [
        *_SLURM, "--workdir=/data/my run", "--partition=gpu", "--account=vision-1",
        "--time=2-00:00:00", "--grace=600", "--", "--config.note=it's $(here)",
      ],
    ),
  ],
)  # fmt: skip
def test_golden(golden: str, arguments: list[str]):
  assert _written(*arguments) == (_DATA / golden).read_text()


def test_golden_end_of_a_script_for_ssh(tmp_path: Path):
  listed = tmp_path / "hosts.txt"
  listed.write_text("# rack 1\nnode-1.lab\n\nme@10.0.0.2  # the fast one\n")
  arguments = ["--coordinator=10.0.0.1", "--restarts=5", "--", "--config.note=it's $(here)"]
  text = _written(*_SSH, f"--hosts_file={listed}", *arguments)
  assert text == job.HEAD + (_DATA / "ssh_end.txt").read_text()
  hosts = [*_SSH, "--hosts=node-1.lab,me@10.0.0.2"]
  same = _written(*hosts, "--extras=cpu", "--port=5000")
  assert "hosts=['node-1.lab', 'me@10.0.0.2'],\n      coordinator='node-1.lab:5000'" in same
  assert "'--workdir=/data/my run'" in same and f"'{_BUCKET}'" in _written(*hosts, _BUCKET)
  assert "locks='tools/python/requirements.lock'" in same and "platforms='cpu'" in same


def test_a_jobset_has_a_pod_for_each_host():
  found = yaml.safe_load(_written(*_GKE, _BUCKET, "--slices=3"))
  (jobs,) = found["spec"]["replicatedJobs"]
  job = jobs["template"]["spec"]
  limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
  assert jobs["replicas"] == 3 and job["completions"] == job["parallelism"] == 64
  assert job["completions"] * limits["google.com/tpu"] == 256  # chips of a v4-512
  assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"


def _expand(text: str) -> str:
  """Expand an argument by the rules of Kubernetes (third_party/forked/golang/expansion).

  $$ is a dollar. $(NAME) is a variable, and unchanged if it is undefined. Other dollars are
  unchanged.
  """

  def one(found: re.Match[str]) -> str:
    return "$" if found[0] == "$$" else {"$(HOME)": "/root", "$()": ""}.get(found[0], found[0])

  return re.sub(r"\$\$|\$\([^)]*\)", one, text)


# Each must reach the app unchanged through YAML, Kubernetes, a shell and Python.
_ODD = [
  "--a=$(HOME)", "--b=$HOME", "--c=$$(HOME)", "--d=$$", "--e=$", "--f=$$$(HOME)", "--g=$()",
  "--h='x' \"y\" `id` $(id) ${HOME}", "--i=a: b # c", "--j=ü 日本 é", "--k=a\\nb\\", "--l=~/x",
  "--m=100% %s {name} {0}", "--n=!event", "--o=*?[a]", "--p= two  spaces ", "--q=- &x *y",
  "--r=('^a$',)", "--s=\\$(HOME) \\\\", "--t=|&;<>()", "--u==", "--v=null", "", "-", "x y",
]  # fmt: skip


def test_special_characters_pass_through_kubernetes():
  assert _expand("$$(HOME) $$ $(HOME) $ $x") == "$(HOME) $ /root $ $x"
  text = _written(*_GKE, _BUCKET, "--", *_ODD)
  pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert [_expand(argument) for argument in container["command"]][-len(_ODD) :] == _ODD


def test_special_characters_pass_through_ssh():
  """The script contains them as Python, and passes them to the shell of a host in one line."""
  text = _written(*_SSH, "--hosts=a", "--", *_ODD)
  call = next(n for n in ast.walk(ast.parse(text[len(job.HEAD) :])) if isinstance(n, ast.Call))
  settings = {k.arg: ast.literal_eval(k.value) for k in call.args[0].keywords}
  command = ssh_program.on_host("x", "/c", "l", settings["arguments"], {})
  assert command[1:3] == ["bash", "-c"]
  command[3] = 'printf "%s\\0" "$@"'
  done = subprocess.run(["sh", "-c", shlex.join(command)], capture_output=True, check=True)
  assert done.stdout.decode().split("\0")[:-1][-len(_ODD) :] == _ODD


def test_initialization_reads_the_variables_of_clusters(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
  pod = yaml.safe_load((_DATA / "jobset_v4_512.yaml").read_text())
  spec = pod["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  env = {e["name"]: e["value"] for e in spec["containers"][0]["env"]}
  gke = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
  assert distributed.detect_cluster(env | gke) == "TPU"

  script = (_DATA / "slurm.sh").read_text()
  assert "export JAX_PLATFORMS=cuda,cpu" in script and "OV_COORDINATOR" not in script
  step = dict.fromkeys(("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"), "0")
  step |= {"SLURM_STEP_NODELIST": "n[1-8]", "SLURM_NTASKS": "64", "JAX_PLATFORMS": "cuda,cpu"}
  assert distributed.detect_cluster(step) == "Slurm"


_POLITE = "trap 'sleep 0.2; echo saved; exit 143' TERM; touch up; while :; do sleep 0.05; done"


class Cluster:
  """Fake Slurm programs: srun runs `app` once, scontrol records its arguments."""

  def __init__(self, folder: Path, app: str):
    self.folder = folder
    script = _written(*_SLURM, "--workdir=/data/my run", "--restarts=2", "--", *_ODD)
    (folder / "job.sh").write_text(script)
    environment = folder / "tools/python/environment.py"
    environment.parent.mkdir(parents=True)
    environment.write_text("print('/venv')")
    (folder / "packages/ov-data").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, text in {
      "srun": f'printf "%s\\n" "$@" > srun.txt; echo "$PYTHONPATH" > path.txt\n{app}',
      "scontrol": 'echo "$@" > scontrol.txt',
      "python3": f'exec "{sys.executable}" "$@"',
    }.items():
      program = folder / "bin" / name
      program.write_text(f"#!/bin/bash\n{text}\n")
      program.chmod(0o755)

  def start(self, restarts: int = 0) -> subprocess.Popen[str]:
    env = {
      "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(self.folder),
      "SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    command = ["bash", str(self.folder / "job.sh")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

  def requeued(self) -> bool:
    calls = self.folder / "scontrol.txt"
    return calls.exists() and calls.read_text() == "requeue 41\n"


def test_arguments_reach_srun_unchanged(tmp_path: Path):
  cluster = Cluster(tmp_path, "exit 0")
  assert cluster.start().wait(timeout=20) == 0
  command = (tmp_path / "srun.txt").read_text().splitlines()
  assert command[:4] == ["--kill-on-bad-exit=1", "/venv/bin/python3", "-m", "apps.caption_train"]
  assert command[4:] == [*_APP, "--workdir=/data/my run", *_ODD]
  path = (tmp_path / "path.txt").read_text().strip()
  assert path == f"{tmp_path}:{tmp_path}/packages/ov-data/"


@pytest.mark.parametrize(
  "code, restarts, requeued",
  [(0, 0, False), (1, 0, True), (1, 1, True), (1, 2, False), (2, 0, False)],
)
def test_slurm_restarts_failed_jobs(tmp_path: Path, code: int, restarts: int, requeued: bool):
  cluster = Cluster(tmp_path, f"exit {code}")
  assert cluster.start(restarts).wait(timeout=20) == (0 if requeued else code)
  assert cluster.requeued() is requeued


def test_slurm_stops_in_time_and_requeues(tmp_path: Path):
  cluster = Cluster(tmp_path, _POLITE)
  process = cluster.start(restarts=99)  # a stop is not a failure
  deadline = time.monotonic() + 20
  while not (tmp_path / "up").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=20)[0]
  assert "saved\nstopped by SIGTERM; queued again\n" in said
  assert process.returncode == 0 and cluster.requeued()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([*_GKE, "--workdir=/data/run"], "--workdir='/data/run'; expected gs://BUCKET"),
    ([*_GKE, "--workdir=gs://my-bucket/"], "expected gs://BUCKET/PATH"),
    ([*_GKE, "--workdir=gs://my-bucket/a,b"], "expected gs://BUCKET"),
    ([*_GKE, _BUCKET, "--image=x y"], "--image='x y'"),
    ([*_GKE, _BUCKET, "--name=x: y"], "--name='x: y'"),
    ([*_GKE, _BUCKET, f"--name={'x' * 41}"], "has 41 letters; expected at most 40"),
    ([*_GKE, _BUCKET, "--topology=v4-9"], "v4 comes in the sizes"),
    ([*_GKE, _BUCKET, "--nodes=2"], "--nodes is for --kind=slurm, not for jobset"),
    ([*_GKE], "--workdir is missing"),
    ([*_GKE, _BUCKET, "--", "--a=x\ny"], "in one line"),
    ([*_SLURM, "--workdir=s3://my-bucket/run"], "expected gs://BUCKET"),
    ([*_SLURM, "--workdir=/d", "--spot"], "--spot is for --kind=jobset"),
    ([*_SLURM, "--workdir=/d", "--time=2h"], "--time='2h'; expected HH:MM:SS"),
    ([*_SLURM, "--workdir=/d", "--partition=a b"], "--partition='a b'"),
    ([*_SLURM, "--workdir=/d", "--gpus=0"], "flag --gpus=0"),
    ([*_SLURM, "--workdir=/d", "--app=export"], "caption_train|clip_train"),
    ([*_SLURM, "--workdir=/d", "--out=no/such/folder"], "--out=no/such/folder: No such"),
    (_SSH, "give --hosts=A,B,user@C or --hosts_file=FILE"),
    ([*_SSH, "--hosts=a", "--hosts_file=b"], "and not both"),
    ([*_SSH, "--hosts_file=no.txt"], "--hosts_file=no.txt: No such file"),
    ([*_SLURM, "--workdir=/d", "--grace=70000"], "--grace=70000; expected seconds from 1 to 65535"),
    ([*_SLURM, "--workdir=/d", f"--restarts={10**30}"], "flag --restarts=1000"),
    ([*_SSH, "--hosts=a,-oProxyCommand=x"], "'-oProxyCommand=x'; expected HOST or USER@HOST"),
    ([*_SSH, "--hosts=a,b c"], "'b c'; expected HOST"),
    ([*_SSH, "--hosts=a,b,a"], "--hosts has a twice"),
    ([*_SSH, "--hosts=a", "--coordinator=b:1"], "--coordinator='b:1'; expected the address"),
    ([*_SSH, "--hosts=a", "--checkout=~/openvision"], "expected an absolute path"),
    ([*_SSH, "--hosts=a", "--workdir=gs://my-bucket"], "expected gs://BUCKET/PATH"),
    ([*_SSH, "--hosts=a", "--time=1:00:00"], "--time is for --kind=slurm, not for ssh"),
    ([*_SLURM, "--workdir=/d", "--zone=us-central2-b"], "--zone is not a flag of launch"),
  ],
)
def test_mistakes_give_one_line_errors(tmp_path: Path, arguments: list[str], message: str):
  done = _tool(*arguments, cwd=tmp_path)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_out_is_relative_to_the_users_folder(tmp_path: Path):
  done = _tool(*_GKE, _BUCKET, "--out=job.yaml", cwd=tmp_path)
  assert done.returncode == 0 and not done.stdout
  assert yaml.safe_load((tmp_path / "job.yaml").read_text())["kind"] == "JobSet"


def test_a_job_validates_its_fields():
  with pytest.raises(ValueError, match="--config is missing"):
    Job("x", "caption_train", "", "/d", (), 1, 0)


def test_a_list_of_hosts_that_is_not_text(tmp_path: Path):
  file = tmp_path / "hosts"
  file.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match=f"--hosts_file={file}: .*expected a text file in UTF-8"):
    job.hosts_of("", str(file))
  file.write_bytes(b"\xef\xbb\xbfa\nb\n")
  assert job.hosts_of("", str(file)) == ["a", "b"]
  file.write_text("# none yet\n")
  with pytest.raises(ValueError, match="contains no host"):
    job.hosts_of("", str(file))
