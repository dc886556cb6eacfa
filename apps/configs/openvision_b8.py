"""OpenVision B/8: 160, 224 and 384 px in one run; arguments: openvision_curriculum.py."""

import functools

from apps.configs import openvision_curriculum

get_config = functools.partial(openvision_curriculum.get_config, model="B/8")
