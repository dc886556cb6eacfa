"""@clients: the environment of the libraries that load exported weights (PyTorch, open_clip, timm, transformers, ONNX).

It is made when a target that names @clients//:interpreter is built, and not before.
"""

load("//tools/python:pypi.bzl", "find_interpreter", "run")

def _clients_environment_impl(rctx):
    lock = rctx.path(Label("//tools/python:requirements-clients.lock"))
    site = [str(rctx.path(Label("//tools/python:openvision_torchvision" + end))) for end in [".pth", ".py"]]
    shared = run(rctx, [
        find_interpreter(rctx),
        rctx.path(rctx.attr._environment),
        lock,
        "--pip=" + rctx.attr.torch,
        "--site=" + ",".join(site),
    ])
    python = shared + "/bin/python3"
    if rctx.execute([python, "-c", "import torch"]).return_code:
        fail(("%s was installed but cannot be imported: on Linux, PyPI's build wants CUDA libraries that are not here. " +
              "Remove %s, let pip find a CPU build, and try again; README.md of ov-convert says how.") % (rctx.attr.torch, shared))
    rctx.file("interpreter.txt", python + "\n")
    rctx.file("BUILD.bazel", 'filegroup(name = "interpreter", srcs = ["interpreter.txt"], visibility = ["//visibility:public"])\n')

clients_environment = repository_rule(
    implementation = _clients_environment_impl,
    attrs = {
        "torch": attr.string(mandatory = True),
        "_environment": attr.label(default = "//tools/python:environment.py", allow_single_file = True),
    },
    environ = ["OV_PYTHON", "OV_CACHE", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS"],
)
