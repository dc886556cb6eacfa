def bzl_library(name, **_kwargs):
    native.filegroup(name = name)
