"""Environment @docs for building the documentation site, created when @docs//:interpreter is first needed."""

load("//tools/python:pypi.bzl", "find_interpreter", "run")

def _docs_environment_impl(rctx):
    lock = rctx.path(Label("//tools/python:requirements-docs.lock"))
    shared = run(rctx, [find_interpreter(rctx), rctx.path(rctx.attr._environment), lock])
    rctx.file("interpreter.txt", shared + "/bin/python3\n")
    rctx.file("BUILD.bazel", 'filegroup(name = "interpreter", srcs = ["interpreter.txt"], visibility = ["//visibility:public"])\n')

docs_environment = repository_rule(
    implementation = _docs_environment_impl,
    attrs = {
        "_environment": attr.label(default = "//tools/python:environment.py", allow_single_file = True),
    },
    environ = ["OV_PYTHON", "OV_CACHE"],
)
