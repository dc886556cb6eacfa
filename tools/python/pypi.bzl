"""Environment @pypi, pinned by requirements.lock, with one target for each distribution."""

_VERSIONS = "3.11 to 3.14"
_CHECK = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"

def find_interpreter(rctx):
    """Returns $OV_PYTHON, or a Python interpreter that supports the environments."""
    requested = rctx.os.environ.get("OV_PYTHON")
    for name in [requested] if requested else ["python3", "python3.13", "python3.12", "python3.11", "python3.14"]:
        found = rctx.path(name) if name.startswith("/") else rctx.which(name)
        if found and rctx.execute([found, "-c", _CHECK]).return_code == 0:
            return found
    fail("%s is Python %s. Install one (Debian, Ubuntu: apt-get install python3-venv) or set OV_PYTHON=/path/to/python3." %
         ("OV_PYTHON=%s" % requested if requested else "No python3 on PATH", _VERSIONS))

def run(rctx, arguments):
    """Runs a command and returns its output; fails the build with its error messages if it fails."""
    done = rctx.execute(arguments, timeout = 3600, quiet = False, environment = {"PYTHONPATH": ""})
    if done.return_code:
        fail("the Python environment could not be created:\n" + done.stderr[-4000:])
    return done.stdout.strip()

def _pypi_environment_impl(rctx):
    extras = [extra for extra in rctx.os.environ.get("OV_EXTRAS", "").split(",") if extra]
    for extra in extras:
        if extra not in rctx.attr.extras:
            fail("OV_EXTRAS=%s is not an extra; expected some of %s, separated by commas" % (extra, ", ".join(rctx.attr.extras)))
    locks = [rctx.path(Label("//tools/python:requirements%s.lock" % suffix)) for suffix in [""] + ["-" + e for e in extras]]

    shared = run(rctx, [find_interpreter(rctx), rctx.path(rctx.attr._environment)] + locks)
    rctx.symlink(shared, "venv")
    run(rctx, [rctx.path("venv/bin/python3"), rctx.path(rctx.attr._generate), rctx.path(".")] + locks)

pypi_environment = repository_rule(
    implementation = _pypi_environment_impl,
    attrs = {
        "extras": attr.string_list(default = ["tpu", "cuda"]),
        "_environment": attr.label(default = "//tools/python:environment.py", allow_single_file = True),
        "_generate": attr.label(default = "//tools/python:generate_pypi.py", allow_single_file = True),
    },
    environ = ["OV_EXTRAS", "OV_PYTHON", "OV_CACHE"],
)
