"""Train a captioner (OpenVision 2), evaluate it on held-out images and write report.html.

  bazel run //apps:caption_train -- --config=apps/configs/caption_demo.py --workdir=/tmp/ov-demo
  ... --config=apps/configs/openvision2.py:img=Ti/16,res=160 --config.input.data_dir=/data/shards

The same command resumes an interrupted run. `--check` validates a run without training; `--compile`
compiles its train steps ahead of time.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before the slow imports

from absl import flags

from apps import launch

flags.adopt_module_key_flags(launch)  # --help lists them

if __name__ == "__main__":
  launch.run("caption_config")
