"""Python targets of this repository. `deps` holds exactly what the `srcs` import; //tools/lint:tree_test checks it."""

load("//tools/python:packages.bzl", "PACKAGES")

# PYTHONSAFEPATH keeps the directory of the main file off sys.path, so that undeclared files cannot be imported.
_ENV = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONSAFEPATH": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

# Contains the path of the interpreter for ov_convert/clients; ov_convert.client_env finds it in the runfiles.
_CLIENTS = "@clients//:interpreter"

# On CPUs, XLA maps new buffers in each step; huge pages reduce the page faults by a factor of 500. glibc only.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# By default JAX only caches programs that compile for more than a second; those of tests are smaller.
_KEEP_ALL_PROGRAMS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

# For programs that run for milliseconds, LLVM's optimizations cost more time than they save.
_UNOPTIMIZED = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}

# The main file of every test, and what it imports.
_RUNNER_SRCS = ["//tools/python:%s.py" % name for name in ["fork_server", "pytest_main", "shapes", "simulated_devices"]]
_RUNNER = ["@pypi//:beartype", "@pypi//:jaxtyping", "@pypi//:pytest"]

def _sources():
    """Makes the files of this Bazel package visible to //tools/lint."""
    if native.package_name() not in PACKAGES:
        fail("add %r to PACKAGES in tools/python/packages.bzl: lint sees only the directories listed there" % native.package_name())
    if not native.existing_rule("sources"):
        native.filegroup(
            name = "sources",
            srcs = native.glob(["**"], exclude = ["**/__pycache__/**", "**/*.egg-info/**", "build/**"]),
            visibility = [
                "//:__pkg__",
                "//tests/docs:__pkg__",
                "//tests/standalone:__pkg__",
            ],
        )

def ov_py_library(name, srcs, deps = [], **kwargs):
    """Defines a py_library. The library of a package has the name of its directory and imports = ["."]."""
    _sources()
    native.py_library(name = name, srcs = srcs, deps = deps, srcs_version = "PY3", **kwargs)

def ov_py_binary(name, srcs, deps = [], env = {}, clients = False, **kwargs):
    """Defines a py_binary. `main` is required only with several srcs. `clients` is as in ov_py_test."""
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

def ov_py_test(name, srcs, deps = [], devices = 1, clients = False, compile_cache = None, optimize = True, size = "small", args = [], env = {}, tags = [], **kwargs):
    """Runs pytest on the srcs, on simulated CPU devices.

    Args:
      name: name of the target.
      srcs: test files.
      deps: targets that the srcs import; pytest is implied.
      devices: number of simulated CPU devices.
      clients: whether the test runs scripts of ov_convert/clients and requires their environment.
      compile_cache: whether to use the compilation cache shared by tests (tools/bazel sets its folder).
        The default is True except in tools/, where tests time the compiler.
      optimize: whether XLA optimizes programs. False compiles in 2/3 of the time. Use it only for tests
        that do not compare numbers with those of another compilation.
      size: small 60 s, medium 300 s, large 900 s.
      args: arguments of pytest.
      env: additional environment variables.
      tags: tests with "merge" or "manual" are not run by `bazel test //...`; CONTRIBUTING.md explains the tiers.
      **kwargs: further arguments of py_test: data, shard_count, timeout, ...
    """
    _sources()
    if clients:
        kwargs["data"] = kwargs.get("data", []) + [_CLIENTS]
        tags = tags + ["clients"]  # lets //tools/ci:summary find skipped tests
    if compile_cache == None:
        compile_cache = not native.package_name().startswith("tools/")
    jax = _KEEP_ALL_PROGRAMS if compile_cache else {"OV_SHARED_COMPILE_CACHE": "no"}
    if not optimize:
        jax = dict(jax, **_UNOPTIMIZED)
    if devices > 1:
        jax = dict(jax, OV_SIMULATED_DEVICES = str(devices))
    native.py_test(
        name = name,
        srcs = srcs + _RUNNER_SRCS,
        main = "//tools/python:pytest_main.py",
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        deps = [dep for dep in deps if dep not in _RUNNER] + _RUNNER,
        env = dict(
            _ENV,
            JAX_PLATFORMS = "cpu",
            PYTEST_DISABLE_PLUGIN_AUTOLOAD = "1",
            **dict(jax, **env)
        ),
        python_version = "PY3",
        size = size,
        tags = tags,
        **kwargs
    )
