"""Train OpenVision, two towers and a caption decoder; evaluate it and write report.html.

  bazel run //apps:clip_train -- --config=apps/configs/clip_demo.py --workdir=/tmp/ov-clip
  ... --config=apps/configs/openvision.py:img=Ti/16,txt_name=Ti,txt_decoder_name=Ti,res=160
      --config.input.data_dir=/data/shards

The same command resumes an interrupted run. `--check` validates a run without training, `--compile`
compiles its train steps ahead of time; `--config.eval_only=True` evaluates its newest checkpoint.
"""

from apps.trainer import startup

if __name__ == "__main__":
  startup.set_up()  # before the slow imports

from absl import flags

from apps import launch

flags.adopt_module_key_flags(launch)  # --help lists them

if __name__ == "__main__":
  launch.run("clip_config")
