"""Python targets of this repository. `deps` holds exactly what the `srcs` import; //tools/lint:tree_test checks it."""

load("//tools/python:packages.bzl", "PACKAGES")

# PYTHONSAFEPATH keeps the directory of the main file off sys.path, where undeclared neighbours could be imported.
_ENV = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONSAFEPATH": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# Names the interpreter of the scripts of ov_convert/clients; ov_convert.client_env finds it among the runfiles.
_CLIENTS = "@clients//:interpreter"

# XLA maps the buffers of each step anew on a CPU; in huge pages that costs 1/500 of the page faults. glibc only.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

def _sources():
    """Shows the files of this Bazel package to //tools/lint."""
    if native.package_name() not in PACKAGES:
        fail("add %r to PACKAGES in tools/python/packages.bzl: lint and wall test see what is listed there" % native.package_name())
    if not native.existing_rule("sources"):
        native.filegroup(
            name = "sources",
            srcs = native.glob(["**"], exclude = ["**/__pycache__/**", "**/*.egg-info/**", "build/**"]),
            visibility = [
                "//:__pkg__",
                "//tests/standalone:__pkg__",
            ],
        )

def ov_py_library(name, srcs, deps = [], **kwargs):
    """A py_library. A package's own is named like its directory and has imports = ["."]."""
    _sources()
    native.py_library(name = name, srcs = srcs, deps = deps, srcs_version = "PY3", **kwargs)

def ov_py_binary(name, srcs, deps = [], env = {}, clients = False, **kwargs):
    """A py_binary; `main` is needed only where there are several srcs. `clients` as for ov_py_test."""
    _sources()
    if clients:
        kwargs["data"] = kwargs.get("data", []) + [_CLIENTS]
    native.py_binary(
        name = name,
        srcs = srcs,
        main = kwargs.pop("main", srcs[0]),
        deps = deps,
        env = dict(dict(_ENV, **_HUGE_PAGES), **env),
        python_version = "PY3",
        **kwargs
    )

def ov_py_test(name, srcs, deps = [], devices = 1, clients = False, size = "small", args = [], env = {}, **kwargs):
    """Runs pytest on the srcs, on simulated CPU devices.

    Args:
      name: of the target.
      srcs: test files.
      deps: what the srcs import; pytest itself need not be named.
      devices: how many CPU devices jax sees.
      clients: whether scripts of ov_convert/clients are run, so that their environment must be there.
      size: small 60 s, medium 300 s, large 900 s.
      args: for pytest.
      env: variables beside those above.
      **kwargs: of py_test: data, shard_count, tags, timeout, ...
    """
    _sources()
    if clients:
        kwargs["data"] = kwargs.get("data", []) + [_CLIENTS]
    simulated = {"XLA_FLAGS": "--xla_force_host_platform_device_count=%d" % devices} if devices > 1 else {}
    native.py_test(
        name = name,
        srcs = srcs + ["//tools/python:pytest_main.py"],
        main = "//tools/python:pytest_main.py",
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        deps = [dep for dep in deps if dep != "@pypi//:pytest"] + ["@pypi//:pytest"],
        env = dict(
            _ENV,
            JAX_PLATFORMS = "cpu",
            PYTEST_DISABLE_PLUGIN_AUTOLOAD = "1",
            **dict(simulated, **env)
        ),
        python_version = "PY3",
        size = size,
        **kwargs
    )
