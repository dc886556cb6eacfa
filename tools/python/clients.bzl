"""Environment @clients of the libraries that load exported weights (PyTorch, open_clip, timm, transformers, ONNX).

It is created when a target that depends on @clients//:interpreter is first built.
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
        "--pip_index=" + rctx.attr.torch_index,
        "--site=" + ",".join(site),
    ])
    python = shared + "/bin/python3"
    rctx.file("interpreter.txt", python + "\n")

    # If PyTorch is missing, pytest_main.py skips the tests of this environment and shows the reason in this file.
    rctx.file("unavailable.txt", rctx.execute(["cat", shared + "/unavailable.txt"]).stdout)
    rctx.file("BUILD.bazel", """filegroup(
    name = "interpreter",
    srcs = ["interpreter.txt", "unavailable.txt"],
    visibility = ["//visibility:public"],
)
""")

clients_environment = repository_rule(
    implementation = _clients_environment_impl,
    attrs = {
        "torch": attr.string(mandatory = True),
        "torch_index": attr.string(mandatory = True),
        "_environment": attr.label(default = "//tools/python:environment.py", allow_single_file = True),
    },
    environ = ["OV_PYTHON", "OV_CACHE", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS"],
)
